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
from cxrjax.train.state import Progress


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
    """Measures the time of training and of its steps, and how much of it the host waits for a batch.

    The devices may still be busy with earlier steps meanwhile, so the wait is an upper bound of what they lose.
    Validation, and the first batch and step after each start, which fill the loader and compile, are not counted as
    steps.

    Args:
      progress: its `seconds`, `step_seconds` and `wait_seconds` are updated.
    """

    def __init__(self, progress: Progress):
        self._progress, self._updated = progress, time.perf_counter()
        self._step_start: float | None = None  # None: paused
        self._epoch_start = (progress.wait_seconds, progress.step_seconds)

    def next(self, batches: Iterator[Item]) -> Item:
        """Return the next batch and count the wait for it."""
        start = time.perf_counter()
        batch = next(batches)
        if self._step_start is not None:
            self._progress.wait_seconds += time.perf_counter() - start
        return batch

    def resume(self) -> None:
        """Start measuring steps, if paused."""
        if self._step_start is None:
            self._step_start = time.perf_counter()

    def update(self) -> None:
        """Bring the progress up to date."""
        now = time.perf_counter()
        self._progress.seconds += now - self._updated
        self._updated = now
        if self._step_start is not None:
            self._progress.step_seconds += now - self._step_start
            self._step_start = now

    def pause(self) -> None:
        """Stop measuring steps until `resume`."""
        self.update()
        self._step_start = None

    def epoch_fraction(self) -> float:
        """Return the fraction of the steps' time spent waiting since the last call; NaN if nothing was measured."""
        progress, (wait, steps) = self._progress, self._epoch_start
        wait, steps = progress.wait_seconds - wait, progress.step_seconds - steps
        self._epoch_start = (progress.wait_seconds, progress.step_seconds)
        return wait / steps if wait else math.nan


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
