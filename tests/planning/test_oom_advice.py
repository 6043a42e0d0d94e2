"""Out of memory: one clear line with what needs less, and the plan's table where a step was trained."""

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from processes import finish, free_port

from cxrjax.cli.main import main
from cxrjax.config import load
from cxrjax.errors import out_of_memory
from cxrjax.planning import oom_advice
from cxrjax.planning.accelerators import TARGETS
from cxrjax.planning.plan import USABLE, estimate
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
    ("text", "asked"),
    [
        (GPU, "39 GB"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.72GiB.", "3.99 GB"),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 16.0GiB (17179869184B) on device ordinal 0", "17.2 GB"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.15G of 15.48G hbm.", "18.4 GB"),
        (TPU, "23.9 GB"),
        ("RESOURCE_EXHAUSTED: no words", "no words"),
        ("INTERNAL: out of luck", ""),
        ('RESOURCE_EXHAUSTED: Error writing local file "/run/x": No space left on device', ""),
    ],
)
def test_what_was_asked_for_is_found_in_the_words_of_every_device(text, asked):
    assert out_of_memory(jax.errors.JaxRuntimeError(text)) == asked
    outer = RuntimeError("while stepping")
    outer.__cause__ = jax.errors.JaxRuntimeError(text)
    assert out_of_memory(outer) == asked


def test_training_says_what_needs_less_and_what_the_plan_says_of_it(tiny_overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "make_train_step", lambda *_, **__: raising)
    words = [f"--config.{word}" for word in tiny_overrides]
    assert main.main(["train", "--config", "demo:32", "--workdir", str(tmp_path), *words]) == 1
    idle, first, *others = capsys.readouterr().err.splitlines()
    assert idle == "1 of 8 devices are used: config keys mesh.data, mesh.space"
    assert first.startswith(
        "cxrjax: out of device memory (39 GB asked for); what needs less: --config.model.remat=layer;"
    )
    for setting in ("--config.train.per_device=2", "--config.mesh.space=2", "--config.evaluate.batch below 100"):
        assert setting in first
    table = "\n".join(others)
    assert "Traceback" not in table
    rows = {line.rsplit(maxsplit=6)[0].strip(): line.split()[-2] for line in others if " x " in line}
    assert float(rows["model.remat=block"]) < float(rows["as it is"])
    assert float(rows["train.per_device=2"]) < float(rows["as it is"])
    assert "Estimated from shapes" in table


EXHAUSTED = f"""
import sys
import jax
from cxrjax import cli
from cxrjax.parallel import runtime

def train(arguments):
    runtime.start(arguments.coordinator, arguments.processes, arguments.process)
    raise jax.errors.JaxRuntimeError({GPU!r})

cli.RUN["train"] = train
cli.entry()
"""


