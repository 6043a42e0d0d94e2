"""Compare float32 and bfloat16 training on the phantom: do their losses differ by more than the noise between seeds?

uv run cxrjax prepare cxr_phantom --data-dir data --size 128
uv run python scripts/precision.py --data-dir data --workdir runs/precision     # a quarter of an hour on two CPU cores

Rerun to resume. The noise is the difference between float32 runs with different seeds. Prints a JSON line per size and
writes WORKDIR/losses.svg; --config.KEY=VALUE overrides the recipe `demo`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cxrjax.config import load_config
from cxrjax.distributed.runtime import enable_compilation_cache
from cxrjax.report import plots, style
from cxrjax.train.monitoring import read_metrics
from cxrjax.train.stages import train_stages

TYPES = ("float32", "bfloat16")


def train(directory: Path, size: int, dtype: str, seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Train one run and return its metrics, a row per epoch."""
    config = load_config(f"demo:{size}", [f"model.dtype={dtype}", f"seed={seed}", *overrides])
    run = directory / f"{size}px-{dtype}-seed{seed}"
    train_stages(config, run)
    return [row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]


def compare(size: int, runs: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return the differences of the mean training losses of each epoch."""
    wide, narrow = (np.array([[row["train_mean_loss"] for row in rows] for rows in runs[dtype]]) for dtype in TYPES)
    between = [np.abs(one - other) for i, one in enumerate(wide) for other in wide[:i]]
    error = np.sqrt((wide.var(0, ddof=1) + narrow.var(0, ddof=1)) / len(wide))
    return {
        "size": size,
        "seeds": len(wide),
        "epochs": wide.shape[1],
        "same_seed": [round(float(value), 4) for value in np.abs(narrow - wide).mean(1)],
        "between_float32_seeds": [round(float(value), 4) for value in np.mean(between, axis=1)],
        "mean_difference": [round(float(value), 4) for value in narrow.mean(0) - wide.mean(0)],
        "standard_error": [round(float(value), 4) for value in error],
        **{
            f"last_{key}_{dtype}": [round(float(rows[-1][key]), 4) for rows in runs[dtype]]
            for key in ("train_mean_loss", "val_loss", "val_auroc")
            for dtype in TYPES
        },
    }


@style.styled()
def plot_losses(curves: dict[str, dict[str, list[list[dict[str, Any]]]]]) -> Figure:
    """Plot the training losses: a panel per size, a thin line per run and a thick line for the mean of each type."""
    colour: dict[str, str] = dict(zip(TYPES, style.colours(1, 1), strict=True))
    figure, panels = style.panel_grid(len(curves), style.WIDE, panel=3.0, height=2.2, legend=True)
    for panel, (size, runs) in zip(panels, curves.items(), strict=True):
        panel.set_title(f"Loss, {size}")
        for dtype, rows_of_runs in runs.items():
            lines = [plots.series(rows, "epoch", "train_mean_loss") for rows in rows_of_runs]
            for line in lines:
                panel.plot(*line, color=colour[dtype], lw=0.7, alpha=0.5)
            if len({len(x) for x, _ in lines}) == 1:
                panel.plot(lines[0][0], np.mean([y for _, y in lines], axis=0), color=colour[dtype], lw=1.6)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.grid(axis="y")
    figure.supxlabel("epoch", fontsize=7, color=style.MUTED)
    handles = [Line2D([], [], color=colour[dtype], label=dtype) for dtype in TYPES]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(TYPES))
    return figure


def main() -> None:
    """Train, compare and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two (default: 0 1 2)")
    arguments, overrides = parser.parse_known_args()
    overrides = [f"data.data_dir={arguments.data_dir}", *overrides]
    enable_compilation_cache(arguments.workdir / "cache")
    curves = {}
    for size in arguments.sizes:
        runs = {
            dtype: [train(arguments.workdir, size, dtype, seed, overrides) for seed in arguments.seeds]
            for dtype in TYPES
        }
        print(json.dumps(compare(size, runs)), flush=True)
        curves[f"{size} px"] = runs
    style.save(plot_losses(curves), arguments.workdir / "losses.svg")


if __name__ == "__main__":
    main()
