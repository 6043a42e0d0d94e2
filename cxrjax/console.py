"""Terminal output: results on stdout, log lines and progress bars on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # print names unchanged
stderr = Console(stderr=True, **_PLAIN)
stdout = Console(**_PLAIN, width=None if sys.stdout.isatty() else 120)  # tables in files need a fixed width


def print_text(text: str) -> None:
    """Print a result to stdout, without wrapping or markup."""
    stdout.print(text, soft_wrap=True)


def log(text: str, style: str | None = None) -> None:
    """Print a log line to stderr, without wrapping or markup."""
    stderr.print(text, style=style, soft_wrap=True)


class _RateColumn(ProgressColumn):
    """Units per second of a task, as `231 images/s`."""

    def render(self, task: Task) -> Text:
        """Return the rate over the last seconds."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.{1 if speed < 10 else 0}f} {task.fields['unit']}/s")


@contextmanager
def progress_bar(
    description: str, total: int | None, *, unit: str = "images", start: int = 0
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr, if it is a terminal; yields `advance(n=1, description=None)`.

    Args:
      description: the task, in a few words.
      total: number of units; None if unknown.
      unit: what is counted.
      start: number of units already done.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal or total == 0) as progress:
        task = progress.add_task(description, total=total, completed=start, unit=unit)

        def advance(n: int = 1, description: str | None = None) -> None:
            progress.update(task, advance=n, description=description)

        yield advance
