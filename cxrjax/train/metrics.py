"""Numbers of a run as they come: `metrics.jsonl` for programs, TensorBoard files for eyes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


class Unwritten:
    """The writer of every process but the first: takes the same calls and writes nothing."""

    def __enter__(self) -> "Unwritten":
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
