"""Reading PyTorch files: everything PyTorch writes is read, everything else is refused with a one-line error."""

import importlib.util
import io
import os
import pickle
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_files import FORMATS
from torchformat import DTYPES, Tensor, whole_module, write

from cxrjax.errors import CxrError
from cxrjax.weights.files import read_weight_file

FORMATS_BY_ID = [pytest.param(False, id="zip"), pytest.param(True, id="legacy")]


def read(file, restricted=True):
    return read_weight_file(file, restricted=restricted)


def make_arrays_of_every_type() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {dtype.name: (rng.standard_normal((2, 3)) * 3).astype(dtype) for dtype in DTYPES}
    return arrays | {"scalar": np.array(7), "empty": np.zeros((0, 4), np.float32)}


@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
def test_every_type_and_shape_is_read(tmp_path, legacy):
    arrays = make_arrays_of_every_type()
    content = read(write(tmp_path / "a.pth", arrays, legacy=legacy))
    assert content.format == ("PyTorch legacy" if legacy else "PyTorch ZIP")
    assert list(content.arrays) == list(arrays)
    for name, array in arrays.items():
        assert content.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(content.arrays[name], array)


@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
def test_views_of_one_storage_are_read(tmp_path, legacy):
    values = np.arange(24, dtype=np.float32)
    transposed = Tensor(values, offset=2, shape=(3, 4), strides=(1, 5))
    file = write(tmp_path / "a.pth", {"a": transposed}, legacy=legacy)
    expected = np.lib.stride_tricks.as_strided(values[2:], (3, 4), (4, 20))
    np.testing.assert_array_equal(read(file).arrays["a"], expected)


@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
def test_a_whole_module_is_read_as_its_state_dict(tmp_path, legacy):
    arrays = {"features.conv0.weight": np.ones((2, 1, 3, 3), np.float32), "features.norm0.running_mean": np.zeros(2),
              "classifier.bias": np.arange(3.0), "op_threshs": np.ones(3)}  # fmt: skip
    model = whole_module("torchxrayvision.models.DenseNet", arrays, pathologies=["Mass", "", "Nodule"])
    content = read(write(tmp_path / "a.pt", model, legacy=legacy))
    assert content.module == "torchxrayvision.models.DenseNet"
    assert content.labels == ("Mass", "", "Nodule")
    assert content.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(content.arrays[name], array)


def test_wrappers_are_opened_and_other_entries_are_listed(tmp_path):
    weights = {"w": np.ones(2, np.float32), "version": 3}
    momentum = {0: {"exp_avg": np.ones(2)}}
    checkpoint = {"epoch": 7, "state_dict": weights, "optimizer": {"state": momentum, "param_groups": [{"lr": 0.1}]}}
    content = read(write(tmp_path / "a.pth.tar", checkpoint))
    assert content.wrapper == "state_dict"
    assert list(content.arrays) == ["w"]
    assert set(content.other_entries) == {"epoch", "optimizer", "state_dict.version"}
    content = read(write(tmp_path / "b.pth", {"run": {"model": {"w": np.ones(1)}}, "loss": 1.0}))
    assert (content.wrapper, content.other_entries) == ("run.model", ("loss",))
    ema = {"state_dict": weights, "state_dict_ema": weights | {"w": np.zeros(2, np.float32)}}
    assert read(write(tmp_path / "c.pth", ema)).other_entries == ("state_dict_ema", "state_dict.version")


class RunsCode:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
@pytest.mark.parametrize("restricted", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, legacy, restricted):
    marker = tmp_path / "ran"
    file = write(tmp_path / "a.pth", {"state_dict": {"w": np.ones(2)}, "extra": RunsCode(marker)}, legacy=legacy)
    with pytest.raises(CxrError, match=r"a.pth asks for posix.mkdir, .* nothing was run; .* state_dict"):
        read(file, restricted)
    assert not marker.exists()
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists()  # unpickling it does run code


