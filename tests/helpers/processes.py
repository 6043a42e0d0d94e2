"""Runs the command line in several processes on one machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    arguments: Sequence[str],
    processes: int,
    last: Sequence[str] = (),
    program: Sequence[str] = ("-m", "cxrjax.cli.main"),
) -> list[subprocess.Popen]:
    """Start a distributed run whose processes share four devices; the last one also gets the arguments `last`."""
    devices, coordinator = 4 // processes, f"localhost:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for process in range(processes):
        joining = ["--coordinator", coordinator, "--processes", str(processes), "--process", str(process)]
        started.append(
            subprocess.Popen(
                [sys.executable, *program, *arguments, *joining, *(last if process == processes - 1 else ())],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return started


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """Wait for the processes; return the exit code and the standard error, on one line, of each. Kills what is left."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, " ".join(text.split())) for process, text in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
