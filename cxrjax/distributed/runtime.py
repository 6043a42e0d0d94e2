"""Runs of several processes on JAX's distributed runtime, and the cache of compiled programs.

JAX connects the processes, ends all of them if one is lost, and lets them stop at the same step. This module adds
checks that all processes do the same work, and calls that only the main process (process 0) runs.
"""

import hashlib
import itertools
import json
import os
import re
import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cxrjax.console import log
from cxrjax.errors import CxrError

HEARTBEAT = 60
"""Seconds without a heartbeat after which JAX counts a process as lost and ends the others."""

SHUTDOWN = 30
"""Seconds for which a process that finished waits for the others."""

SHUTDOWN_AFTER_ERROR = 5
"""Seconds for which a process that failed waits for the others; the main process waits twice as long."""

VISIBLE = 15
"""Seconds within which a new file must be visible to all processes; network file systems show new files late."""

_PREEMPTION_SERVICE = "jax_enable_preemption_service"
_MAIN_PROCESS_ONLY: ContextVar[bool] = ContextVar("main_process_only", default=False)
_SYNC_POINTS = itertools.count()  # numbers the calls of `preemption_requested`, equally in all processes
_INTERRUPTS: list[int] = []  # SIGINT, if this process of a distributed run received it

Result = TypeVar("Result")


def start(
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
    preemption: bool = True,
) -> None:
    """Connect this process to the others with `jax.distributed.initialize`; do nothing without a coordinator.

    If the others cannot be reached in time, JAX aborts the process (SIGABRT) instead of raising an error.

    Args:
      coordinator: HOST:PORT of process 0, or "auto" to let JAX detect the cluster (SLURM, Open MPI, Kubernetes, TPU).
      processes: number of processes; not with "auto".
      process: index of this process, from 0; not with "auto".
      timeout: seconds to wait for the other processes.
      preemption: whether the program polls `preemption_requested`. SIGTERM to one process then stops all of them;
        otherwise it ends that process at once.

    Raises:
      CxrError: invalid arguments, or no cluster was detected.
    """
    if not coordinator:
        if processes is not None or process is not None:
            raise CxrError("--processes and --process need --coordinator HOST:PORT, the address of process 0")
        return
    addresses: tuple[Any, ...] = ()
    if coordinator != "auto":
        port = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
        if port is None or not 0 < int(port[1]) < 1 << 16:
            raise CxrError(f"--coordinator {coordinator} must be auto or HOST:PORT, with a port from 1 to 65535")
        if processes is None or process is None or not 0 <= process < processes:
            raise CxrError(
                f"--coordinator {coordinator} needs --processes N and --process K with K from 0 to N - 1, "
                f"not {processes} and {process}"
            )
        addresses = coordinator, processes, process
    log(f"connecting to the other processes (--coordinator {coordinator}), waiting up to {timeout} s for all of them")
    jax.config.update(_PREEMPTION_SERVICE, preemption)
    try:
        jax.distributed.initialize(
            *addresses,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise CxrError(
            f"--coordinator {coordinator} does not connect the processes ({_one_line(error)}): start them with srun, "
            "mpirun, in a JobSet or on a TPU pod, or give --coordinator HOST:PORT, --processes N and --process K"
        ) from error
    multihost_utils.sync_global_devices("started")  # JAX waits only briefly for a process that comes later


def shutdown() -> None:
    """Leave the other processes before exiting after an error.

    Waits a few seconds for them to do the same: when the main process exits, JAX aborts all that still run.
    """
    if not jax.distributed.is_initialized():
        return

    def leave() -> None:
        with suppress(RuntimeError):
            jax.distributed.shutdown()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    with suppress(KeyboardInterrupt):
        thread.join(SHUTDOWN_AFTER_ERROR * (2 if is_main_process() else 1))


def is_distributed() -> bool:
    """Return whether other processes take part; False inside `on_main_process`."""
    return jax.process_count() > 1 and not main_process_only()


def main_process_only() -> bool:
    """Return whether this is called inside `on_main_process`, while the other processes wait."""
    return _MAIN_PROCESS_ONLY.get()


def is_main_process() -> bool:
    """Return whether this is process 0, which writes the files of a run."""
    return jax.process_index() == 0


def devices() -> list[Any]:
    """Return the devices of all processes; inside `on_main_process` those of this process."""
    return jax.local_devices() if main_process_only() else jax.devices()


def on_main_process(action: Callable[[], Result]) -> Result | None:
    """Call `action` in the main process, on its own devices, while the others wait.

    Returns:
      The result of the action in the main process, None in the others.

    Raises:
      CxrError: in all processes, if the action raised it.
    """
    if not is_distributed():
        return action()
    result, message = None, ""
    if is_main_process():
        token = _MAIN_PROCESS_ONLY.set(True)
        try:
            result = action()
        except CxrError as error:
            message = str(error)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(str(error)) from error  # of its own devices: no other process was lost
        finally:
            _MAIN_PROCESS_ONLY.reset(token)
    if message := _allgather_text(message)[0]:
        raise CxrError(message)
    return result


def broadcast_from_main(question: Callable[[], bool]) -> bool:
    """Return the answer of the main process in all processes, which may see files at different times."""
    answer = on_main_process(question)
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer))) if is_distributed() else bool(answer)


