"""Measures this package and PyTorch on one device, each alone on it; prints ratios.

python scripts/bench_against_torch.py                  # on a GPU, 8 minutes at most: the cases of the goals
python scripts/bench_against_torch.py densenet121:64:2 --variants float32 --dtypes float32 --remats none

It needs JAX, Flax, optax, PyTorch, torchvision, timm and this repository; nothing has to be installed of it. Several
compile at once, which takes most of the time (a training step 90 s beside an H200), and then are timed one after the
other. What has not compiled after three quarters of the time is left out; programs are kept in --cache, so that the
same command goes on where it was. A case's ratios take the fastest of our ways that could be measured, and the fastest
of PyTorch's; for memory the most frugal of ours against PyTorch's `amp` and `ckpt`. Rows are JSON lines (--out keeps
them); goals are for an H200.
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
SPEED = {256: 1.3, 512: 1.3, 1024: 1.5, 2048: 1.5}
"""Goals: our training images/s over the best of PyTorch's, by size in px."""
MEMORY = {("amp", 2048): 0.35, ("ckpt", 2048): 0.7}
"""Goals: our peak memory over that of PyTorch's variant, at a size in px."""
COMPILING = 0.75
"""Share of the time by which all must have compiled: who has not is left out, so that the others are timed alone."""


