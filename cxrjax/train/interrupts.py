"""How a run is told to stop: by SIGTERM or SIGINT, which it hears between two steps."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from cxrjax.parallel.runtime import interrupted_together, several


def signals() -> AbstractContextManager[list[int]]:
    """The signals that came meanwhile; of several processes `told_to_stop` says when all of them stop."""
    return interrupted_together() if several() else _collected()


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
