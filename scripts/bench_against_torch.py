"""Benchmark this package against PyTorch on one device and print ratios.

python scripts/bench_against_torch.py                  # on a GPU, at most 8 minutes
python scripts/bench_against_torch.py densenet121:64:2 --variants float32 --dtypes float32 --remats none

Needs JAX, Flax, optax, PyTorch, torchvision, timm and this repository, which need not be installed. Every measurement
runs in a separate process. Several compile at once, which takes most of the time (90 s for a training step on an
H200), and are then timed one after the other. Measurements that have not compiled after three quarters of the time are
left out; compiled programs are kept in --cache, so rerunning the command continues. Speed ratios take the fastest
variant of each side; memory ratios take our smallest against PyTorch's `amp` and `ckpt`. Rows are JSON lines (--out
writes them to a file). The goals are for an H200.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cxrjax.planning import benchmark  # noqa: E402  (found by the line above where nothing is installed)

CASES = ("densenet121:2048:2", "densenet121:256:64", "densenet121:1024:8", "densenet121:512:32")
SPEED_GOALS = {256: 1.3, 512: 1.3, 1024: 1.5, 2048: 1.5}
"""Our training images/s over the best of PyTorch's, by image side in px."""
MEMORY_GOALS = {("amp", 2048): 0.35, ("ckpt", 2048): 0.7}
"""Our peak memory over that of a PyTorch variant, at an image side in px."""
COMPILE_FRACTION = 0.75
"""Fraction of the time after which compilation stops, so that the rest can be timed alone."""

Lines = queue.Queue["tuple[Measurement, str | None]"]
"""Lines that the processes print; None when a process has ended."""


