"""What libtpu logs of its buffers, as it stood in a log of version 0.0.42 (times and other lines cut)."""

from importlib import import_module
from pathlib import Path

import pytest

LOG = """\
I1130 5440 buffer_assignment.cc:2187] Using FAST_MERGE_WITH_FALLBACK
I1130 5440 buffer_assignment.cc:814] Combined temp allocation for color 0 is: allocation 3775: size 512, preallocated-temp:
 value: <1 copy.1 @0> (size=512,offset=0): f32[1]
I1130 5440 buffer_assignment.cc:834] Combined allocation absorbing temp allocation: allocation 11: size 68157440, preallocated-temp:
I1130 5440 buffer_assignment.cc:814] Combined temp allocation for color 2 is: allocation 12: size 8, color 2, preallocated-temp:
I1130 5440 buffer_assignment.cc:834] Combined allocation absorbing temp allocation: allocation 7: size 512, preallocated-temp:
I1130 5440 buffer_assignment.cc:814] Combined temp allocation for color 1 is: allocation 0: size 70558720, color 1, preallocated-temp:
I1130 5440 buffer_assignment.cc:2666] BufferAssignment stats:
I1130 5440 buffer_assignment.cc:2666]              parameter allocation:   64.28MiB
I1130 5440 buffer_assignment.cc:2666]                  total allocation:  196.65MiB
I1130 5440 buffer_assignment.cc:2667] Buffer assignment done.
"""  # noqa: E501 - its lines


@pytest.fixture
def assigned(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "scripts")
    return import_module("tpu_memory").assigned


def test_arguments_and_temporaries_of_the_memory_count_not_those_on_the_chip(assigned):
    assert assigned(LOG.splitlines(keepends=True)) == round(64.28 * 2**20) + 512 + 68157440


@pytest.mark.parametrize("words", ["Buffer assignment done", "color 0"])
def test_a_log_without_them_is_an_error_that_shows_it(words, assigned):
    kept = [line for line in LOG.splitlines(keepends=True) if words not in line]
    with pytest.raises(ValueError, match="Buffer assignment done" if words == "color 0" else "total allocation"):
        assigned(kept if words != "color 0" else [kept[0], kept[-1]])
