"""Reading libtpu's log of buffer assignment: that of version 0.0.42, without times and other lines."""

import os
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


PROGRAM = """\
HloModule jit_step
ENTRY %main (p: f32[8,64]) -> f32[8,64] {
  %s = (f32[8,64], f32[8,64]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %d = f32[8,64] collective-permute-done(%s)
  ROOT %r = f32[8,64] all-reduce(%d), replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""

CHILD = """\
#!/bin/sh
for flag in $XLA_FLAGS; do case $flag in --xla_dump_to=*) folder=${flag#*=};; esac; done
cat program > "$folder/module_0000.jit_step.cl_1.after_optimizations_before_buffer_assignment.txt"
echo half a program > "$folder/module_0000.jit_step.cl_1.after_optimizations.txt"
echo "$$ $TPU_VMODULE $@" > arguments
cat log >&2
exec sleep 600
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "scripts")
    return import_module("tpu_memory")


@pytest.fixture
def assigned_bytes(script):
    return script.assigned_bytes


def test_arguments_and_temporaries_in_device_memory_count(assigned_bytes):
    assert assigned_bytes(LOG.splitlines(keepends=True)) == round(64.28 * 2**20) + 512 + 68157440


@pytest.mark.parametrize("missing", ["Buffer assignment done", "color 0"])
def test_an_incomplete_log_is_an_error_with_its_last_lines(missing, assigned_bytes):
    lines = [line for line in LOG.splitlines(keepends=True) if missing not in line]
    with pytest.raises(ValueError, match="Buffer assignment done" if missing == "color 0" else "total allocation"):
        assigned_bytes(lines if missing != "color 0" else [lines[0], lines[-1]])


def test_the_child_is_stopped_once_its_buffers_are_assigned(script, tmp_path, monkeypatch):
    for name, text in (("program", PROGRAM), ("log", LOG), ("child", CHILD)):
        (tmp_path / name).write_text(text)
    (tmp_path / "child").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.sys, "executable", str(tmp_path / "child"))
    peak, collectives = script.plan(["--device=v5e"])
    assert peak == script.assigned_bytes(LOG.splitlines(keepends=True))
    sizes = [(collective.kind, collective.bytes) for collective in collectives]
    assert sizes == [("collective-permute", 2048), ("all-reduce", 2048)]
    pid, vmodule, *arguments = (tmp_path / "arguments").read_text().split()
    assert vmodule == "buffer_assignment=1"
    assert arguments == ["-m", "cxrjax.cli.main", "plan", "--device=v5e"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    setting = {"accelerator": "v5e", "network": "densenet121", "size": 512, "data": 1, "space": 4}
    *_, row = script.traffic_table([setting | {"collectives": collectives}])
    assert row == "| v5e | densenet121 | 512 | 1 x 4 | 1 | 0 | 0 | 1 | 0 | 0.000 |"
