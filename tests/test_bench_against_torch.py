"""The comparison with PyTorch: measurements are timed alone, and ratios are between the best of each side."""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_against_torch.py"

TIMED = """
import json, sys, time
compiled = time.monotonic()
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
time.sleep(0.1)
print(json.dumps({"compiled": compiled, "start": start, "end": time.monotonic()}))
"""
FAILS = "raise ValueError('wrong shape')"
EXHAUSTED = "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes')"
DIES = "print('ready', flush=True); raise OSError('lost its device')"
NEVER_READY = "import time; time.sleep(600)"
NEVER_DONE = "import time; print('ready', flush=True); time.sleep(600)"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[SCRIPT.stem]


def process(script, program, name="a"):
    return script.Measurement("a:1:1", True, {"variant": name}, [sys.executable, "-c", program])


def test_a_measurement_is_timed_alone_and_nothing_compiles_meanwhile(script, tmp_path):
    measurements = [process(script, program) for program in (TIMED, FAILS, TIMED, DIES, EXHAUSTED, TIMED)]
    rows = script.run(measurements, jobs=2, seconds=120, cache=tmp_path)
    assert sorted(row.get("error", "") for row in rows) == [
        "", "", "", "OSError: lost its device", "ValueError: wrong shape", "out of memory",
    ]  # fmt: skip
    timed = sorted((row for row in rows if "error" not in row), key=lambda row: row["start"])
    assert timed[0]["start"] > max(row["compiled"] for row in timed)
    assert all(before["end"] < after["start"] for before, after in pairwise(timed))


def test_slow_compilations_leave_jobs_to_others(script, tmp_path):
    started = []

    def recording(name, ours):
        measurement = script.Measurement("a:1:1", ours, {"variant": name}, [sys.executable, "-c", TIMED])
        start = measurement.start
        measurement.start = lambda *args: started.append(name) or start(*args)
        return measurement

    measurements = [recording(name, name[0] == "o") for name in ("compile", "compile", "o1", "amp", "o2", "o3", "ckpt")]
    rows = script.run(measurements, jobs=4, seconds=120, cache=tmp_path)
    assert started[:4] == ["compile", "o1", "amp", "o2"]
    assert len(rows) == 7
    started.clear()
    script.run([recording(name, False) for name in ("compile", "amp")], jobs=1, seconds=120, cache=tmp_path)
    assert started == ["amp", "compile"]


@pytest.mark.parametrize("program", [NEVER_READY, NEVER_DONE])
def test_timeout(script, tmp_path, program):
    measurements = [process(script, program), process(script, NEVER_READY)]
    rows = script.run(measurements, jobs=1, seconds=1, cache=tmp_path)
    assert [row["error"] for row in rows] == ["timed out"] * 2
    assert all(m.process is None or m.process.poll() is not None for m in measurements)


@pytest.mark.slow
def test_a_case_of_ours_waits_until_it_is_timed(script, tmp_path):
    [training, inference] = script.make_measurements(
        script.parse_arguments(
            ["simple_cnn:32:2", "--variants", "--remats", "none", "--dtypes", "float32", "--steps", "1"]
        )
    )
    rows = script.run([training, inference], jobs=1, seconds=300, cache=tmp_path)
    assert rows[0]["train_images_per_s"] == pytest.approx(2 / rows[0]["train_s"])
    assert rows[1]["infer_s"] > 0
    assert any((tmp_path / "jax").iterdir())  # compiled programs are kept


def test_ratios_are_between_the_best_of_each_side(script):
    ours = [
        {"variant": "none", "train_images_per_s": 90.0, "train_peak_bytes": 30},
        {"variant": "layer", "train_images_per_s": 60.0, "train_peak_bytes": 10},
        {"variant": "full", "error": "timed out"},
    ]
    theirs = [
        {"variant": "amp", "train_images_per_s": 40.0, "train_peak_bytes": 40},
        {"variant": "ckpt", "train_images_per_s": 20.0, "train_peak_bytes": 16},
        {"variant": "compile", "train_images_per_s": 45.0, "train_peak_bytes": None},
    ]
    assert script.ratios(2048, ours, theirs) == [
        "# train images/s, none against compile: 2.00 (goal 1.5)",
        "# train peak bytes against amp: 0.25 (goal 0.35)",
        "# train peak bytes against ckpt: 0.62 (goal 0.7)",
    ]
    assert script.ratios(2048, ours, []) == []
