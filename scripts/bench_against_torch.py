"""Measures this package and PyTorch, case by case and one after the other, on one device; prints ratios.

python scripts/bench_against_torch.py                  # on a GPU, about 8 minutes: the goals' cases
python scripts/bench_against_torch.py densenet121:64:2 --variants float32 --dtypes float32 --remats none

It needs JAX, Flax, optax, PyTorch, torchvision, timm and this repository; nothing has to be installed of it. A case's
ratios take the fastest of our ways that could be measured, and the fastest of PyTorch's; for memory the most frugal of
ours against PyTorch's `amp` and `ckpt`. Rows are JSON lines (--out keeps them); goals are for an H200.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = ("densenet121:256:64", "densenet121:512:32", "densenet121:1024:8", "densenet121:2048:2")
SPEED = {256: 1.3, 512: 1.3, 1024: 1.5, 2048: 1.5}
"""Goals: our training images/s over the best of PyTorch's, by size in px."""
MEMORY = {("amp", 2048): 0.35, ("ckpt", 2048): 0.7}
"""Goals: our peak memory over that of PyTorch's variant, at a size in px."""


def measured(words: Sequence[str], python: str, seconds: float) -> list[dict[str, Any]]:
    """The JSON lines of a command; those it printed before its time was over."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen([python, *words], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        print(f"# out of time: {' '.join(words)}", flush=True)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def ratios(size: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """What is compared, with its goal."""
    ours, theirs = ([row for row in rows if row.get("train_s")] for rows in (ours, theirs))
    lines = []
    if ours and theirs:
        for what, goal in (("train", SPEED.get(size)), ("infer", None)):
            key = f"{what}_images_per_s"
            fastest = [max(rows, key=lambda row, key=key: row.get(key) or 0.0) for rows in (ours, theirs)]
            mine, other = (row.get(key) or 0.0 for row in fastest)
            if mine and other:
                names = " against ".join(str(row["variant"]) for row in fastest)
                lines.append(_line(f"{what} images/s, {names}", mine / other, goal))
    held = [row["train_peak_bytes"] for row in ours if row.get("train_peak_bytes")]
    for row in theirs:
        if held and row.get("train_peak_bytes"):
            goal = MEMORY.get((row["variant"], size))
            lines.append(_line(f"train peak bytes against {row['variant']}", min(held) / row["train_peak_bytes"], goal))
    return lines


def _line(what: str, ratio: float, goal: float | None) -> str:
    return f"# {what}: {ratio:.2f}" + (f" (goal {goal})" if goal else "")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="ARCH:SIZE:BATCH")
    parser.add_argument("--variants", nargs="+", default=["amp", "ckpt", "compile"], help="PyTorch's")
    parser.add_argument("--remats", nargs="+", default=["none", "layer"], help="ours")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="ours")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8, help="what is not measured by then is left out")
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE", help="the Python that has PyTorch")
    parser.add_argument("--out", type=Path, help="keep all rows, one JSON line each")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    rows, lines = [], []
    for case in options.cases:
        steps = ("--steps", str(options.steps))
        ours = measured(
            ("-m", "cxrjax.studies.bench", case, "--dtypes", *options.dtypes, "--remats", *options.remats, *steps),
            sys.executable, end - time.monotonic(),
        )  # fmt: skip
        theirs = measured(
            ("scripts/bench_torch.py", case, "--variants", *options.variants, *steps), options.peer_python,
            end - time.monotonic(),
        )  # fmt: skip
        lines += [f"# {case}", *ratios(int(case.split(":")[1]), ours, theirs)]
        rows += ours + theirs
        if options.out:
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
