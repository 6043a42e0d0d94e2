"""Numbers of a run as they come: `metrics.jsonl` for programs, TensorBoard files for eyes."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from tensorboardX import SummaryWriter

from cxrjax.errors import CxrError
from cxrjax.files import write_text


class MetricWriter:
    """Writes scalars by step, with the vocabulary of `clu.metric_writers`, and without TensorFlow.

    Args:
      directory: the run's directory.
      start: the step a resumed run starts from; later lines, written by steps that will be run again, are dropped.
    """

    def __init__(self, directory: Path, start: int = 0):
        self._file = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self._file) if row["step"] <= start] if self._file.exists() else []
        write_text(self._file, "".join(_line(row) for row in kept))
        self._lines = self._file.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "events"), purge_step=start + 1, flush_secs=10)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line `{"step": ..., name: value}`; NaN becomes null."""
        self._lines.write(_line({"step": step, **scalars}))
        self._lines.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name.replace("_", "/", 1), value, step)

    def flush(self) -> None:
        """Put everything on disk."""
        self._lines.flush()
        self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        self._lines.close()
        self._events.close()


class NullMetricWriter:
    """The writer of every process but the first: takes the same calls and writes nothing."""

    def __enter__(self) -> "NullMetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out.

    Raises:
      CxrError: another line is broken.
    """
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise CxrError(f"{file}, line {number} is not JSON ({error}): delete that line") from None
    return rows


def _line(row: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


Item = TypeVar("Item")


class DataWaitTimer:
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
