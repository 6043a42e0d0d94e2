"""A run that is killed and resumed at any moment is bitwise identical to an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cxrjax import config as configs
from cxrjax.train.checkpoint import Checkpoints
from cxrjax.train.experiment import Experiment
from cxrjax.train.loop import train
from cxrjax.train.monitoring import read_metrics
from cxrjax.train.optimizer import make_optimizer
from cxrjax.train.state import TrainState

STEPS = 60
CLOCKS = ("seconds", "step_seconds", "wait_seconds", "data_wait_fraction")
OPTIONS = (
    "train.epochs=5",
    "train.steps_per_epoch=12",
    "train.checkpoint_every_steps=1",
    "augment.rotation=20",
    "augment.shift=0.1",
)


def arguments(overrides, directory):
    return ["train", "--config", "demo:32", "--workdir", str(directory), *(f"--config.{word}" for word in overrides)]


def start(overrides, directory):
    """Start the command line in its own process, with the tests' compilation cache."""
    return subprocess.Popen(
        [sys.executable, "-m", "cxrjax.cli.main", *arguments(overrides, directory)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def newest(directory: Path) -> int:
    """Return the step of the newest full checkpoint."""
    folder = directory / "checkpoints" / "last"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def final(overrides, directory):
    """Return every array of the last state and the best network, as bytes, and the progress without clocks."""
    config = configs.load_config("demo:32", overrides)
    experiment = Experiment.open(config)
    like = TrainState.create(experiment.network, make_optimizer(config.optimizer), 0)
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_last(like)
        best, _ = checkpoints.restore_best({"params": like.params, "stats": like.stats})
    assert restored is not None
    state, progress = restored
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
              for path, leaf in jax.tree_util.tree_leaves_with_path((state, best))}  # fmt: skip
    return arrays, {name: value for name, value in progress.items() if name not in CLOCKS}


@pytest.fixture(scope="module")
def uninterrupted(tiny_overrides, tmp_path_factory):
    """An uninterrupted run: its overrides and directory."""
    overrides = [*tiny_overrides, *OPTIONS]
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(configs.load_config("demo:32", overrides), directory)
    return overrides, directory


def without_clock(rows):
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


@pytest.mark.slow
def test_random_kills_leave_a_bitwise_identical_result(uninterrupted, tmp_path):
    overrides, reference = uninterrupted
    rng = random.Random(20261121)
    kills = 0
    for _ in range(40):
        before = newest(tmp_path)
        process = start(overrides, tmp_path)
        # Two in three die among steps and the writing of checkpoints, the others at any time since the start.
        patience = None if rng.random() < 2 / 3 else rng.uniform(0.5, 6)
        deadline = time.monotonic() + (patience or 120)
        while time.monotonic() < deadline and process.poll() is None:
            if patience is None and newest(tmp_path) > before + rng.randrange(4):
                time.sleep(rng.uniform(0, 0.05))
                break
            time.sleep(0.005)
        if process.poll() is not None:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        process.kill()
        process.communicate()
        kills += 1
        if kills >= 12:
            break
    assert kills >= 10
    process = start(overrides, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert newest(tmp_path) == STEPS
    assert final(overrides, tmp_path) == final(overrides, reference)
    assert without_clock(read_metrics(tmp_path / "metrics.jsonl")) == without_clock(
        read_metrics(reference / "metrics.jsonl")
    )
    assert not list(tmp_path.rglob("*orbax-checkpoint-tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(uninterrupted, tmp_path, number):
    overrides, reference = uninterrupted
    overrides = [*overrides, "train.checkpoint_every_steps=0"]
    process = start(overrides, tmp_path)
    while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    step = newest(tmp_path)
    assert 0 < step < STEPS
    assert f"stopped by {number.name} at step {step} of {STEPS}" in " ".join(errors.split())
    process = start(overrides, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert final(overrides, tmp_path) == final(overrides, reference)


def test_saving_within_epochs_leaves_the_result_bitwise_identical(uninterrupted, tmp_path):
    overrides, reference = uninterrupted
    train(
        configs.load_config("demo:32", [*overrides, "train.checkpoint_every_steps=5", "data.num_threads=3"]), tmp_path
    )
    assert final(overrides, tmp_path) == final(overrides, reference)
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == STEPS
