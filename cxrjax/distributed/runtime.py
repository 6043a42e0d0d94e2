"""Compiled programs, kept from one start to the next."""

import hashlib
import itertools
import json
import os
import re
import secrets
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # says who is process 0 before JAX, which ends the program, looks for it
from jax.experimental import multihost_utils

from cxrjax.console import stderr
from cxrjax.distributed.peers import GRACE, Ending, Watch, listening, meet, reach
from cxrjax.errors import CxrError


def enable_compilation_cache(directory: Path) -> None:
    """Keep what is compiled from here on in `directory`, and take from there what was compiled before.

    Where JAX_COMPILATION_CACHE_DIR names a place, that one is used; JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    Processes may share a directory at the same time.
    """
    settings: Any = jax.config  # a type checker does not know what it has
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # start-up compiles many small ones
    # An entry that a kill cut short, or that a full disk refused, is compiled anew.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


Value = TypeVar("Value")

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
"""Whether the others wait for what this process does with its own devices."""

_WATCHES: list[tuple[Watch, Ending]] = []
"""This process's, where it has others."""

SHARING = 15
"""Seconds in which a file that process 0 wrote must have come to the others."""

HEARTBEAT = 100
"""Seconds without a sign of life after which, or after half of which, JAX ends the others: later than `peers` does."""

SHUTDOWN = 30
"""Seconds that a process which is done waits for the others."""

_INTERRUPTS: list[int] = []
"""Ctrl-C, where it came to this one of several processes."""

_SERVICE = "jax_enable_preemption_service"
"""JAX's setting by which it, and not the system, hears SIGTERM."""

_QUESTIONS = itertools.count()
"""How often the processes asked whether to stop: their numbers for JAX."""


def start(
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
    asks: bool = True,
) -> None:
    """Connect this process to the others.

    Args:
      coordinator: HOST:PORT of process 0; "auto": SLURM, Open MPI or a TPU pod says it, and the numbers too; empty:
        this process is alone.
      processes: how many there are.
      process: which of them this is, from 0.
      timeout: how long to wait for all of them, in seconds.
      asks: whether the work asks `told_to_stop`, where SIGTERM to one then stops all; else it ends that one at once.

    Raises:
      CxrError: numbers that do not fit, no cluster to ask, or a coordinator that cannot be reached in time.
    """
    if not coordinator:
        if processes is not None or process is not None:
            raise CxrError("--processes and --process need --coordinator HOST:PORT, the address of process 0")
        return
    devices = None
    if coordinator == "auto":
        coordinator, processes, process, devices = _asked(timeout)
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise CxrError(
            f"--coordinator {coordinator} is neither HOST:PORT, with a port from 1 to {(1 << 16) - 1}, nor auto"
        )
    if processes is None or process is None or not 0 <= process < processes:
        raise CxrError(
            f"--coordinator {coordinator} needs --processes N and --process K with K from 0 to N - 1, "
            f"not {processes} and {process}"
        )
    stderr.print(f"process {process} of {processes}: joining at {coordinator}, at most {timeout} s")
    meet(host, int(port), processes, process, timeout)
    if process:
        reach(host, int(port), process, timeout).close()
    jax.config.update(_SERVICE, asks)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            devices,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CxrError(
            f"process {process} of {processes} could not join the others at {coordinator} within {timeout} s "
            f"({reason}): check that process 0 runs there and that the port is open"
        ) from error
    multihost_utils.sync_global_devices("joined")  # now: who comes later to their first collective is given up
    _watch(host)


def _asked(timeout: int) -> tuple[str, int | None, int | None, Any]:
    """Process 0's address, how many processes there are, which one this is, and its devices, as the cluster says."""
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    reason = ""
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, None, timeout)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        found, reason = (None,) * 4, f" ({' '.join(str(error).split())[:200]})"
    address, processes, process, devices = found
    if address is None or processes is None:
        raise CxrError(
            f"no cluster was found to ask{reason}: start through srun, mpirun or on a TPU pod, or give "
            "--coordinator HOST:PORT, --processes N and --process K"
        )
    return address, processes, process, devices


def _watch(host: str) -> None:
    """Let all know at once when one ends; `host` is where process 0 is found, for others than process 0."""
    number, processes = jax.process_index(), jax.process_count()
    if processes == 1:
        return
    server = listening(0) if is_main_process() else None
    sent = np.frombuffer(secrets.token_bytes(32) + (server.getsockname()[1] if server else 0).to_bytes(2), np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes()
    key, port = heard[:32], int.from_bytes(heard[32:])
    told = lambda gone: str(peer_lost_error(RuntimeError(f"process {gone} of {processes} ended or hangs")))  # noqa: E731
    ending = Ending(told, lambda: watch.go(5))
    watch = Watch(number, processes, ending.soon)
    if server:
        watch.host(server, key)
    else:
        try:
            watch.join(reach(host, port, number, 10), key)
        except (CxrError, OSError) as error:
            stderr.print(f"{error}; without it, a process that ends is noticed after {HEARTBEAT} s")
    _WATCHES.append((watch, ending))
    multihost_utils.sync_global_devices("watched")  # none ends before all who can have joined


def deregister() -> None:
    """Tell the others that this process has done its part: its end is no loss to them."""
    for watch, _ in _WATCHES:
        watch.leave()


def abort() -> None:
    """Before this process ends at once: let the others end by themselves, or go before it if it is process 0."""
    for watch, ending in _WATCHES:
        ending.prevent()
        watch.go(GRACE + 5)


def is_distributed() -> bool:
    """Whether there are other processes to work with; none within `in_first`."""
    return jax.process_count() > 1 and not main_process_only()


def main_process_only() -> bool:
    """Whether this is within `in_first`, where other processes wait."""
    return _ALONE.get()


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def devices() -> list[Any]:
    """The devices to work with: those of all processes; within `in_first` those of this one."""
    return jax.local_devices() if main_process_only() else jax.devices()


def check_consistent(what: str, value: Any) -> None:
    """Check that all processes have the same value, before they wait for each other in vain.

    Args:
      what: its name, for the error.
      value: anything that JSON takes.

    Raises:
      CxrError: in every process, with the numbers of those that differ from process 0.
    """
    if not is_distributed():
        return
    text = json.dumps(value, sort_keys=True, default=str).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    all_digests = np.asarray(multihost_utils.process_allgather(digest))
    differing = [int(k) for k in np.flatnonzero((all_digests != all_digests[0]).any(1))]
    if differing:
        texts = _gathered(text)
        raise CxrError(
            f"the processes do not have the same {what}: {', '.join(map(str, differing))} of {len(all_digests)} "
            f"differ from process 0{_difference(texts[0], texts[differing[0]], differing[0])}; start all of them with "
            "the same words, on the same files"
        )


def _gathered(text: bytes) -> list[bytes]:
    """The texts of all processes."""
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(int(lengths.max())), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8)
    return [row.tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]