@dataclass(eq=False)
class Measurement:
    """A process that compiles, prints that it is ready, and is timed when it receives a line.

    Attributes:
      case: ARCH:SIZE:BATCH.
      ours: whether it measures this package.
      columns: further columns of its row.
      command: its command.
      printed: the lines it printed.
      process: the running process.
      errors: its standard error.
    """

    case: str
    ours: bool
    columns: dict[str, Any]
    command: list[str]
    printed: list[str] = field(default_factory=list)
    process: Any = None
    errors: IO[str] | None = None

    @property
    def slow(self) -> bool:
        """Whether it compiles for minutes."""
        return not self.ours and self.columns["variant"] == "compile"

    def start(self, lines: Lines, cache: Path) -> None:
        """Start the process; compiled programs are kept in `cache`."""
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (until `row` has read it)
        caches = {"JAX_COMPILATION_CACHE_DIR": str(cache / "jax"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch")}
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | caches  # others need GPU memory, too
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment, cwd=ROOT,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Lines) -> None:
        with self.process.stdout as stdout:
            for line in stdout:
                lines.put((self, line.strip()))
        self.process.wait()
        lines.put((self, None))

    def start_timing(self) -> None:
        """Tell the process to time its steps."""
        with suppress(BrokenPipeError):  # it has died; its row says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def row(self, timed_out: bool = False) -> dict[str, Any]:
        """Return the measurement or the error; kills the process if it timed out."""
        row = self.columns | {"case": self.case, "ours": self.ours}
        if self.process is None:
            return row | {"error": "timed out"}
        assert self.errors is not None
        with suppress(BrokenPipeError), self.process.stdin:
            pass
        with self.errors as errors:
            if timed_out:
                self.process.kill()
                self.process.wait()
                return row | {"error": "timed out"}
            errors.seek(0)
            return row | benchmark.parse_output(self.process.returncode, "\n".join(self.printed), errors.read())


def make_measurements(options: argparse.Namespace) -> list[Measurement]:
    """Return the measurements of all cases, ours and PyTorch's."""
    measurements: list[Measurement] = []
    for spec in options.cases:
        _, size, batch = spec.split(":")
        columns: dict[str, Any] = {"resolution": int(size), "batch": int(batch)}

        def add(variant: str, command: list[str], *, ours: bool, spec=spec, columns=columns) -> None:
            measurements.append(Measurement(spec, ours, columns | {"variant": variant}, command))

        for case in benchmark.parse_cases([spec], options.dtypes, options.remats, steps=options.steps):
            add(f"{case.dtype}, remat {case.remat}", benchmark.case_command(case, wait=True), ours=True)
        [case] = benchmark.parse_cases([spec], options.dtypes[:1], steps=options.steps)
        command = benchmark.case_command(replace(case, inference=True), wait=True)
        add(f"{case.dtype}, inference", command, ours=True)
        for variant in options.variants:
            command = [
                options.torch_python, "scripts/bench_torch.py", spec, "--variants", variant, "--steps",
                str(options.steps), "--wait",
            ]  # fmt: skip
            add(variant, command, ours=False)
    return measurements


def run(measurements: Sequence[Measurement], jobs: int, seconds: float, cache: Path) -> list[dict[str, Any]]:
    """Run all measurements and return their rows: `jobs` compile at once, then each is timed alone."""
    end, compile_end = time.monotonic() + seconds, time.monotonic() + COMPILE_FRACTION * seconds
    lines: Lines = queue.Queue()
    compiling, ready, ended, rows = set(), [], set(), []
    slow, fast = (deque(m for m in measurements if m.slow is is_slow) for is_slow in (True, False))

    def start_next() -> None:
        """Start the next one; at most a quarter of the jobs are slow ones, so that the others get their turn."""
        slow_next = slow and (not fast or sum(m.slow for m in compiling) < jobs // 4)
        measurement = (slow if slow_next else fast).popleft()
        compiling.add(measurement)
        measurement.start(lines, cache)

    def next_event(until: float) -> Measurement | None:
        """Return the next process that is ready, prints a line or ends; None when the time is over."""
        try:
            measurement, line = lines.get(timeout=max(until - time.monotonic(), 0.01))
        except queue.Empty:
            return None
        if line is None:
            ended.add(measurement)
        elif line == benchmark.READY:
            ready.append(measurement)
        else:
            measurement.printed.append(line)
        return measurement

    def finish(measurement: Measurement, *, timed_out: bool = False) -> None:
        rows.append(measurement.row(timed_out))
        print(json.dumps(rows[-1]), flush=True)

    while slow or fast or compiling:
        while (slow or fast) and len(compiling) < jobs:
            start_next()
        measurement = next_event(compile_end)
        if measurement is None:
            break
        if measurement in compiling and (measurement in ended or measurement in ready):
            compiling.remove(measurement)
            if measurement not in ready:
                finish(measurement)
    for measurement in (*compiling, *fast, *slow):
        finish(measurement, timed_out=True)
    for measurement in list(ready):
        measurement.start_timing()
        while measurement not in ended and next_event(end) is not None:
            pass
        finish(measurement, timed_out=measurement not in ended)
    return rows


def ratios(size: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """Return the comparisons of a case with their goals; steady: consecutive steps without waiting in between."""
    lines = []
    for mode, goal in (("train", SPEED_GOALS.get(size)), ("train_steady", None), ("infer", None),
                       ("infer_steady", None)):  # fmt: skip
        key = f"{mode}_images_per_s"
        measured = [[row for row in rows if row.get(key)] for rows in (ours, theirs)]
        if all(measured):
            best, other = (max(rows, key=lambda row, key=key: row[key]) for rows in measured)
            name = f"{mode.replace('_', ', ')} images/s, {best['variant']} against {other['variant']}"
            lines.append(_ratio_line(name, best[key] / other[key], goal))
    peaks = [row["train_peak_bytes"] for row in ours if row.get("train_peak_bytes")]
    for row in theirs:
        if peaks and row.get("train_peak_bytes"):
            goal = MEMORY_GOALS.get((row["variant"], size))
            ratio = min(peaks) / row["train_peak_bytes"]
            lines.append(_ratio_line(f"train peak bytes against {row['variant']}", ratio, goal))
    return lines


def _ratio_line(name: str, ratio: float, goal: float | None) -> str:
    return f"# {name}: {ratio:.2f}" + (f" (goal {goal})" if goal else "")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="ARCH:SIZE:BATCH")
    parser.add_argument("--variants", nargs="*", default=["amp", "ckpt", "compile"], help="variants of PyTorch")
    parser.add_argument("--remats", nargs="+", default=["none", "layer"], help="our rematerialisation policies")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="our compute types")
    parser.add_argument("--steps", type=int, default=10, help="steps per measurement (default: 10)")
    parser.add_argument("--minutes", type=float, default=8, help="total time; the rest is left out (default: 8)")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 4), metavar="N",
        help="measurements that compile at once (default: cores / 4)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "cxrjax-bench", metavar="DIR",
        help="directory of compiled programs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--torch-python", default=sys.executable, metavar="FILE", help="Python with PyTorch")
    parser.add_argument("--out", type=Path, help="write all rows to a file, as JSON lines")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, and print rows and ratios."""
    options = parse_arguments()
    rows = run(make_measurements(options), options.jobs, 60 * options.minutes, options.cache)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for case in options.cases:
        ours, theirs = (
            [row for row in rows if row["case"] == case and row["ours"] is is_ours] for is_ours in (True, False)
        )
        print("\n".join([f"# {case}", *ratios(int(case.split(":")[1]), ours, theirs)]))


if __name__ == "__main__":
    main()
