"""Arguments that several commands share, and how their values are parsed."""

import argparse
import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MESH_METAVAR = "data=D,space=S"


@dataclass(frozen=True)
class PartialResult:
    """The result of a command that could not process all of its inputs; the exit code is then 1.

    Attributes:
      value: the result, for `--json`.
      failures: the reason for each input that failed, by its name.
    """

    value: Any
    failures: dict[str, str]


def add_config(parser: argparse.ArgumentParser, *, required: bool = True, default: str = "") -> None:
    """Add `--config`; `default` says what is used without it. `--config.KEY=VALUE` is split off in `main`."""
    parser.add_argument(
        "--config", required=required, metavar="RECIPE[:ARG]",
        help="a recipe in configs/, or a Python file with get_config()" + (f" (default: {default})" if default else ""),
    )  # fmt: skip
    add_overrides_help(parser)


def add_overrides_help(parser: argparse.ArgumentParser) -> None:
    """List the config keys below the options."""
    from cxrjax.config_keys import KEYS

    parser.epilog = (
        "--config.KEY=VALUE overrides one key of the recipe, for example --config.train.epochs=3 or "
        "--config.data.views=PA,AP; `cxrjax config RECIPE` explains each key. Keys: " + ", ".join(KEYS)
    )


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Add `--workdir`."""
    parser.add_argument("--workdir", type=Path, required=True, help="the run directory; created if missing")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the directory of a trained run, with the split, the data and the mesh to use."""
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="the directory of a trained run")
    parser.add_argument("--split", default="test", help="train, validation or test (default: test)")
    parser.add_argument("--data-dir", type=Path, help="where the prepared data is now (default: as in training)")
    parser.add_argument(
        "--mesh", metavar=MESH_METAVAR,
        help="split batches over D devices and image rows over S (default: as in training if there are enough devices, "
        "else no row splitting)",
    )  # fmt: skip


def add_processes(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add the options of a distributed run; `note` says what the processes share."""
    group = parser.add_argument_group(
        "several processes", f"Run the same command in every process, changing only --process.{note and ' ' + note}"
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT",
        help="address of process 0; auto: detect all three values from SLURM, Open MPI, Kubernetes or a TPU pod",
    )  # fmt: skip
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="K", help="index of this process, from 0")
    group.add_argument(
        "--join-timeout", type=positive_int, default=300, metavar="S",
        help="seconds to wait for the other processes (default: 300)",
    )  # fmt: skip


def join_processes(arguments: argparse.Namespace, *, stops_together: bool = False) -> None:
    """Connect to the other processes of a distributed run, if `--coordinator` is given.

    Args:
      arguments: parsed arguments with the options of `add_processes`.
      stops_together: whether the command polls for preemption, so that SIGTERM to one process stops all of them.
    """
    from cxrjax.distributed.runtime import start

    start(
        arguments.coordinator, arguments.processes, arguments.process, timeout=arguments.join_timeout,
        preemption=stops_together,
    )  # fmt: skip


def use_compilation_cache(directory: Path) -> None:
    """Keep compiled programs in `directory/cache`."""
    from cxrjax.distributed.runtime import enable_compilation_cache

    enable_compilation_cache(directory / "cache")


def mesh_shape(text: str | None) -> tuple[int, int] | None:
    """Parse `data=D,space=S` into (D, S); None if nothing was given."""
    from cxrjax.distributed.mesh import parse_mesh

    return parse_mesh(text) if text else None


def given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options that were given, so that the others keep the defaults of the called function."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def positive_int(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_names(text: str) -> list[str]:
    """Return names separated by commas, or the lines of the file that `text` names. Empty lines are kept."""
    try:
        if text and "," not in text and Path(text).is_file():
            return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a long name is not a path
            raise
    return [name.strip() for name in text.split(",")] if text else []