def check_consistent(what: str, value: Any) -> None:
    """Check that all processes have the same value.

    Args:
      what: name of the value, for the error.
      value: anything that can be written as JSON.

    Raises:
      CxrError: in all processes, with the numbers of those that differ from process 0.
    """
    if not is_distributed():
        return
    text = json.dumps(value, sort_keys=True, default=str)
    digests = _allgather_text(hashlib.sha256(text.encode()).hexdigest())
    differing = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        texts = _allgather_text(text)
        raise CxrError(
            f"the processes do not have the same {what}: {', '.join(map(str, differing))} of {len(digests)} differ "
            f"from process 0{_first_difference(texts[0], texts[differing[0]], differing[0])}; run the same command on "
            "the same files in all of them"
        )


def _first_difference(main: str, other: str, process: int) -> str:
    """Return the first key in which two JSON objects differ, with both values; empty for other JSON values."""
    ours, theirs = json.loads(main), json.loads(other)
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    key, *more = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    values = f"{key} is {ours.get(key)} in process 0 and {theirs.get(key)} in process {process}"
    return f" ({values}{f', and {len(more)} more' if more else ''})"


def check_shared_directory(directory: Path) -> None:
    """Check that all processes see the same directory, since each writes its part of a checkpoint there.

    Creates the directory.

    Raises:
      CxrError: in all processes, with the numbers of those that see another directory.
    """
    if not is_distributed():
        return
    probe = directory / f".shared-{_allgather_text(secrets.token_hex(8))[0]}"

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()

    on_main_process(write)
    deadline = time.monotonic() + VISIBLE
    while not (visible := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    others = np.flatnonzero(~np.asarray(multihost_utils.process_allgather(np.bool_(visible))))
    if is_main_process():
        probe.unlink()
    if others.size:
        if is_main_process():
            with suppress(OSError):  # it has other files
                directory.rmdir()
        raise CxrError(
            f"process {', '.join(map(str, others))} does not see the directory of process 0, here {directory}: give "
            "all processes the same directory on a shared file system"
        )


def _allgather_text(text: str) -> list[str]:
    """Return the texts of all processes."""
    encoded = text.encode()
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(encoded)))).reshape(-1)
    if not lengths.any():
        return [""] * len(lengths)
    padded = np.frombuffer(encoded.ljust(int(lengths.max()), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8).reshape(len(lengths), -1)
    return [row.tobytes()[:length].decode() for row, length in zip(rows, lengths, strict=True)]


def peer_lost_error(error: Exception, resume: str = "finished work is kept") -> CxrError:
    """Return the error of a process whose collective failed.

    Args:
      error: what JAX raised.
      resume: what happens when the run is started again.
    """
    return CxrError(
        f"another process stopped or cannot be reached ({_one_line(error)}); start all processes again, with any "
        f"number of them: {resume}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def preemption_requested() -> list[int]:
    """Return the signal that stops all processes at this step, or an empty list to continue.

    All processes must call it equally often, before each step or batch: JAX's preemption service then chooses one of
    these calls at which all of them stop, whichever process received the signal.
    """
    if not is_distributed() or not getattr(jax.config, _PREEMPTION_SERVICE):
        return []
    if not multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS)):
        return []
    return [*_INTERRUPTS, int(signal.SIGTERM)]


def collect_signals() -> AbstractContextManager[list[int]]:
    """Collect SIGTERM and SIGINT in the returned list instead of ending the process; a second signal ends it.

    In a distributed run the list stays empty, and `preemption_requested` returns the signals.
    """
    return _preempt_on_interrupt() if is_distributed() else _collect_own_signals()


@contextmanager
def _preempt_on_interrupt() -> Iterator[list[int]]:
    """Turn the first SIGINT into a SIGTERM, on which JAX's preemption service stops all processes.

    Raises:
      KeyboardInterrupt: on leaving, if the signal came too late for a common step.
    """

    def forward(number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        _INTERRUPTS.append(number)
        signal.raise_signal(signal.SIGTERM)

    _INTERRUPTS.clear()
    previous = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # not in the main thread: the caller handles signals
        signal.signal(signal.SIGINT, forward)
    try:
        yield []
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, previous)
    if _INTERRUPTS:
        raise KeyboardInterrupt


@contextmanager
def _collect_own_signals() -> Iterator[list[int]]:
    received: list[int] = []
    previous: dict[int, Any] = {}

    def collect(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    with suppress(ValueError):  # not in the main thread: the caller handles signals
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, collect)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def enable_compilation_cache(directory: Path) -> None:
    """Keep compiled programs in `directory` and reuse those that are there; processes may share it.

    JAX_COMPILATION_CACHE_DIR takes precedence, and JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
    """
    settings: Any = jax.config  # its attributes are not known to a type checker
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # start-up compiles many small programs
    # An entry that is truncated, or that a full disk refused, is compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
