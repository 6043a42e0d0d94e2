"""The command line: parses arguments, runs one command, and turns errors into one line and an exit code."""

import argparse
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from cxrjax import __version__
from cxrjax.cli.arguments import PartialResult
from cxrjax.config import split_overrides
from cxrjax.console import log
from cxrjax.errors import CxrError, InterruptedRunError, out_of_memory
from cxrjax.files import write_text

COMMANDS = ("demo", "prepare", "config", "train", "evaluate", "score", "predict", "explain", "models", "study", "plan",
            "bench", "weights")  # fmt: skip
"""Each is a module of `cxrjax.cli` with `add_arguments(parser)` and `run(arguments)`; its docstring is the help."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `arguments.run` is the function of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="cxrjax", allow_abbrev=False,
        description="Train and study chest X-ray classifiers at full resolution.",
        epilog="Run `cxrjax COMMAND --help` for the options of a command.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"cxrjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"cxrjax.cli.{name}")
        summary = (module.__doc__ or name).partition("\n")[0].removesuffix(".")
        command = commands.add_parser(
            name, help=summary[0].lower() + summary[1:], description=module.__doc__, allow_abbrev=False
        )
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        command.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 on success, 1 for an error, 128 + n if signal n stopped the run."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    overrides, others = split_overrides(argv)
    arguments, unknown = parser.parse_known_args(others)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; see cxrjax {arguments.command} --help")
    if overrides and not hasattr(arguments, "config"):
        parser.error(f"cxrjax {arguments.command} does not take {overrides[0].partition('=')[0]}")
    arguments.overrides = overrides
    if not arguments.debug:
        _silence_libraries()
    try:
        with _stdout_to_stderr() if arguments.json == "-" else nullcontext():
            result = arguments.run(arguments)
        value, failures = (result.value, result.failures) if isinstance(result, PartialResult) else (result, {})
        if arguments.json and value is not None:  # None in all processes but the first
            _write_json(arguments.json, value)
        if failures:
            return _fail(f"{len(failures)} failed: {'; '.join(list(failures.values())[:5])}", 1)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if arguments.debug:
            raise
        if requested := out_of_memory(error):
            return _fail_out_of_memory(arguments, requested)
        return _fail(*_describe(error))


def entry() -> None:
    """Run the program. On failure exit at once: background threads would go on to print errors of their own."""
    try:
        code = main()
    except Exception as error:  # raised with --debug
        traceback.print_exception(error)
        code = _describe(error)[1]
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        _leave_processes()
        os._exit(code)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send standard output to standard error, including that of C++ libraries such as Gloo."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _silence_libraries() -> None:
    """Hide log messages of libraries; their exceptions are reported in one line by `main`."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda _: None  # Orbax's threads raise again while an error is reported


def _leave_processes() -> None:
    """Leave the other processes of a distributed run, if a command has joined any: importing JAX here is slow."""
    if runtime := sys.modules.get("cxrjax.distributed.runtime"):
        runtime.shutdown()


def _write_json(file: str, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(file), text)


def _fail(message: str, code: int) -> int:
    log(f"cxrjax: {' '.join(message.split())}", "red" if code < 128 else "yellow")
    return code


def _fail_out_of_memory(arguments: argparse.Namespace, requested: str) -> int:
    """Suggest settings that need less memory; for training also print the plan of each."""
    from cxrjax.config import load_config
    from cxrjax.distributed.runtime import is_main_process
    from cxrjax.planning.oom_advice import advice, print_plans

    config = load_config(arguments.config, arguments.overrides) if arguments.command == "train" else None
    code = _fail(f"out of device memory ({requested} requested); to use less: {advice(arguments.command, config)}", 1)
    _leave_processes()  # most likely they fail too, for the same reason
    if config is not None and is_main_process():
        with suppress(KeyboardInterrupt):
            print_plans(config)
    return code


_FAILED_COLLECTIVE = r"[A-Z_]+: .*(Gloo|NCCL|oordination service)"
"""XLA's message for a failed collective; outside compiled steps JAX raises it as a ValueError."""


def _describe(error: Exception) -> tuple[str, int]:
    """Return the error line and the exit code of an exception."""
    if isinstance(error, InterruptedRunError):
        return str(error), 128 + error.number
    if isinstance(error, CxrError):
        return str(error), 1
    if type(error).__name__ == "JaxRuntimeError" or re.match(_FAILED_COLLECTIVE, str(error)):
        from cxrjax.distributed.runtime import is_distributed, peer_lost_error

        if is_distributed():
            return str(peer_lost_error(error)), 1
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(cause):
            file = getattr(cause, "filename", None) or next(iter(re.findall(r'"(/[^"]+)"', str(cause))), None)
            where = f" (writing {file})" if file else ""
            return f"the disk is full{where}: free some space, then rerun the command to resume", 1
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 1
    return f"internal error ({type(error).__name__}: {error}); rerun with --debug and report it", 1


if __name__ == "__main__":
    entry()
