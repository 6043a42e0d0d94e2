"""Several processes of the command line on one machine."""

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
    words: list[str], processes: int, last: Sequence[str] = (), program: Sequence[str] = ("-m", "cxrjax.cli.main")
) -> list[subprocess.Popen]:
    """As many processes of the command line, sharing four devices; the last may have more words."""
    devices, coordinator = 4 // processes, f"localhost:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for number in range(processes):
        joining = ["--coordinator", coordinator, "--processes", str(processes), "--process", str(number)]
        started.append(
            subprocess.Popen(
                [sys.executable, *program, *words, *joining, *(last if number == processes - 1 else ())],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return started


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and standard error of each; none outlives this."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, " ".join(text.split())) for process, text in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
