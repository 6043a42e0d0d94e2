"""What a run leaves behind when it is told to stop, or when an image cannot be read: nothing but its checkpoint."""

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
    """The command line in a session of its own, so that whatever it leaves can be found."""
    return subprocess.Popen(
        [sys.executable, "-m", "cxrjax.cli.main", "train", "--config", "demo:32", "--workdir", str(directory),
         *(f"--config.{word}" for word in overrides)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def of_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = place.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(place.parent.name))
    return found


def until_it_trains(directory: Path, process: subprocess.Popen[str], patience: float = 300) -> None:
    until = time.monotonic() + patience
    while not ((directory / "metrics.jsonl").exists() and read_metrics(directory / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "nothing was logged"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_leaves_no_process_and_no_shared_memory(number, tiny_overrides, tmp_path):
    run = tmp_path / "run"
    words = ["data.threads=2", "train.epochs=500", "train.steps_per_epoch=50", "augment.rotation=10"]
    process = start([*tiny_overrides, *words], run)
    try:
        until_it_trains(run, process)
        assert of_session(process.pid) == [process.pid]  # threads load, no process does
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        assert not [line for line in maps if "/dev/shm" in line and not line.endswith("(deleted)")]  # nothing to leave
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number, errors
    [line] = [line for line in errors.splitlines() if "stopped by" in line]
    assert signal.Signals(number).name in line
    assert of_session(process.pid) == []
    assert (run / "checkpoints" / "last").is_dir()


def test_a_damaged_shard_ends_the_run_in_one_line_that_names_the_record(tiny_overrides, phantom_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_data, data)
    shards = sorted((data / "cxr_phantom" / "32").glob("*/*.array_record-*"))
    for shard in shards:
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 3 : len(raw) // 2] = os.urandom(len(raw) // 2 - len(raw) // 3)
        shard.write_bytes(raw)
    process = start([*tiny_overrides, f"data.dir={data}"], tmp_path / "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    [line] = [line for line in errors.splitlines() if line.startswith("cxrjax: ")]
    assert "record " in line
    assert "cannot be read" in line
    assert line.endswith("makes only what is damaged anew")
    assert "Traceback" not in errors
    assert of_session(process.pid) == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_one_of_several_is_a_sigterm_and_not_lost_where_no_step_is_left(times):
    got, steps = [], []
    handlers = {signal.SIGTERM: lambda number, _: got.append(number), signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def work():
        with _preempt_on_interrupt():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)  # a second one acts at once
                steps.append(list(got))

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        with _preempt_on_interrupt():  # of the next run
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert steps == [[signal.SIGTERM]]
    assert got == [signal.SIGTERM]
