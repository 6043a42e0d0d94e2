"""Monitoring of a run: metrics.jsonl, TensorBoard events, the data wait timer and the profiler."""

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
    """Writes scalars to metrics.jsonl and TensorBoard, with the methods of `clu.metric_writers`.

    Args:
      directory: the run's directory.
      start: the step a resumed run starts from; later lines are dropped, since their steps run again.
    """

    def __init__(self, directory: Path, start: int = 0):
        self._file = directory / "metrics.jsonl"
        rows = [row for row in read_metrics(self._file) if row["step"] <= start] if self._file.exists() else []
        write_text(self._file, "".join(_line(row) for row in rows))
        self._lines = self._file.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "events"), purge_step=start + 1, flush_secs=10)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._events.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line `{"step": ..., name: value}`; NaN becomes null."""
        self._lines.write(_line({"step": step, **scalars}))
        self._lines.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name.replace("_", "/", 1), value, step)

    def flush(self) -> None:
        """Write everything to disk."""
        self._lines.flush()
        self._events.flush()


class NullMetricWriter:
    """The writer of all processes but the first: it writes nothing."""

    def __enter__(self) -> "NullMetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; an incomplete last line is skipped, since a kill may have cut it.

    Raises:
      CxrError: another line is not JSON.
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
    """Measures the time of the steps, and how much of it the host waits for a batch.

    The devices may still be busy with earlier steps meanwhile, so the wait is an upper bound of what they lose.
    Validation, and the first batch and step after each start, which fill the loader and compile, are not counted.

    Attributes:
      wait_seconds: seconds without a batch.
      step_seconds: seconds of steps, including those.
    """

    def __init__(self, wait_seconds: float = 0.0, step_seconds: float = 0.0):
        self.wait_seconds, self.step_seconds = wait_seconds, step_seconds
        self._epoch_start = (wait_seconds, step_seconds)
        self._since: float | None = None

    def next(self, batches: Iterator[Item]) -> Item:
        """Return the next batch and count the wait for it."""
        start = time.perf_counter()
        batch = next(batches)
        if self._since is not None:
            self.wait_seconds += time.perf_counter() - start
        return batch

    def resume(self) -> None:
        """Start measuring, if it is paused."""
        if self._since is None:
            self._since = time.perf_counter()

    def update(self) -> None:
        """Bring `step_seconds` up to date."""
        if self._since is not None:
            now = time.perf_counter()
            self.step_seconds += now - self._since
            self._since = now

    def pause(self) -> None:
        """Stop measuring until `resume`."""
        self.update()
        self._since = None

    def epoch_fraction(self) -> float:
        """Return the fraction of time spent waiting since the last call; NaN if nothing was measured."""
        wait, total = self.wait_seconds - self._epoch_start[0], self.step_seconds - self._epoch_start[1]
        self._epoch_start = (self.wait_seconds, self.step_seconds)
        return wait / total if wait else math.nan


class Profiler:
    """Traces some steps of a run into `profile/`, for TensorBoard and Perfetto.

    Args:
      directory: of the run.
      steps: first and last; None traces nothing.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self._directory = directory / "profile"
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    def starts(self, step: int) -> bool:
        """Return whether the trace starts with this step; of a resumed run, the first within the range."""
        return not self._tracing and self._first <= step <= self._last

    def ends(self, step: int) -> bool:
        """Return whether the trace ends with this step."""
        return self._tracing and step >= self._last

    def start(self) -> None:
        """Start the trace; the devices should have finished earlier steps."""
        jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
        self._tracing = True

    def stop(self) -> None:
        """Write the trace, if one was started; the devices should have finished its steps."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
