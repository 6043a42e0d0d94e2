"""Distributed runs start, fail and stop together on JAX's runtime; compiled programs are cached."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from processes import finish, free_port, start

from cxrjax.cli.main import main
from cxrjax.distributed import runtime

PROGRAM = """
import os, signal, sys, time
from cxrjax.cli import main, train
from cxrjax.distributed import runtime
from cxrjax.errors import CxrError, InterruptedRunError

runtime.HEARTBEAT = 10

def run(arguments):
    process = arguments.process
    runtime.start(arguments.coordinator, arguments.processes, process, preemption={preemption})
    {work}

train.run = run
main.entry()
"""
ABORTED = "Terminating process because the JAX distributed service detected fatal errors"


def run_two(work: str, *, preemption: bool = True) -> list[tuple[int, str]]:
    """Run lines of Python as the command of two processes; return how each ends."""
    program = PROGRAM.format(work=work, preemption=preemption)
    arguments = ["train", "--config", "demo", "--workdir", "."]
    return finish(start(arguments, 2, program=["-c", program]), timeout=120)


def test_sigterm_ends_a_process_that_does_not_poll_and_its_heartbeat_ends_the_other():
    work = "os.kill(os.getpid(), signal.SIGTERM) if process else None; time.sleep(600)"
    (code, errors), (killed, _) = run_two(work, preemption=False)
    assert (code, killed) == (-signal.SIGABRT, -signal.SIGTERM), errors
    assert ABORTED in errors
    assert "unhealthy (stopped sending heartbeats)" in errors
    assert runtime.HEARTBEAT <= 60


def test_the_death_of_the_main_process_ends_the_others_at_once():
    started = time.monotonic()
    (killed, _), (code, errors) = run_two("time.sleep(600) if process else os._exit(7)")
    assert (killed, code) == (7, -signal.SIGABRT), errors
    assert ABORTED in errors
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("late", [0, 1])
def test_processes_may_end_at_different_times(late):
    wait = f"time.sleep(2 * (process == {late}))"
    ends = run_two(wait)
    assert [code for code, _ in ends] == [0, 0], ends
    ends = run_two(f"{wait}; raise CxrError('in all of them')")
    assert [(code, "cxrjax: in all of them" in errors) for code, errors in ends] == [(1, True)] * 2, ends
    assert not any(ABORTED in errors for _, errors in ends)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_is_one_line_and_ends_the_other(failing):
    work = f"if process == {failing}: raise CxrError('in one of them')\n    time.sleep(600)"
    ends = run_two(work)
    code, errors = ends.pop(failing)
    assert code == 1, errors
    assert errors.endswith("cxrjax: in one of them")
    assert ends[0][0] == -signal.SIGABRT, ends
    assert ABORTED in ends[0][1]


STEPS = """
    with runtime.collect_signals() as received:
        for step in range(3000):
            received += runtime.preemption_requested()
            if received:
                raise InterruptedRunError(f"at step {step}", received[0])
            if step == 20 and process:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
"""


def test_ctrl_c_in_one_process_stops_all_at_one_step_each_with_its_own_signal():
    ends = run_two(STEPS)
    assert [code for code, _ in ends] == [128 + signal.SIGTERM, 128 + signal.SIGINT], ends
    assert len({re.search("at step ([0-9]+)", errors)[1] for _, errors in ends}) == 1


def slurm_environment(process: int) -> dict[str, str]:
    """The environment of one of two SLURM tasks; JAX derives the port from the job id."""
    variables = {"JOB_ID": str(os.getpid()), "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(process),
                 "LOCALID": "0", "STEP_NUM_NODES": "1"}  # fmt: skip
    return os.environ | {f"SLURM_{name}": value for name, value in variables.items()}


def test_tasks_of_slurm_find_each_other():
    program = (
        "import jax; from cxrjax.distributed import runtime; runtime.start('auto'); "
        "print(f'main: {runtime.is_main_process()} of {jax.process_count()}', flush=True)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=slurm_environment(process), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    ends = [process.communicate(timeout=120) for process in started]
    # Gloo prints to standard output too, at any time.
    assert [re.findall(r"main: \w+ of \d", printed) for printed, _ in ends] == [
        ["main: True of 2"],
        ["main: False of 2"],
    ]


@pytest.mark.parametrize("process", [0, 1])
def test_jax_aborts_a_process_whose_peers_do_not_come(tmp_path, process):
    joining = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process", str(process)]
    ended = subprocess.run(
        [sys.executable, "-m", "cxrjax.cli.main", "train", "--config", "demo:32", "--workdir", str(tmp_path), *joining,
         "--join-timeout", "1"], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGABRT, ended.stderr
    assert f"(--coordinator {joining[1]}), waiting up to 1 s" in ended.stderr
    assert ABORTED in ended.stderr
    assert "DEADLINE_EXCEEDED" in ended.stderr


def test_auto_outside_a_cluster_is_refused():
    program = "from cxrjax.distributed import runtime; runtime.start('auto')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode
    assert "CxrError: --coordinator auto does not connect the processes (coordinator_address" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "need --coordinator"),
        (["--coordinator", "here"], "must be auto or HOST:PORT, with a port from 1 to 65535"),
        (["--coordinator", "here:99999"], "must be auto or HOST:PORT, with a port from 1 to 65535"),
        (["--coordinator", "here:0"], "must be auto or HOST:PORT, with a port from 1 to 65535"),
        (["--coordinator", "a:1", "--processes", "2"], "needs --processes N and --process K"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "K from 0 to N - 1"),
    ],
)
def test_invalid_process_arguments_are_refused(tmp_path, capsys, arguments, message):
    assert main(["train", "--config", "demo:32", "--workdir", str(tmp_path), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


CACHE_SETTINGS = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache",
)  # fmt: skip


@pytest.fixture
def no_cache():
    """Unset the cache directory, as in a shell without JAX_COMPILATION_CACHE_DIR."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.filterwarnings("default")
def test_settings_of_the_user_take_precedence(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    runtime.enable_compilation_cache(tmp_path / "off")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    runtime.enable_compilation_cache(tmp_path / "on")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "on")
    runtime.enable_compilation_cache(tmp_path / "another")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "on")


def test_a_second_start_compiles_nothing(tiny_overrides, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    keys = ("optimizer.schedule=constant", "optimizer.warmup_fraction=0", "train.steps_per_epoch=1")

    def train(epochs):
        overrides = [f"--config.{key}" for key in (*tiny_overrides, *keys, f"train.epochs={epochs}")]
        command = [sys.executable, "-m", "cxrjax.cli.main", "train", "--config", "demo:32", "--workdir", str(tmp_path)]
        ended = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return {file.name for file in (tmp_path / "cache").glob("*-cache")}

    programs = train(1)
    assert {"jit_step", "jit_predict"} <= {name.partition("-")[0] for name in programs}
    assert train(2) == programs
