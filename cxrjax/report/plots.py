"""Plots of scores, weights, curves and losses, each a function of plain arrays.

Plots take a width in inches: `WIDE` for panels side by side, `NARROW` for a phone or a single column. Strings are shown
literally, without mathematics or markup.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cxrjax.metrics.scores import MEAN
from cxrjax.report.content import Curve, Histogram, Matrix, Reliability, Row, by_finding, number
from cxrjax.report.style import (
    ENSEMBLES,
    GRID,
    INK,
    MUTED,
    PAPER,
    WIDE,
    colours,
    ink_on,
    panel_grid,
    sequential,
    shorten,
    styled,
)

MARKERS = "DsP^"
"""Markers of ensembles; sizes are dots."""
_DASHED = (0, (3, 1.2))


@styled()
def auc_by_size(
    scores: Mapping[str, Sequence[Row]], findings: Sequence[str], sizes: Sequence[str], ensembles: Sequence[str] = (),
    *, metric: str = "auroc", kind: str = "image size", width: float = WIDE,
) -> Figure:  # fmt: skip
    """Plot AUC by image size or arm: a panel for the mean and each finding, with intervals as whiskers.

    Args:
      scores: model -> rows (see `content.Row`).
      findings: order of the panels.
      sizes: names of the single models; image sizes, smallest first, are joined by a line.
      ensembles: names of the ensembles, shown on the right with a marker each.
      metric: "auroc" or "average_precision".
      kind: what the single models differ in; unless it is the image size, a legend names them.
      width: in inches.
    """
    table = by_finding(scores)
    models = [name for name in (*sizes, *ensembles) if name in table]
    shown = [f for f in (MEAN, *findings) if any(f in table[model] for model in models)]
    colour = dict(zip((*sizes, *ensembles), colours(len(sizes), len(ensembles)), strict=True))
    marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(ensembles)}
    ordered = kind == "image size"
    figure, panels = panel_grid(len(shown), width, panel=1.7, height=1.35, legend=bool(ensembles) or not ordered)
    bottom = _floor(scores, metric)
    ticks = [(x, shorten(name.removesuffix(" px"), 8)) for x, name in enumerate(models) if name in sizes and ordered]
    for panel, finding in zip(panels, shown, strict=True):
        _title(panel, "Mean of findings" if finding == MEAN else finding)
        line = []
        for x, model in enumerate(models):
            row = table[model].get(finding, {})
            value, low, high = (number(row.get(metric + part)) for part in ("", "_low", "_high"))
            if math.isnan(value):
                continue
            if model in sizes:
                line.append((x, value))
            panel.plot([x, x], [low, high], color=colour[model], lw=1, solid_capstyle="round", zorder=3)
            panel.plot([x], [value], marker.get(model, "o"), color=colour[model], ms=4.5, mec=PAPER, mew=0.4, zorder=4)
        if line and ordered:
            panel.plot(*zip(*line, strict=True), color=MUTED, alpha=0.45, lw=0.9, zorder=2)
        elif not line:
            reason = next((str(rows[finding].get("reason") or "") for rows in table.values() if finding in rows), "")
            text = f"n/a\n{shorten(reason, 34)}".strip()
            panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=MUTED, fontsize=6.5)
        panel.set(xlim=(-0.6, len(models) - 0.4), ylim=(bottom, 1 + 0.04 * (1 - bottom)))
        panel.set_xticks([x for x, _ in ticks], [text for _, text in ticks], fontsize=6.5 if len(models) < 6 else 5.4)
        panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        panel.grid(axis="y")
    _label(figure, x="image side, px" if ordered and all(size.endswith(" px") for size in sizes) else kind)
    handles = [
        Line2D([], [], marker=marker.get(name, "o"), color=colour[name], ls="", ms=4.5, label=shorten(name))
        for name in (models if not ordered else ensembles) if name in table
    ]  # fmt: skip
    _legend(figure, handles, width)
    return figure


def _floor(scores: Mapping[str, Sequence[Row]], metric: str) -> float:
    """Return a round number below all values and intervals."""
    values = [number(row.get(key)) for rows in scores.values() for row in rows for key in (metric, f"{metric}_low")]
    lowest = min(filter(math.isfinite, values), default=0.5)
    return max(0.0, math.floor(lowest * 20 - 0.2) / 20)


@styled()
def weights_bars(
    weights: Float[np.ndarray, "K S"], findings: Sequence[str], sizes: Sequence[str], *, width: float = WIDE
) -> Figure:
    """Plot the weights of the stacked ensemble, whose rows sum to 1, as a stacked bar per finding."""
    figure = Figure(figsize=(width, 0.65 + 0.22 * len(findings)), layout="constrained")
    draw_weights(figure.subplots(), weights, findings, sizes, least=0.4 / width)
    figure.legend(loc="outside upper left", ncols=len(sizes), handlelength=1, handleheight=1, columnspacing=1.2)
    return figure


def draw_weights(
    panel: Axes, weights: Float[np.ndarray, "K S"], findings: Sequence[str], sizes: Sequence[str], *, least: float
) -> None:
    """Draw stacked bars; weights of at least `least` are printed inside the bar."""
    rows, left = np.arange(len(findings)), np.zeros(len(findings))
    for s, (size, colour) in enumerate(zip(sizes, colours(len(sizes)), strict=True)):
        share = np.asarray(weights, np.float64)[:, s]
        panel.barh(rows, share, left=left, height=0.74, color=colour, edgecolor=PAPER, lw=0.6, label=shorten(size, 12))
        for row in rows[share >= least]:
            middle = float(left[row] + share[row] / 2)
            panel.text(
                middle, row, f"{share[row]:.2f}", ha="center", va="center_baseline", color=ink_on(colour), fontsize=6.5
            )
        left += share
    panel.set_yticks(rows, [shorten(finding, 26) for finding in findings], color=INK)
    panel.set(xlim=(0, 1), ylim=(len(findings) - 0.5, -0.5), xlabel="weight")
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)


@styled()
def roc_grid(
    curves: Mapping[str, Mapping[str, Curve]], findings: Sequence[str], sizes: Sequence[str],
    ensembles: Sequence[str] = (), *, width: float = WIDE,
) -> Figure:  # fmt: skip
    """Plot ROC curves: a panel per finding, a line per model (ensembles dashed)."""
    shown = [finding for finding in findings if any(finding in by_finding for by_finding in curves.values())]
    names = [name for name in (*sizes, *ensembles) if name in curves]
    colour = dict(zip((*sizes, *ensembles), colours(len(sizes), len(ensembles)), strict=True))
    figure, panels = panel_grid(len(shown), width, panel=1.6, height=1.6, legend=len(names) > 1)
    for panel, finding in zip(panels, shown, strict=True):
        _unit_square(panel, finding)
        for name in names:
            curve = curves[name].get(finding)
            if curve is not None and np.isfinite(curve.tpr).all() and np.isfinite(curve.fpr).all():
                dashes, order = (_DASHED, 3) if name in ensembles else ("-", 2)
                panel.plot(*_thinned(curve), color=colour[name], ls=dashes, lw=1.2, zorder=order)
    _label(figure, x="false positive rate", y="true positive rate")
    if len(names) > 1:
        lines = [
            Line2D([], [], color=colour[name], ls=_DASHED if name in ensembles else "-", label=shorten(name))
            for name in names
        ]
        _legend(figure, lines, width)
    return figure


def _unit_square(panel: Axes, title: str) -> None:
    panel.plot([0, 1], [0, 1], color=GRID, lw=0.8, zorder=1)
    _title(panel, title)
    panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    panel.set(xticks=[0, 0.5, 1], xticklabels=["0", ".5", "1"], yticks=[0, 0.5, 1], yticklabels=["0", ".5", "1"])


def _thinned(curve: Curve, points: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to about `points` points, spread evenly along it; more would not be visible."""
    fpr, tpr = np.asarray(curve.fpr, np.float64), np.asarray(curve.tpr, np.float64)
    if fpr.size <= points:
        return fpr, tpr
    along = np.concatenate([[0], np.cumsum(np.abs(np.diff(fpr)) + np.abs(np.diff(tpr)))])
    index = np.searchsorted(along, np.linspace(0, along[-1], points)).clip(0, fpr.size - 1)
    index = np.union1d(index, [0, fpr.size - 1])
    return fpr[index], tpr[index]