def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(CxrError, match=r"a pickle that torch\.save did not write"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("elsewhere", "Network"),
        ("builtins", "eval"),
        ("torch", "hub.load"),
        ("torch.nn", "../os.system"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_only_allowed_globals_may_be_named(tmp_path, module, name):
    is_inert = module == "torch.nn"  # any class in PyTorch's modules becomes an inert object
    pickled = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(CxrError, match="holds no weights" if is_inert else rf"asks for {module}\.{name}"):
        read(tmp_path / "a.pth")


FLOATS = np.ones(10, np.float32)


@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(Tensor(FLOATS, count=10**12, shape=(10**12,), strides=(1,)), id="gigantic storage"),
        pytest.param(Tensor(FLOATS, shape=(10**12,), strides=(1,)), id="gigantic shape"),
        pytest.param(Tensor(FLOATS, shape=(10**6, 10**6), strides=(0, 0)), id="gigantic by repeating"),
        pytest.param(Tensor(FLOATS, shape=(10**30,), strides=(0,)), id="more than a machine word"),
        pytest.param(Tensor(FLOATS, shape=(5,), strides=(3,)), id="strides past the end"),
        pytest.param(Tensor(FLOATS, offset=8, shape=(5,), strides=(1,)), id="offset past the end"),
        pytest.param(Tensor(FLOATS, offset=-4, shape=(5,), strides=(1,)), id="negative offset"),
        pytest.param(Tensor(FLOATS, offset=4, shape=(5,), strides=(-1,)), id="negative stride"),
        pytest.param(Tensor(FLOATS, shape=(2, 5), strides=(1,)), id="too few strides"),
        pytest.param(Tensor(FLOATS, shape=("2",), strides=(1,)), id="a size of text"),
    ],
)
def test_tensors_that_declare_more_than_is_stored_are_refused(tmp_path, legacy, restricted, tensor):
    file = write(tmp_path / "a.pth", {"w": np.ones(3, np.float32), "bad": tensor}, legacy=legacy)
    tracemalloc.start()
    with pytest.raises(CxrError, match=r"a.pth is damaged") as caught:
        read(file, restricted)
    assert "\n" not in str(caught.value)
    if restricted:
        assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_compressed_archive_is_refused(tmp_path):
    zeros = {"w": np.zeros(10**6, np.float32)}
    file = write(tmp_path / "a.pth", zeros, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10**5
    with pytest.raises(CxrError, match="compressed member"):
        read(file)


def test_exponential_nesting_is_refused(tmp_path):
    """Dicts and modules that hold each other twice: 2^200 paths."""
    tree: dict = {"w": 1}
    for _ in range(200):
        tree = {"a": tree, "b": tree}
    with pytest.raises(CxrError, match="no weights"):
        read(write(tmp_path / "a.pth", tree))

    def nested_modules():
        module = whole_module("torch.nn.modules.container.Sequential", {})()
        for _ in range(60):
            outer = whole_module("torch.nn.modules.container.Sequential", {})()
            outer._modules.update(a=module, b=module)
            module = outer
        return module

    with pytest.raises(CxrError, match="nested without end"):
        read(write(tmp_path / "b.pth", nested_modules))
    nested = b"\x80\x02})" + 60 * b"2\x86" + b"K\x01s."  # {} with the key t60, where t0 = () and tn = (tn-1, tn-1)
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("archive/data.pkl", nested)
    with pytest.raises(CxrError, match="tuple as a key"):
        read(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Not Found</body></html>", "text file that begins '<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"PK\x03\x04" + bytes(100), "not a complete ZIP"),
        (bytes(257) + b"ustar" + bytes(200), "tar archive"),
        (bytes(range(128, 200)), "neither safetensors nor a PyTorch file"),
        (b"\xff\xff\xff\x00\x00\x00\x00\x00{}", "truncated safetensors file"),
        (b"\x04\x00\x00\x00\x00\x00\x00\x00{]}}", "damaged safetensors"),
    ],
)
def test_files_of_other_kinds_are_recognised(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CxrError, match=message) as caught:
        read(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CxrError, match=r"there is no file .*a\.pth"):
        read(tmp_path / "a.pth")


