"""Out of memory: one error line with settings that need less, and for training a plan of each."""

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from processes import finish, free_port

from cxrjax.cli.main import main
from cxrjax.config import load_config
from cxrjax.errors import out_of_memory
from cxrjax.planning import oom_advice
from cxrjax.planning.accelerators import ACCELERATORS
from cxrjax.planning.plan import USABLE_FRACTION, estimate_plan
from cxrjax.runs import evaluate_run
from cxrjax.train import loop

GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 39000000000 bytes."

TPU = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.26G) exceeds "
    "available HBM (15.75G)."
)


def raising(*_, **__):
    raise jax.errors.JaxRuntimeError(GPU)


@pytest.mark.parametrize(
    ("text", "requested"),
    [
        (GPU, "39 GB"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.72GiB.", "3.99 GB"),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 16.0GiB (17179869184B) on device ordinal 0", "17.2 GB"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.15G of 15.48G hbm.", "18.4 GB"),
        (TPU, "23.9 GB"),
        ("RESOURCE_EXHAUSTED: no number", "no number"),
        ("INTERNAL: out of luck", ""),
        ('RESOURCE_EXHAUSTED: Error writing local file "/run/x": No space left on device', ""),
    ],
)
def test_the_requested_memory_is_read_from_the_messages_of_all_devices(text, requested):
    assert out_of_memory(jax.errors.JaxRuntimeError(text)) == requested
    outer = RuntimeError("while stepping")
    outer.__cause__ = jax.errors.JaxRuntimeError(text)
    assert out_of_memory(outer) == requested


def test_training_suggests_smaller_settings_and_plans_them(tiny_overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "make_train_step", lambda *_, **__: raising)
    arguments = [f"--config.{override}" for override in tiny_overrides]
    assert main(["train", "--config", "demo:32", "--workdir", str(tmp_path), *arguments]) == 1
    idle, first, *others = capsys.readouterr().err.splitlines()
    assert idle == "1 of 8 devices are used: config keys mesh.data, mesh.space"
    assert first.startswith("cxrjax: out of device memory (39 GB requested); to use less: --config.model.remat=layer;")
    for setting in (
        "--config.train.per_device_batch_size=2",
        "--config.mesh.space=2",
        "--config.evaluate.batch_size below 100",
    ):
        assert setting in first
    table = "\n".join(others)
    assert "Traceback" not in table
    rows = {line.rsplit(maxsplit=6)[0].strip(): line.split()[-2] for line in others if " x " in line}
    assert float(rows["model.remat=block"]) < float(rows["as configured"])
    assert float(rows["train.per_device_batch_size=2"]) < float(rows["as configured"])
    assert "Estimated from shapes" in table


EXHAUSTED = f"""
import sys
import jax
from cxrjax.cli import train
from cxrjax.cli.main import entry
from cxrjax.distributed import runtime

def run(arguments):
    runtime.start(arguments.coordinator, arguments.processes, arguments.process)
    raise jax.errors.JaxRuntimeError({GPU!r})

train.run = run
entry()
"""


def test_only_the_first_process_prints_the_plans(tmp_path):
    arguments = ["train", "--config", "demo:32", "--workdir", str(tmp_path), "--config.train.batch_size=16",
             "--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", EXHAUSTED, *arguments, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    results = finish(started)
    assert [code for code, _ in results] == [1, 1], results
    for _, output in results:
        assert "cxrjax: out of device memory (39 GB requested); to use less: --config.model.remat=layer;" in output
    first, other = (output.count(" x ") for _, output in results)
    assert (first > 3, other) == (True, 0), results
    assert "Estimated from shapes" in results[0][1]


def test_planning_stops_before_jax_ends_a_process_of_a_distributed_run(monkeypatch, capsys):
    clock, plans = SimpleNamespace(now=0.0), []
    clock.monotonic = lambda: setattr(clock, "now", clock.now + 15) or clock.now
    monkeypatch.setattr(oom_advice, "time", clock)
    monkeypatch.setattr(oom_advice, "is_distributed", lambda: True)
    monkeypatch.setattr(
        oom_advice, "estimate_plan", lambda *args, **kwargs: plans.append(estimate_plan(*args, **kwargs)) or plans[-1]
    )
    oom_advice.print_plans(load_config("demo:32", ["train.batch_size=16"]))
    assert len(plans) == 1  # the next would start after the deadline
    assert "as configured" in capsys.readouterr().err


def test_settings_are_relative_to_the_config():
    config = load_config(
        "densenet121:256", ["model.remat=block", "train.batch_size=16", "train.per_device_batch_size=4", "mesh.data=2"]
    )
    assert list(oom_advice.smaller_settings(config)) == [
        ["model.remat=full"],
        ["train.per_device_batch_size=2"],
        ["model.remat=block", "train.per_device_batch_size=2"],
        ["mesh.space=2"],
        ["data.image_size=128"],
    ]


def test_without_idle_devices_row_splitting_comes_with_a_smaller_microbatch(tiny_overrides):
    """Otherwise each of eight devices would hold half the rows of twice as many images, and save nothing."""
    settings = list(
        oom_advice.smaller_settings(load_config("demo:32", [*tiny_overrides, "train.batch_size=16", "mesh.data=0"]))
    )
    assert ["mesh.space=2", "train.per_device_batch_size=2"] in settings
    settings = list(
        oom_advice.smaller_settings(load_config("demo:32", [*tiny_overrides, "train.batch_size=16", "mesh.data=8"]))
    )
    assert ["mesh.data=4", "mesh.space=2", "train.per_device_batch_size=2"] in settings
    settings = list(
        oom_advice.smaller_settings(load_config("demo:32", [*tiny_overrides, "mesh.data=1", "mesh.space=8"]))
    )
    assert not any(change.startswith("mesh.space") for overrides in settings for change in overrides)


def test_each_setting_is_planned_with_its_own_mesh(capsys):
    oom_advice.print_plans(load_config("demo:32", ["train.batch_size=16", "mesh.data=0"]))
    output = capsys.readouterr().err
    assert re.search(r"as configured +8 x 1 +16 ", output)
    assert re.search(r"mesh.space=2 +4 x 2 +8 ", output)


def test_ctrl_c_prints_the_plans_made_so_far(monkeypatch, capsys):
    plans = []

    def interrupted(*args, **kwargs):
        if len(plans) == 2:
            raise KeyboardInterrupt
        plans.append(estimate_plan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(oom_advice, "estimate_plan", interrupted)
    oom_advice.print_plans(load_config("demo:32", ["train.batch_size=16"]))
    rows = [line for line in capsys.readouterr().err.splitlines() if " x " in line]
    assert len(rows) == 2


def test_an_estimate_says_likely(capsys, monkeypatch):
    overrides = ["train.batch_size=16", "mesh.data=1"]
    whole = estimate_plan(load_config("demo:32", overrides), ACCELERATORS["v5e"])
    nearly = dataclasses.replace(
        ACCELERATORS["v5e"], memory=int(0.99 * (whole.peak + whole.prefetched) / USABLE_FRACTION)
    )
    monkeypatch.setattr(oom_advice, "planner_for", lambda _: (nearly, estimate_plan))
    oom_advice.print_plans(load_config("demo:32", overrides))
    fits = [line.split()[-1] for line in capsys.readouterr().err.splitlines() if " x " in line]
    assert fits[0] == "unlikely"
    assert "likely" in fits[1:]


def test_a_step_is_traced_without_jaxs_cpu_backend(monkeypatch):
    devices = jax.devices

    def no_cpu(backend=None):
        if backend:
            raise RuntimeError("Unknown backend cpu")
        return devices()

    monkeypatch.setattr(jax, "devices", no_cpu)
    assert estimate_plan(load_config("demo:32", ["train.batch_size=16"]), ACCELERATORS["h200"]).peak > 0


def test_nothing_is_compiled_for_a_tpu():
    assert oom_advice.planner_for(SimpleNamespace(device_kind="TPU v5 lite")) == (ACCELERATORS["v5e"], estimate_plan)


@pytest.mark.parametrize(("command", "advice"), [("evaluate", "--batch-size N"), ("predict", "--batch-size or --size")])
def test_other_commands_have_advice_of_their_own(command, advice, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_run, "evaluate_run", raising)
    monkeypatch.setattr("cxrjax.runs.predict_run.predict_files", raising)
    arguments = [command, str(tmp_path), *(["x.png"] if command == "predict" else [])]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cxrjax: out of device memory (39 GB requested); to use less: ")
    assert advice in line