@styled()
def reliability_grid(reliability: Mapping[str, Reliability], findings: Sequence[str], *, width: float = WIDE) -> Figure:
    """Plot observed frequency against predicted probability, a panel per finding; larger dots have more images."""
    shown = [finding for finding in findings if finding in reliability]
    figure, panels = panel_grid(len(shown), width, panel=1.6, height=1.6)
    (colour,) = colours(1)
    for panel, finding in zip(panels, shown, strict=True):
        bins = reliability[finding]
        _unit_square(panel, finding)
        panel.plot(bins.predicted, bins.observed, color=colour, lw=1, zorder=2)
        area = 6 + 60 * np.asarray(bins.count) / max(1, np.sum(bins.count))
        panel.scatter(bins.predicted, bins.observed, s=area, color=colour, lw=0, zorder=3)
    _label(figure, x="predicted probability", y="observed frequency")
    return figure


@styled()
def loss_curves(training: Mapping[str, Sequence[Row]], sizes: Sequence[str], *, width: float = WIDE) -> Figure:
    """Plot training and validation loss, a panel per size, and the validation AUC of all sizes in the last panel.

    Args:
      training: size -> log rows with keys step, epoch, train_loss, val_loss, val_auroc, which may be missing.
      sizes: order of the panels.
      width: in inches.
    """
    shown = [size for size in sizes if training.get(size)]
    colour = dict(zip(sizes, colours(len(sizes)), strict=True))
    unit = "epoch" if all(number(row.get("epoch")) >= 0 for size in shown for row in training[size]) else "step"
    scored = [size for size in shown if series(training[size], unit, "val_auroc")[0].size]
    figure, panels = panel_grid(len(shown) + bool(scored), width, panel=1.7, height=1.35, legend=True)
    highest = []
    for panel, size in zip(panels, shown, strict=False):
        train, validation = (series(training[size], unit, key) for key in ("train_loss", "val_loss"))
        panel.plot(*train, color=colour[size], lw=1)
        panel.plot(*validation, color=INK, lw=1.1, ls=_DASHED)
        panel.set_title(f"Loss, {shorten(size, 18)}" if len(shown) > 1 else "Loss")
        highest += [np.percentile(y, 98) for _, y in (train, validation) if y.size]
    for panel in panels[: len(shown)]:
        panel.set_ylim(0, 1.08 * max(highest, default=1.0))
    if scored:
        panels[-1].set_title("Validation AUC")
        for size in scored:
            panels[-1].plot(*series(training[size], unit, "val_auroc"), color=colour[size])
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(axis="y")
    _label(figure, x=unit)
    lines = [
        Line2D([], [], color=colour[size], label=shorten(size if len(shown) > 1 else "training")) for size in shown
    ]
    if any(series(training[size], unit, "val_loss")[0].size for size in shown):
        lines.append(Line2D([], [], color=INK, ls=_DASHED, label="validation loss"))
    _legend(figure, lines, width)
    return figure