def test_of_several_processes_the_first_shows_the_plan(tmp_path):
    words = ["train", "--config", "demo:32", "--workdir", str(tmp_path), "--config.train.batch=16",
             "--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", EXHAUSTED, *words, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    ended = finish(started)
    assert [code for code, _ in ended] == [1, 1], ended
    for _, said in ended:
        assert "cxrjax: out of device memory (39 GB asked for); what needs less: --config.model.remat=layer;" in said
    first, other = (said.count(" x ") for _, said in ended)
    assert (first > 3, other) == (True, 0), ended
    assert "Estimated from shapes" in ended[0][1]


def test_where_others_ended_only_what_is_soon_planned_is_shown(monkeypatch, capsys):
    clock, made = SimpleNamespace(now=0.0), []
    clock.monotonic = lambda: setattr(clock, "now", clock.now + 15) or clock.now
    monkeypatch.setattr(oom_advice, "time", clock)
    monkeypatch.setattr(oom_advice, "several", lambda: True)
    monkeypatch.setattr(
        oom_advice, "estimate", lambda *given, **more: made.append(estimate(*given, **more)) or made[-1]
    )
    oom_advice.advise(SimpleNamespace(config="demo:32", overrides=["train.batch=16"]))
    assert len(made) == 1  # the first ends in time, the next would begin too late
    assert "as it is" in capsys.readouterr().err


def test_settings_begin_where_the_config_stands():
    config = load("densenet121:256", ["model.remat=block", "train.batch=16", "train.per_device=4", "mesh.data=2"])
    assert list(oom_advice.less(config)) == [
        ["model.remat=full"],
        ["train.per_device=2"],
        ["model.remat=block", "train.per_device=2"],
        ["mesh.space=2"],
        ["data.size=128"],
    ]


def test_all_devices_share_rows_only_with_fewer_images_at_once(tiny_overrides):
    """Of eight devices that share a batch each would otherwise hold as much: half the rows of twice as many images."""
    made = list(oom_advice.less(load("demo:32", [*tiny_overrides, "train.batch=16", "mesh.data=0"])))
    assert ["mesh.space=2", "train.per_device=2"] in made
    made = list(oom_advice.less(load("demo:32", [*tiny_overrides, "train.batch=16", "mesh.data=8"])))
    assert ["mesh.data=4", "mesh.space=2", "train.per_device=2"] in made
    made = list(oom_advice.less(load("demo:32", [*tiny_overrides, "mesh.data=1", "mesh.space=8"])))
    assert not any(change.startswith("mesh.space") for changes in made for change in changes)


def test_each_setting_is_planned_with_its_own_mesh(capsys):
    oom_advice.advise(SimpleNamespace(config="demo:32", overrides=["train.batch=16", "mesh.data=0"]))
    said = capsys.readouterr().err
    assert re.search(r"as it is +8 x 1 +16 ", said)
    assert re.search(r"mesh.space=2 train.per_device=2 +4 x 2 +8 ", said)


def test_ctrl_c_keeps_what_is_planned(monkeypatch, capsys):
    made = []

    def interrupted(*given, **more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(estimate(*given, **more))
        return made[-1]

    monkeypatch.setattr(oom_advice, "estimate", interrupted)
    oom_advice.advise(SimpleNamespace(config="demo:32", overrides=["train.batch=16"]))
    rows = [line for line in capsys.readouterr().err.splitlines() if " x " in line]
    assert len(rows) == 2


def test_what_fits_by_an_estimate_is_likely(capsys, monkeypatch):
    overrides = ["train.batch=16", "mesh.data=1"]
    whole = estimate(load("demo:32", overrides), TARGETS["v5e"])
    nearly = dataclasses.replace(TARGETS["v5e"], memory=int(0.99 * (whole.peak + whole.waiting) / USABLE))
    monkeypatch.setattr(oom_advice, "planned_for", lambda _: (nearly, estimate))
    oom_advice.advise(SimpleNamespace(config="demo:32", overrides=overrides))
    fits = [line.split()[-1] for line in capsys.readouterr().err.splitlines() if " x " in line]
    assert fits[0] == "unlikely"
    assert "likely" in fits[1:]


def test_without_jaxs_cpu_backend_a_step_is_traced_where_it_ran(monkeypatch):
    devices = jax.devices

    def no_cpu(backend=None):
        if backend:
            raise RuntimeError("Unknown backend cpu")
        return devices()

    monkeypatch.setattr(jax, "devices", no_cpu)
    assert estimate(load("demo:32", ["train.batch=16"]), TARGETS["h200"]).peak > 0


def test_for_a_tpu_nothing_is_compiled():
    assert oom_advice.planned_for(SimpleNamespace(device_kind="TPU v5 lite")) == (TARGETS["v5e"], estimate)


@pytest.mark.parametrize(("verb", "said"), [("evaluate", "--batch N"), ("predict", "--batch or --size")])
def test_other_verbs_say_their_own_settings(verb, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_run, "evaluate_run", raising)
    monkeypatch.setattr("cxrjax.runs.predict_run.predict_files", raising)
    words = [verb, str(tmp_path), *(["x.png"] if verb == "predict" else [])]
    assert main.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cxrjax: out of device memory (39 GB asked for); what needs less: ")
    assert said in line