def test_zip_files_without_weights_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CxrError, match=r"not one that torch\.save wrote"):
        read(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    with pytest.raises(CxrError, match="TorchScript"):
        read(tmp_path / "b.pt")
    with pytest.raises(CxrError, match="no weights"):
        read(write(tmp_path / "c.pth", {"epoch": 3, "loss": [1.0]}))
    both = {"first": {"w": np.ones(1)}, "second": {"w": np.ones(1)}}
    with pytest.raises(CxrError, match=r"several sets of weights \(first, second\)"):
        read(write(tmp_path / "d.pth", both))


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_names_with_terminal_escapes_are_refused(tmp_path, form):
    file = FORMATS[form](tmp_path, {"w\x1b[2J\n": np.ones(2, np.float32)})
    with pytest.raises(CxrError, match=r"an array is called 'w\\x1b\[2J\\n'"):
        read(file)


@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
def test_a_damaged_byte_in_a_tensor_fails_the_checksum(tmp_path, legacy):
    file = write(tmp_path / "a.pth", {"w": np.full(100, 0.5, np.float32)}, legacy=legacy)
    content = bytearray(file.read_bytes())
    content[content.index(np.full(3, 0.5, np.float32).tobytes()) + 40] ^= 64
    file.write_bytes(content)
    if legacy:  # without checksums
        assert (read(file).arrays["w"] != 0.5).sum() == 1
    else:
        with pytest.raises(CxrError, match="checksum"):
            read(file)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """A plain state dict and a whole module in both formats, as bytes."""
    folder = tmp_path_factory.mktemp("small")
    arrays = {
        "features.conv0.weight": np.ones((2, 1, 3, 3), np.float32),
        "norm.running_mean": np.zeros(2, jnp.bfloat16),
    }
    model = whole_module("torchxrayvision.models.DenseNet", arrays, pathologies=["Mass"])
    values = ({"state_dict": arrays, "epoch": 3, "lr": 0.5, "names": ["a", ("b", None, True)]}, model)
    return [write(folder / "a", value, legacy=legacy).read_bytes() for value in values for legacy in (False, True)]


def damage(content: bytes, data) -> bytes:
    """Truncate the content, and change up to 8 bytes."""
    changed = bytearray(content)
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 255)), max_size=8)
    ):
        if position < len(changed):
            changed[position] = value
    return bytes(changed)


def damage_pickle(content: bytes, data) -> bytes:
    """Damage the pickle in a ZIP file, with a matching checksum."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(packed, "w") as after:
        for name in before.namelist():
            member = before.read(name)
            after.writestr(name, damage(member, data) if name.endswith("data.pkl") else member)
    return packed.getvalue()


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_damage_gives_arrays_or_one_clear_error(small_files, tmp_path_factory, data):
    content = data.draw(st.sampled_from(small_files))
    in_pickle = content.startswith(b"PK") and data.draw(st.booleans())
    content = damage_pickle(content, data) if in_pickle else damage(content, data)
    file = tmp_path_factory.getbasetemp() / "damaged.pth"
    file.write_bytes(content)
    error = ""
    tracemalloc.start()
    try:
        assert all(isinstance(array, np.ndarray) for array in read(file).arrays.values())
    except CxrError as caught:
        error = str(caught)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert not error or (str(file) in error and "\n" not in error)


needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")


@needs_torch
@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
def test_both_readers_read_what_pytorch_writes(tmp_path, legacy):
    import torch

    torch.manual_seed(0)
    base = torch.randn(4, 6)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(dtype): (torch.randn(3, 2) * 5).to(dtype) for dtype in dtypes} | {
        "view": base[1:3, ::2], "transposed": base.T, "parameter": torch.nn.Parameter(base),
        "shared": base, "scalar": torch.tensor(3), "empty": torch.zeros(0, 2), "bool": base > 0,
    }  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 1, 5, 5)).sum().backward()
    optimizer.step()
    checkpoint = {"state_dict": tensors, "optimizer": optimizer.state_dict(), "epoch": 3}
    file = tmp_path / "a.pth"
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not legacy)
    ours, theirs = read(file), read(file, restricted=False)
    assert (
        (ours.other_entries, ours.wrapper)
        == (theirs.other_entries, theirs.wrapper)
        == (("optimizer", "epoch"), "state_dict")
    )
    assert list(ours.arrays) == list(theirs.arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert ours.arrays[name].dtype == theirs.arrays[name].dtype
        np.testing.assert_array_equal(ours.arrays[name], theirs.arrays[name])
        np.testing.assert_array_equal(ours.arrays[name].astype(np.float64), tensor.detach().to(torch.float64).numpy())
    torch.save(model, file, _use_new_zipfile_serialization=not legacy)
    content = read(file, restricted=False)
    assert content.module == "torch.nn.modules.container.Sequential"
    assert list(content.arrays) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(content.arrays[name], tensor.numpy())


@needs_torch
@pytest.mark.parametrize("legacy", FORMATS_BY_ID)
def test_pytorch_reads_what_the_tests_write(tmp_path, legacy):
    import torch

    arrays = {name: array for name, array in make_arrays_of_every_type().items() if name != "bfloat16"}
    read_back = torch.load(write(tmp_path / "a.pth", arrays, legacy=legacy), map_location="cpu", weights_only=True)
    assert list(read_back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_back[name].numpy(), array)


@needs_torch
def test_files_without_checksums_are_read(tmp_path):
    import torch

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(read(tmp_path / "a.pth").arrays["w"], np.arange(5.0))