@dataclass(eq=False)
class Measurement:
    """One process: it compiles, says that it is ready, and is timed when it gets a line.

    Attributes:
      case: ARCH:SIZE:BATCH.
      ours: whether it is this package's.
      about: what its row says of it.
      words: its command.
      printed: the lines it printed.
      process: what runs.
      errors: what it writes to its standard error.
    """

    case: str
    ours: bool
    about: dict[str, Any]
    words: list[str]
    printed: list[str] = field(default_factory=list)
    process: Any = None
    errors: IO[str] | None = None

    @property
    def slow(self) -> bool:
        """Whether it compiles for minutes."""
        return not self.ours and self.about["variant"] == "compile"

    def start(self, said: "queue.Queue[tuple[Measurement, str | None]]", cache: Path) -> None:
        """Run it, programs kept in `cache`; each line that it prints comes to `said`, and None when it has ended."""
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (until `row` has read it)
        # A process takes of the GPU's memory what it needs, so that the others can compile.
        kept = {"JAX_COMPILATION_CACHE_DIR": str(cache / "jax"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch")}
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | kept
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment, cwd=ROOT,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(said,), daemon=True).start()

    def _read(self, said: "queue.Queue[tuple[Measurement, str | None]]") -> None:
        with self.process.stdout as printed:
            for line in printed:
                said.put((self, line.strip()))
        self.process.wait()
        said.put((self, None))

    def go(self) -> None:
        """It is its turn."""
        with suppress(BrokenPipeError):  # it died since; its row says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def row(self, out_of_time: bool = False) -> dict[str, Any]:
        """What it measured, or why it could not; out of time, its process is ended."""
        about = self.about | {"case": self.case, "ours": self.ours}
        if self.process is None:
            return about | {"error": "out of time"}
        assert self.errors is not None
        with suppress(BrokenPipeError), self.process.stdin:
            pass
        with self.errors as errors:
            if out_of_time:
                self.process.kill()
                self.process.wait()
                return about | {"error": "out of time"}
            errors.seek(0)
            return about | benchmark.found(self.process.returncode, "\n".join(self.printed), errors.read())


def measurements(options: argparse.Namespace) -> list[Measurement]:
    """Those of all cases, case by case, ours and PyTorch's."""
    made: list[Measurement] = []
    for word in options.cases:
        _, size, batch = word.split(":")
        about: dict[str, Any] = {"resolution": int(size), "batch": int(batch)}
        for case in benchmark.cases([word], options.dtypes, options.remats, options.steps):
            kind = about | {"variant": f"{case.dtype}, remat {case.remat}"}
            made.append(Measurement(word, True, kind, benchmark.command(case, in_turn=True)))
        inference = benchmark.cases([word], options.dtypes[:1], ["none"], options.steps)[0]
        words = benchmark.command(replace(inference, inference=True), in_turn=True)
        made.append(Measurement(word, True, about | {"variant": f"{inference.dtype}, inference"}, words))
        for variant in options.variants:
            words = [
                options.peer_python, "scripts/bench_torch.py", word, "--variants", variant, "--steps",
                str(options.steps), "--in-turn",
            ]  # fmt: skip
            made.append(Measurement(word, False, about | {"variant": variant}, words))
    return made


def measured(wanted: Sequence[Measurement], jobs: int, seconds: float, cache: Path) -> list[dict[str, Any]]:
    """Their rows: so many compile at a time, and all that could in time are then timed one by one."""
    end, latest = time.monotonic() + seconds, time.monotonic() + COMPILING * seconds
    said: queue.Queue[tuple[Measurement, str | None]] = queue.Queue()
    compiling, ready, ended, rows = set(), [], set(), []
    slow, waiting = (deque(each for each in wanted if each.slow is which) for which in (True, False))

    def start_next() -> None:
        """One in four at most is slow, as long as there are others: else they would have no turn."""
        first = slow and (not waiting or sum(each.slow for each in compiling) < jobs // 4)
        each = (slow if first else waiting).popleft()
        compiling.add(each)
        each.start(said, cache)

    def heard(until: float) -> Measurement | None:
        """Who was next to say that it is ready, or to print something, or to end; None where the time is over."""
        try:
            each, line = said.get(timeout=max(until - time.monotonic(), 0.01))
        except queue.Empty:
            return None
        if line is None:
            ended.add(each)
        elif line == benchmark.READY:
            ready.append(each)
        else:
            each.printed.append(line)
        return each

    def done(each: Measurement, *, out_of_time: bool = False) -> None:
        rows.append(each.row(out_of_time))
        print(json.dumps(rows[-1]), flush=True)

    while slow or waiting or compiling:
        while (slow or waiting) and len(compiling) < jobs:
            start_next()
        each = heard(latest)
        if each is None:
            break
        if each in compiling and (each in ended or each in ready):
            compiling.remove(each)
            if each not in ready:
                done(each)
    for each in (*compiling, *waiting, *slow):
        done(each, out_of_time=True)
    for each in list(ready):
        each.go()
        while each not in ended and heard(end) is not None:
            pass
        done(each, out_of_time=each not in ended)
    return rows


def ratios(size: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """What is compared, with its goal; steady: of steps that do not wait for each other."""
    lines = []
    for what, goal in (("train", SPEED.get(size)), ("train_steady", None), ("infer", None), ("infer_steady", None)):
        key = f"{what}_images_per_s"
        both = [[row for row in rows if row.get(key)] for rows in (ours, theirs)]
        if all(both):
            mine, other = (max(rows, key=lambda row, key=key: row[key]) for rows in both)
            names = f"{mine['variant']} against {other['variant']}"
            named = f"{what.replace('_', ', ')} images/s, {names}"
            lines.append(_line(named, mine[key] / other[key], goal))
    held = [row["train_peak_bytes"] for row in ours if row.get("train_peak_bytes")]
    for row in theirs:
        if held and row.get("train_peak_bytes"):
            goal = MEMORY.get((row["variant"], size))
            lines.append(_line(f"train peak bytes against {row['variant']}", min(held) / row["train_peak_bytes"], goal))
    return lines


def _line(what: str, ratio: float, goal: float | None) -> str:
    return f"# {what}: {ratio:.2f}" + (f" (goal {goal})" if goal else "")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's words; by default those that the program was started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="ARCH:SIZE:BATCH")
    parser.add_argument("--variants", nargs="*", default=["amp", "ckpt", "compile"], help="PyTorch's")
    parser.add_argument("--remats", nargs="+", default=["none", "layer"], help="ours")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="ours")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8, help="what is not measured by then is left out")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, cores // 4),
        metavar="N",
        help="how many compile at once (default: cores / 4)",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "cxrjax-bench", metavar="DIR",
        help="programs that were compiled (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE", help="the Python that has PyTorch")
    parser.add_argument("--out", type=Path, help="keep all rows, one JSON line each")
    return parser.parse_args(words)


def main() -> None:
    """Measures and prints."""
    options = arguments()
    rows = measured(measurements(options), options.jobs, 60 * options.minutes, options.cache)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for case in options.cases:
        mine, other = ([row for row in rows if row["case"] == case and row["ours"] is ours] for ours in (True, False))
        print("\n".join([f"# {case}", *ratios(int(case.split(":")[1]), mine, other)]))


if __name__ == "__main__":
    main()
