"""A run stopped by a signal or an unreadable image leaves only its checkpoint: no process, no shared memory."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxrjax.distributed.runtime import _preempt_on_interrupt
from cxrjax.train.monitoring import read_metrics


def start(overrides, directory):
    """Start a training run in a new session, so that processes it leaves behind can be found."""
    return subprocess.Popen(
        [sys.executable, "-m", "cxrjax.cli.main", "train", "--config", "demo:32", "--workdir", str(directory),
         *(f"--config.{key}" for key in overrides)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def running_processes(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    processes = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = file.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            processes.append(int(file.parent.name))
    return processes


def wait_for_training(directory: Path, process: subprocess.Popen[str], timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not ((directory / "metrics.jsonl").exists() and read_metrics(directory / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing was logged"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_process_and_no_shared_memory(number, tiny_overrides, tmp_path):
    run = tmp_path / "run"
    keys = ["data.num_threads=2", "train.epochs=500", "train.steps_per_epoch=50", "augment.rotation=10"]
    process = start([*tiny_overrides, *keys], run)
    try:
        wait_for_training(run, process)
        assert running_processes(process.pid) == [process.pid]  # loading uses threads, not processes
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        assert not [line for line in maps if "/dev/shm" in line and not line.endswith("(deleted)")]
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number, errors
    [line] = [line for line in errors.splitlines() if "stopped by" in line]
    assert signal.Signals(number).name in line
    assert running_processes(process.pid) == []
    assert (run / "checkpoints" / "last").is_dir()


def test_a_damaged_shard_ends_the_run_with_one_line_that_names_the_record(tiny_overrides, phantom_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_data, data)
    shards = sorted((data / "cxr_phantom" / "32").glob("*/*.array_record-*"))
    for shard in shards:
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 3 : len(raw) // 2] = os.urandom(len(raw) // 2 - len(raw) // 3)
        shard.write_bytes(raw)
    process = start([*tiny_overrides, f"data.data_dir={data}"], tmp_path / "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    [line] = [line for line in errors.splitlines() if line.startswith("cxrjax: ")]
    assert "record " in line
    assert "cannot be read" in line
    assert line.endswith("with --repair, which rebuilds the damaged shards")
    assert "Traceback" not in errors
    assert running_processes(process.pid) == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_distributed_run_becomes_sigterm_and_is_raised_if_no_step_is_left(times):
    received, steps = [], []
    handlers = {signal.SIGTERM: lambda number, _: received.append(number), signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def work():
        with _preempt_on_interrupt():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)  # the second one is raised
                steps.append(list(received))

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        with _preempt_on_interrupt():  # the next run starts without it
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert steps == [[signal.SIGTERM]]
    assert received == [signal.SIGTERM]
