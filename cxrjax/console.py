"""Progress bars for long work: on standard error, with rate and time left; silent where nobody looks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import ProgressColumn as _Column
from rich.progress import Task as _Task
from rich.text import Text

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # names are printed as they are
stderr = Console(stderr=True, **_PLAIN)
stdout = Console(**_PLAIN, width=None if sys.stdout.isatty() else 120)  # files are as wide as tables need


def say(text: str) -> None:
    """Print text as it is, whatever names are in it, in lines as long as they are."""
    stdout.print(text, soft_wrap=True)


class _Rate(_Column):
    """Units per second of a task, as `231 images/s`."""

    def render(self, task: _Task) -> Text:
        """The rate over the task's last seconds."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.{1 if speed < 10 else 0}f} {task.fields['unit']}/s")


@contextmanager
def bar(description: str, total: int | None, *, unit: str = "images", start: int = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar; the value is `advance(n=1, description=None)`.

    Args:
      description: what is being done, in a few words.
      total: how many units there are; None where that is unknown.
      unit: what is counted.
      start: how many are done already.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal or total == 0) as progress:
        task = progress.add_task(description, total=total, completed=start, unit=unit)

        def advance(n: int = 1, description: str | None = None) -> None:
            progress.update(task, advance=n, description=description)

        yield advance
