"""Several processes train as one: the same numbers, one writer, one end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import finish, free_port, start

from cxrjax import config as configs
from cxrjax.errors import InterruptedRunError
from cxrjax.inference.load_run import open_run, predict
from cxrjax.metrics.predictions import Predictions
from cxrjax.runs.evaluate_run import evaluate_run
from cxrjax.train.loop import train
from cxrjax.train.monitoring import read_metrics
from tfds_builders.prepare import prepare

OPTIONS = ("mesh.data=4", "train.batch=8", "augment.rotation=20", "optimizer.name=sgd",
           "optimizer.rate=0.05", "train.watch=val_loss", "train.epochs=2")  # fmt: skip


def launch(overrides, directory: Path, processes: int, *, differing: str = "") -> list[subprocess.Popen]:
    """Processes that train; the last may have one more override."""
    words = ["train", "--config", "demo:32", "--workdir", str(directory), *(f"--config.{word}" for word in overrides)]
    return start(words, processes, last=[f"--config.{differing}"] if differing else [])


def same_metrics(one: Path, other: Path) -> None:
    rows, expected = (read_metrics(directory / "metrics.jsonl") for directory in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name in wanted:
            if name not in ("seconds", "data_wait"):
                # Rounding turns a sign before a ReLU now and then, and a rank among 15 images.
                close = {"train_gradient_norm": 1e-2, "val_auroc": 2e-2}.get(name, 1e-4)
                np.testing.assert_allclose(row[name], wanted[name], rtol=close, err_msg=f"{name} at {row['step']}")


def last_checkpoint(directory: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    names = [folder.name for folder in (directory / "checkpoints" / "last").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def until_it_trains(directory: Path, processes: list[subprocess.Popen], *, saved: bool = False) -> None:
    """Wait for the first metrics or, with `saved`, for the first whole checkpoint."""
    file = directory / "metrics.jsonl"
    while not (last_checkpoint(directory) if saved else file.exists() and read_metrics(file)):
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tiny_overrides, tmp_path_factory):
    """The same run in one process of four devices, and its overrides."""
    overrides, directory = [*tiny_overrides, *OPTIONS], tmp_path_factory.mktemp("alone")
    train(configs.load("demo:32", overrides), directory)
    return overrides, directory


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_reach_the_numbers_of_one(alone, tmp_path, processes):
    overrides, reference = alone
    for code, errors in finish(launch(overrides, tmp_path, processes)):
        assert code == 0, errors
    same_metrics(tmp_path, reference)
    ours, wanted = (open_run(directory)[1] for directory in (tmp_path, reference))
    for name, wanted_values in wanted.params["conv0"].items():
        off = np.linalg.norm(ours.params["conv0"][name] - wanted_values) / np.linalg.norm(wanted_values)
        assert off < 1e-3


def test_processes_evaluate_as_one_and_the_first_writes(alone):
    _, directory = alone
    evaluate_run(directory, resamples=20, mesh=(1, 1))
    written = {name: directory / "predictions" / f"test.{name}" for name in ("parquet", "json")}
    wanted = Predictions.read(written["parquet"])
    for file in written.values():
        file.unlink()
    words = ["evaluate", str(directory), "--resamples", "20", "--mesh", "data=2,space=2", "--json", "-"]
    started = start(words, 2)
    (printed, said), (nothing, _) = (process.communicate(timeout=240) for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    found = Predictions.read(written["parquet"])
    assert found.id.tolist() == wanted.id.tolist()
    np.testing.assert_allclose(found.logit, wanted.logit, rtol=1e-4, atol=1e-5)
    assert json.loads(printed) == json.loads(written["json"].read_text())
    assert nothing == ""


@pytest.mark.slow
def test_one_is_killed_the_others_stop_and_one_process_goes_on(alone, tmp_path):
    overrides = [*alone[0], "optimizer.schedule=constant", "optimizer.warmup=0"]  # more epochs are then the same run
    processes = launch([*overrides, "train.epochs=400", "train.save_every=2"], tmp_path, 2)
    until_it_trains(tmp_path, processes, saved=True)
    processes[1].kill()
    start = time.monotonic()
    (code, errors), _ = finish(processes)
    assert time.monotonic() - start < 30  # before JAX would have noticed
    assert code == 1, errors
    assert "another process" in errors
    saved = last_checkpoint(tmp_path)
    before = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["step"] <= saved]
    assert before
    epochs = saved // 4 + 2
    other = [*overrides, "mesh.data=2", "mesh.space=2", f"train.epochs={epochs}"]
    train(configs.load("demo:32", other), tmp_path)
    after = read_metrics(tmp_path / "metrics.jsonl")
    assert after[: len(before)] == before  # with their seconds: none of those steps was done again
    assert after[-1]["step"] == 4 * epochs


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_saves_it(alone, tmp_path):
    overrides, _ = alone
    processes = launch([*overrides, "train.epochs=400"], tmp_path, 2)
    until_it_trains(tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    steps = {errors.partition("at step ")[2].partition(" ")[0] for _, errors in ended}
    assert len(steps) == 1
    assert (tmp_path / "checkpoints" / "last" / steps.pop()).is_dir()


SLOW_VALIDATION = """
import os, signal, sys, time
from cxrjax.cli.main import entry
from cxrjax.train import loop

