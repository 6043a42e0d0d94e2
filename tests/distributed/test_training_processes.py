"""A distributed run trains as one process does: the same numbers, one writer, one end."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import finish, start

from cxrjax import config as configs
from cxrjax.errors import InterruptedRunError
from cxrjax.inference.load_run import load_run, predict
from cxrjax.metrics.predictions import Predictions
from cxrjax.runs.evaluate_run import evaluate_run
from cxrjax.train.loop import train
from cxrjax.train.monitoring import read_metrics
from tfds_builders.prepare import prepare

OPTIONS = ("mesh.data=4", "train.batch_size=8", "augment.rotation=20", "optimizer.name=sgd",
           "optimizer.learning_rate=0.05", "train.monitor=val_loss", "train.epochs=2")  # fmt: skip


SHORT_HEARTBEAT = """
from cxrjax.distributed import runtime
from cxrjax.cli.main import entry

runtime.HEARTBEAT = 20
entry()
"""


def launch(overrides, directory: Path, processes: int, *, last: str = "") -> list[subprocess.Popen]:
    """Start a distributed training run; the last process gets one more override."""
    arguments = ["train", "--config", "demo:32", "--workdir", str(directory), *(f"--config.{key}" for key in overrides)]
    return start(arguments, processes, last=[f"--config.{last}"] if last else [], program=["-c", SHORT_HEARTBEAT])


def assert_same_metrics(directory: Path, reference: Path) -> None:
    rows, expected_rows = (read_metrics(run / "metrics.jsonl") for run in (directory, reference))
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        for name in expected:
            if name not in ("seconds", "data_wait_fraction"):
                # Rounding sometimes flips a sign before a ReLU, and a rank among 15 images.
                rtol = {"train_gradient_norm": 1e-2, "val_auroc": 2e-2}.get(name, 1e-4)
                np.testing.assert_allclose(row[name], expected[name], rtol=rtol, err_msg=f"{name} at {row['step']}")


def last_checkpoint(directory: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    names = [folder.name for folder in (directory / "checkpoints" / "last").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for_training(directory: Path, processes: list[subprocess.Popen], *, checkpoint: bool = False) -> None:
    """Wait for the first metrics or, with `checkpoint`, for the first complete checkpoint."""
    file = directory / "metrics.jsonl"
    while not (last_checkpoint(directory) if checkpoint else file.exists() and read_metrics(file)):
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def single_process(tiny_overrides, tmp_path_factory):
    """The overrides and the directory of the same run in one process with four devices."""
    overrides, directory = [*tiny_overrides, *OPTIONS], tmp_path_factory.mktemp("single")
    train(configs.load_config("demo:32", overrides), directory)
    return overrides, directory


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_reach_the_numbers_of_one(single_process, tmp_path, processes):
    overrides, reference = single_process
    for code, errors in finish(launch(overrides, tmp_path, processes)):
        assert code == 0, errors
    assert_same_metrics(tmp_path, reference)
    network, expected = (load_run(directory)[1] for directory in (tmp_path, reference))
    for name, values in expected.params["conv0"].items():
        error = np.linalg.norm(network.params["conv0"][name] - values) / np.linalg.norm(values)
        assert error < 1e-3


def test_processes_evaluate_as_one_and_the_main_process_writes(single_process):
    _, directory = single_process
    evaluate_run(directory, resamples=20, mesh=(1, 1))
    files = {name: directory / "predictions" / f"test.{name}" for name in ("parquet", "json")}
    expected = Predictions.read(files["parquet"])
    for file in files.values():
        file.unlink()
    arguments = ["evaluate", str(directory), "--resamples", "20", "--mesh", "data=2,space=2", "--json", "-"]
    processes = start(arguments, 2)
    (printed, errors), (nothing, _) = (process.communicate(timeout=240) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    predictions = Predictions.read(files["parquet"])
    assert predictions.id.tolist() == expected.id.tolist()
    np.testing.assert_allclose(predictions.logit, expected.logit, rtol=1e-4, atol=1e-5)
    assert json.loads(printed) == json.loads(files["json"].read_text())
    assert nothing == ""


@pytest.mark.slow
def test_one_is_killed_the_others_stop_and_one_process_resumes(single_process, tmp_path):
    # A constant rate: the first steps are then the same for any number of epochs.
    overrides = [*single_process[0], "optimizer.schedule=constant", "optimizer.warmup_fraction=0"]
    processes = launch([*overrides, "train.epochs=400", "train.checkpoint_every_steps=2"], tmp_path, 2)
    wait_for_training(tmp_path, processes, checkpoint=True)
    processes[1].kill()
    (code, errors), _ = finish(processes, timeout=60)
    # Its collective fails, or JAX misses the heartbeat while the process waits for the other in Orbax.
    assert code in (1, -signal.SIGABRT), errors
    assert "another process stopped or cannot be reached" in errors or "stopped sending heartbeats" in errors
    saved = last_checkpoint(tmp_path)
    before = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["step"] <= saved]
    assert before
    epochs = saved // 4 + 2
    other = [*overrides, "mesh.data=2", "mesh.space=2", f"train.epochs={epochs}"]
    train(configs.load_config("demo:32", other), tmp_path)
    after = read_metrics(tmp_path / "metrics.jsonl")
    assert after[: len(before)] == before  # including the seconds: none of these steps ran again
    assert after[-1]["step"] == 4 * epochs


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_saves_it(single_process, tmp_path):
    overrides, _ = single_process
    processes = launch([*overrides, "train.epochs=400"], tmp_path, 2)
    wait_for_training(tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes)
    assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    steps = {errors.partition("at step ")[2].partition(" ")[0] for _, errors in ends}
    assert len(steps) == 1
    assert (tmp_path / "checkpoints" / "last" / steps.pop()).is_dir()


SLOW_VALIDATION = """
import os, signal, sys, time
from cxrjax.cli.main import entry
from cxrjax.train import loop

