"""How a run gets on: the share of its time that it waits for data, and a trace of some of its steps."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax

Item = TypeVar("Item")


class Waiting:
    """Measures how long the loop's steps take, and how much of that it is blocked for want of a batch.

    The devices may still be busy then, with the steps before: it is the most that they can have lost. The first batch
    and step of a start, which fill the loader and compile, are not in it, nor is validation.

    Attributes:
      waited: seconds in which no batch was there.
      stepped: seconds of steps, those among them.
    """

    def __init__(self, waited: float = 0.0, stepped: float = 0.0):
        self.waited, self.stepped = waited, stepped
        self._epoch = (waited, stepped)
        self._since: float | None = None

    def next(self, batches: Iterator[Item]) -> Item:
        """The next batch, however long it takes."""
        asked = time.perf_counter()
        batch = next(batches)
        if self._since is not None:
            self.waited += time.perf_counter() - asked
        return batch

    def go(self) -> None:
        """Measure from here on; no change where it is measured already."""
        if self._since is None:
            self._since = time.perf_counter()

    def tick(self) -> None:
        """Bring `stepped` up to now."""
        if self._since is not None:
            now = time.perf_counter()
            self.stepped += now - self._since
            self._since = now

    def pause(self) -> None:
        """Measure no more until `go`."""
        self.tick()
        self._since = None

    def of_epoch(self) -> float:
        """The share of waiting since this was asked last; NaN where no batch was measured."""
        waited, stepped = self.waited - self._epoch[0], self.stepped - self._epoch[1]
        self._epoch = (self.waited, self.stepped)
        return waited / stepped if waited else math.nan


class Profile:
    """Traces steps of a run for TensorBoard and Perfetto: `profile/` in its directory.

    Args:
      directory: of the run.
      steps: first and last; None traces nothing.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self._directory = directory / "profile"
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    def starts(self, step: int) -> bool:
        """Whether the trace begins with this step: the first of those wanted that is not done yet."""
        return not self._tracing and self._first <= step <= self._last

    def ends(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._tracing and step >= self._last

    def start(self) -> None:
        """Begin; what was given to the devices before should be done."""
        jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
        self._tracing = True

    def stop(self) -> None:
        """Write what was traced; the devices should be done with it. Nothing happens where nothing was begun."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
