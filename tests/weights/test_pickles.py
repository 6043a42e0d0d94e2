"""Small files that demand much: refused, or read, in time and memory proportional to their size."""

import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from torchformat import whole_module, write

from cxrjax.errors import CxrError
from cxrjax.weights.files import read_weight_file

MANY = b"](" + 40_000 * b"N" + b"e"  # a list of 40,000 times None


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        pytest.param(
            b"ctorch\nSize\nq\x00" + MANY + b"\x85q\x01" + 12_000 * b"h\x00h\x01R", "size of 40,000", id="size"
        ),
        pytest.param(b"cbuiltins\nset\nq\x00" + MANY + b"\x85q\x01" + 12_000 * b"h\x00h\x01R", "copies more", id="set"),
        pytest.param(b"(" + 40_000 * b"N" + b"tq\x01}q\x02" + 12_000 * b"h\x01Ns", "40,000 parts", id="key"),
    ],
)
def test_copying_one_list_many_times_is_refused(tmp_path, pickled, message):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(CxrError, match=message) as caught:
        read_weight_file(tmp_path / "a.pth", restricted=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 20e6
    assert time.process_time() - start < 1


def test_non_persistent_buffers_are_skipped_quickly(tmp_path):
    names = [f"running_{number}" for number in range(20_000)]
    arrays = {"w": np.ones(2, np.float32)}

    def make_module():
        module = whole_module("torch.nn.modules.container.Sequential", arrays)()
        module._buffers.update(dict.fromkeys(names))
        module._buffers["running_0"] = 1
        module._non_persistent_buffers_set.update(names)
        return module

    file = write(tmp_path / "a.pth", make_module)
    start = time.process_time()
    assert list(read_weight_file(file, restricted=True).arrays) == ["w"]
    assert time.process_time() - start < 2