original, validations = loop.predict_logits, []

def predict_logits(*args, advance, **kwargs):
    def slowly(images):
        time.sleep(1)
        advance(images)

    validations.append(1)
    if len(validations) == 2 and sys.argv[-1] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, advance=slowly if len(validations) == 2 else advance, **kwargs)

loop.predict_logits = predict_logits
entry()
"""


@pytest.mark.slow
def test_a_signal_during_validation_stops_all_before_its_end(single_process, tmp_path):
    overrides = [*single_process[0], "train.epochs=4", "evaluate.batch_size=1"]
    arguments = ["train", "--config", "demo:32", "--workdir", str(tmp_path), *(f"--config.{key}" for key in overrides)]
    ends = finish(start(arguments, 2, program=["-c", SLOW_VALIDATION]))
    assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    assert all("stopped by SIGTERM at step 8 of 16" in errors for _, errors in ends), ends
    assert last_checkpoint(tmp_path) == 8
    validated = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    assert validated == [4]


def test_a_signal_stops_the_predictions_of_a_study(single_process, monkeypatch):
    experiment, network, _ = load_run(single_process[1])
    monkeypatch.setattr("cxrjax.inference.load_run.preemption_requested", lambda: [int(signal.SIGTERM)])
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM") as stopped:
        predict(experiment, network, "test")
    assert stopped.value.number == signal.SIGTERM


def test_processes_that_evaluate_differently_are_refused(single_process):
    arguments = ["evaluate", str(single_process[1]), "--resamples", "20", "--mesh", "data=2,space=2"]
    for code, errors in finish(start(arguments, 2, last=["--batch-size", "4"])):
        assert code == 1
        assert "do not have the same run, data, split, mesh and batch size: 1 of 2 differ from process 0" in errors


def test_processes_with_different_configs_are_refused(single_process, tmp_path):
    overrides, _ = single_process
    ends = finish(launch(overrides, tmp_path, 2, last="optimizer.learning_rate=0.5"), timeout=240)
    for code, errors in ends:
        assert code == 1
        assert "the processes do not have the same config: 1 of 2 differ from process 0" in errors
        assert "(optimizer.learning_rate is 0.05 in process 0 and 0.5 in process 1)" in errors
    assert not (tmp_path / "config.json").exists()


def test_processes_with_different_data_are_refused(single_process, tmp_path):
    overrides, _ = single_process
    prepare("cxr_phantom", data_dir=tmp_path / "other", size=32, patients=40)
    ends = finish(launch(overrides, tmp_path / "run", 2, last=f"data.data_dir={tmp_path / 'other'}"), timeout=240)
    for code, errors in ends:
        assert code == 1
        assert "the processes do not have the same data and split: 1 of 2 differ from process 0" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_different_directories_are_refused(single_process, tmp_path):
    overrides, _ = single_process
    arguments = ["train", "--config", "demo:32", *(f"--config.{key}" for key in overrides)]
    processes = start([*arguments, "--workdir", str(tmp_path / "a")], 2, last=["--workdir", str(tmp_path / "b")])
    for code, errors in finish(processes, timeout=240):
        assert code == 1
        assert f"process 1 does not see the directory of process 0, here {tmp_path}/" in errors
    assert not list(tmp_path.iterdir())


def test_a_mesh_without_devices_of_a_process_is_refused(single_process, tmp_path):
    overrides, _ = single_process
    for code, errors in finish(launch([*overrides, "mesh.data=2"], tmp_path / "run", 2), timeout=120):
        assert code == 1
        assert "does not give each of the 2 processes the same share of a batch" in errors
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_main_process_is_the_error_of_all(single_process, tmp_path):
    overrides, _ = single_process
    (tmp_path / "checkpoints" / "last" / "4").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    ends = finish(launch(overrides, tmp_path, 2), timeout=120)
    assert [code for code, _ in ends] == [1, 1], ends
    messages = {errors.partition("cxrjax: ")[2] for _, errors in ends}
    assert len(messages) == 1
    assert str(tmp_path) in messages.pop()