def _difference(first: bytes, other: bytes, number: int) -> str:
    """The first of the keys that differ, of two dicts in JSON; empty for anything else."""
    ours, theirs = json.loads(first), json.loads(other)
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    said = f" ({keys[0]} is {ours.get(keys[0])} there and {theirs.get(keys[0])} in process {number}"
    return said + (f", and {len(keys) - 1} more)" if keys[1:] else ")")


def check_shared_directory(directory: Path) -> None:
    """Check that all processes see one directory: each writes its part of a checkpoint there and waits for the rest.

    Raises:
      CxrError: in every process, with the numbers of those that look elsewhere.
    """
    if not is_distributed():
        return
    sent = np.frombuffer(secrets.token_bytes(8), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8)
    sign = directory / f".shared-{sent.tobytes().hex()}"
    on_main_process(lambda: _put(sign))
    end = time.monotonic() + SHARING
    while not (seen := sign.exists()) and time.monotonic() < end:
        time.sleep(0.1)  # network file systems show new files late
    blind = [str(number) for number in np.flatnonzero(~np.asarray(multihost_utils.process_allgather(np.bool_(seen))))]
    if is_main_process():
        sign.unlink()
    if blind:
        if is_main_process():
            with suppress(OSError):  # it was there before, with something in it
                directory.rmdir()
        raise CxrError(
            f"process {', '.join(blind)} has another directory than process 0, here it is {directory}: give all "
            "of them the same, on a file system that they share"
        )


def _put(sign: Path) -> None:
    sign.parent.mkdir(parents=True, exist_ok=True)
    sign.touch()


def on_main_process(action: Callable[[], Value]) -> Value | None:
    """Do something in process 0 alone, on its own devices; where it raises CxrError, every process does.

    Returns:
      What the action did in process 0, None in the others.
    """
    if not is_distributed():
        return action()
    result, message = None, ""
    if is_main_process():
        mark = _ALONE.set(True)
        try:
            result = action()
        except CxrError as error:
            message = str(error)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(str(error)) from error  # of its own devices: no other process is lost
        finally:
            _ALONE.reset(mark)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message.encode()))))
    if length:
        said = np.frombuffer(message.encode(), np.uint8) if is_main_process() else np.zeros(length, np.uint8)
        raise CxrError(np.asarray(multihost_utils.broadcast_one_to_all(said)).astype(np.uint8).tobytes().decode())
    return result


def broadcast_from_main(question: Callable[[], bool]) -> bool:
    """What process 0 answers, in all processes: files may look otherwise to each of them."""
    answer = on_main_process(question)
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer))) if is_distributed() else bool(answer)


def peer_lost_error(error: Exception, then: str = "what is done is kept") -> CxrError:
    """What a process says whose work with the others broke off, with what comes of starting again."""
    reason = " ".join(str(error).split())[:200]
    return CxrError(
        f"another process stopped or cannot be reached ({reason}); start all of them again, with any number of "
        f"processes: {then}"
    )


@contextmanager
def _preempt_on_interrupt() -> Iterator[list[int]]:
    """In one of several processes the first Ctrl-C is as a SIGTERM, on which all stop; a second one acts at once.

    Raises:
      KeyboardInterrupt: at the end, if there was no step left on which all could have stopped.
    """

    def pass_on(number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        _INTERRUPTS.append(number)
        signal.raise_signal(signal.SIGTERM)  # JAX's preemption service hears it

    _INTERRUPTS.clear()
    previous = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # not in the main thread: the caller handles signals
        signal.signal(signal.SIGINT, pass_on)
    try:
        yield []
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, previous)
    if _INTERRUPTS:
        raise KeyboardInterrupt


def preemption_requested() -> list[int]:
    """The signal on which all processes stop now, wherever it came; empty to go on.

    All processes must ask as often, before each step or batch. JAX's preemption service lets them agree on one of these
    questions.
    """
    if not is_distributed() or not getattr(jax.config, _SERVICE):
        return []
    if not multihost_utils.reached_preemption_sync_point(next(_QUESTIONS)):
        return []
    return [*_INTERRUPTS, int(signal.SIGTERM)]


def collect_signals() -> AbstractContextManager[list[int]]:
    """The signals that came meanwhile; of several processes `told_to_stop` says when all of them stop."""
    return _preempt_on_interrupt() if is_distributed() else _collected()


@contextmanager
def _collected() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying by them; a second one acts at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