original, validations = loop.logits_of, []

def logits_of(*given, advance, **more):
    def slowly(images):
        time.sleep(1)
        advance(images)

    validations.append(1)
    if len(validations) == 2 and sys.argv[-1] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*given, advance=slowly if len(validations) == 2 else advance, **more)

loop.logits_of = logits_of
entry()
"""


@pytest.mark.slow
def test_a_signal_in_validation_stops_all_before_it_is_done(alone, tmp_path):
    overrides = [*alone[0], "train.epochs=4", "evaluate.batch=1"]
    words = ["train", "--config", "demo:32", "--workdir", str(tmp_path), *(f"--config.{word}" for word in overrides)]
    ended = finish(start(words, 2, program=["-c", SLOW_VALIDATION]))
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert all("stopped by SIGTERM at step 8 of 16" in errors for _, errors in ended), ended
    assert last_checkpoint(tmp_path) == 8
    validated = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    assert validated == [4]


def test_a_signal_stops_the_predicting_of_a_study(alone, monkeypatch):
    experiment, network, _ = open_run(alone[1])
    monkeypatch.setattr("cxrjax.inference.load_run.preemption_requested", lambda: [int(signal.SIGTERM)])
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM: the same command goes on") as stopped:
        predict(experiment, network, "test")
    assert stopped.value.number == signal.SIGTERM


def test_processes_that_evaluate_otherwise_are_refused(alone):
    words = ["evaluate", str(alone[1]), "--resamples", "20", "--mesh", "data=2,space=2"]
    for code, errors in finish(start(words, 2, last=["--batch-size", "4"])):
        assert code == 1
        assert "do not have the same run, data, part, mesh and batch: 1 of 2 differ from process 0" in errors


def test_processes_with_other_configs_are_refused(alone, tmp_path):
    overrides, _ = alone
    ended = finish(launch(overrides, tmp_path, 2, differing="optimizer.rate=0.5"), timeout=240)
    for code, errors in ended:
        assert code == 1
        assert "the processes do not have the same config: 1 of 2 differ from process 0" in errors
        assert "(optimizer.rate is 0.05 there and 0.5 in process 1)" in errors
    assert not (tmp_path / "config.json").exists()


def test_processes_with_other_data_are_refused(alone, tmp_path):
    overrides, _ = alone
    prepare("cxr_phantom", data_dir=tmp_path / "other", size=32, patients=40)
    ended = finish(launch(overrides, tmp_path / "run", 2, differing=f"data.dir={tmp_path / 'other'}"), timeout=240)
    for code, errors in ended:
        assert code == 1
        assert "the processes do not have the same data and split: 1 of 2 differ from process 0" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_directories_are_refused(alone, tmp_path):
    overrides, _ = alone
    words = ["train", "--config", "demo:32", *(f"--config.{word}" for word in overrides)]
    started = start([*words, "--workdir", str(tmp_path / "a")], 2, last=["--workdir", str(tmp_path / "b")])
    for code, errors in finish(started, timeout=240):
        assert code == 1
        assert f"process 1 has another directory than process 0, here it is {tmp_path}/" in errors
    assert not list(tmp_path.iterdir())


def test_a_mesh_without_devices_of_a_process_is_refused(alone, tmp_path):
    overrides, _ = alone
    for code, errors in finish(launch([*overrides, "mesh.data=2"], tmp_path / "run", 2), timeout=120):
        assert code == 1
        assert "does not give each of the 2 processes the same share of a batch" in errors
    assert not (tmp_path / "run").exists()


def test_what_the_first_refuses_all_refuse(alone, tmp_path):
    overrides, _ = alone
    (tmp_path / "checkpoints" / "last" / "4").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    ended = finish(launch(overrides, tmp_path, 2), timeout=120)
    assert [code for code, _ in ended] == [1, 1], ended
    said = {errors.partition("cxrjax: ")[2] for _, errors in ended}
    assert len(said) == 1
    assert str(tmp_path) in said.pop()


def test_a_coordinator_that_is_not_there_is_named(tmp_path, tiny_overrides):
    words = ["train", "--config", "demo:32", "--workdir", str(tmp_path), "--coordinator", f"localhost:{free_port()}"]
    words += ["--processes", "2", "--process", "1", "--join-timeout", "3"]
    ended = subprocess.run(
        [sys.executable, "-m", "cxrjax.cli.main", *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert "could not reach process 0 at localhost:" in " ".join(ended.stderr.split())


def told_by_slurm(process: int) -> dict[str, str]:
    """The environment of one of two processes; JAX takes a port of 61440 or more, by the job."""
    words = {"JOB_ID": str(os.getpid()), "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(process),
             "LOCALID": "0", "STEP_NUM_NODES": "1"}  # fmt: skip
    return os.environ | {f"SLURM_{name}": value for name, value in words.items()}


def test_processes_that_slurm_started_find_each_other():
    program = (
        "import jax; from cxrjax.parallel import runtime as r; r.start('auto'); print(r.first(), jax.process_count())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=told_by_slurm(number), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in started]
    assert [printed.splitlines()[-1] for printed, _ in ended] == ["True 2", "False 2"], ended


@pytest.mark.parametrize(("process", "said"), [(0, "process 1 of 2 did not come to localhost:"),
                                               (1, "could not reach process 0 at localhost:")])  # fmt: skip
def test_who_does_not_come_is_named_where_the_cluster_gives_the_numbers(tmp_path, process, said):
    words = ["train", "--config", "demo:32", "--workdir", str(tmp_path), "--coordinator", "auto", "--join-timeout", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", "cxrjax.cli.main", *words],
        env=told_by_slurm(process),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert said in " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "2"], "need --coordinator"),
        (["--coordinator", "here"], "neither HOST:PORT, with a port from 1 to 65535, nor auto"),
        (["--coordinator", "here:99999"], "neither HOST:PORT, with a port from 1 to 65535, nor auto"),
        (["--coordinator", "here:0"], "neither HOST:PORT, with a port from 1 to 65535, nor auto"),
        (["--coordinator", "a:1", "--processes", "2"], "needs --processes N and --process K"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "K from 0 to N - 1"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path, capsys, words, said):
    from cxrjax.cli.main import main

    assert main(["train", "--config", "demo:32", "--workdir", str(tmp_path), *words]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