def series(rows: Sequence[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Return two columns of log rows, f64[n] each, for rows that have both."""
    points = np.array([(number(row.get(x)), number(row.get(y))) for row in rows], np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(1)]
    return points[:, 0], points[:, 1]


@styled()
def size_scatter(image_sizes: Int[np.ndarray, "N 2"], *, width: float = 4.2) -> Figure:
    """Plot widths and heights of the original images, a dot per distinct pair, with both marginal histograms."""
    pairs, count = np.unique(np.asarray(image_sizes), axis=0, return_counts=True)
    figure = Figure(figsize=(width, width), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
    main = figure.add_subplot(grid[1, 0])
    top, side = figure.add_subplot(grid[0, 0], sharex=main), figure.add_subplot(grid[1, 1], sharey=main)
    (colour,) = colours(1)
    main.scatter(pairs[:, 0], pairs[:, 1], s=3 + 12 * np.log10(count), color=colour, alpha=0.5, lw=0, rasterized=True)
    around = np.maximum(0.06 * np.ptp(pairs, axis=0), 0.03 * pairs.max(0))  # not zero for a single size
    low, high = np.maximum(pairs.min(0) - around, 0), pairs.max(0) + around
    bins = [np.linspace(*bounds, 51).tolist() for bounds in zip(low, high, strict=True)]
    main.set(xlabel="width, px", ylabel="height, px", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for axis in (main.xaxis, main.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    top.hist(pairs[:, 0], bins=bins[0], weights=count, color=colour)
    side.hist(pairs[:, 1], bins=bins[1], weights=count, color=colour, orientation="horizontal")
    top.axis("off")
    side.axis("off")
    return figure


def _title(panel: Axes, text: str) -> None:
    short = shorten(text, 27)
    panel.set_title(short, fontsize=7.5 if len(short) <= 20 else 6.2)


def _label(figure: Figure, *, x: str = "", y: str = "") -> None:
    figure.supxlabel(x, fontsize=7, color=MUTED)
    if y:
        figure.supylabel(y, fontsize=7, color=MUTED)


def _legend(figure: Figure, lines: list[Line2D], width: float) -> None:
    if lines:
        figure.legend(handles=lines, loc="outside upper left", ncols=max(1, min(len(lines), int(width / 1.1))))


@styled()
def histogram(content: Histogram, *, width: float = 4.2) -> Figure:
    """Plot a histogram with 40 bins over the range of the values; marks are vertical lines."""
    figure = Figure(figsize=(width, 0.55 * width), layout="constrained")
    panel = figure.subplots()
    (colour,) = colours(1)
    values = np.asarray(content.values, np.float64)
    marks = list(content.marks.values())
    extent = np.append(values, marks)
    low, high = float(extent.min()), float(extent.max())
    around = max(0.05 * (high - low), 0.005)
    bounds = max(0.0, low - around), min(1.0, high + around)
    panel.hist(values, bins=np.linspace(*bounds, 41).tolist(), color=colour)
    for (name, value), shade in zip(content.marks.items(), (INK, *ENSEMBLES), strict=False):
        panel.axvline(value, color=shade, lw=1.1, ls="--", label=f"{shorten(name)} {value:.3f}")
    panel.set(xlim=bounds, xlabel=shorten(content.label, 60), ylabel="passes")
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if content.marks:
        figure.legend(loc="outside upper left", ncols=len(content.marks))
    return figure


@styled()
def matrix(content: Matrix, *, width: float = 4.6) -> Figure:
    """Plot a confusion matrix; the shade of a cell is its fraction of the row."""
    counts = np.asarray(content.counts)
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    figure = Figure(figsize=(width, 0.86 * width), layout="constrained")
    panel = figure.subplots()
    for row, column in np.ndindex(*counts.shape):
        shade = sequential(float(share[row, column]))
        panel.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=shade, ec=PAPER, lw=0.8)
        panel.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=ink_on(shade), fontsize=6.5)
    ticks, names = range(len(content.classes)), [shorten(name, 16) for name in content.classes]
    panel.set_xticks(ticks, names, color=INK, rotation=40, ha="right", rotation_mode="anchor")
    panel.set_yticks(ticks, names, color=INK)
    panel.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    panel.set_xlabel(f"{content.columns} class", color=MUTED)
    panel.set_ylabel(f"{content.rows} class", color=MUTED)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return figure
