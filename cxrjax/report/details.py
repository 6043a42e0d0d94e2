"""Plots of one thing: how values are spread, which class was taken for which."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrjax.report.content import Histogram, Matrix
from cxrjax.report.style import ENSEMBLES, INK, MUTED, PAPER, colours, ink_on, sequential, styled, words


@styled()
def histogram(content: Histogram, *, width: float = 4.2) -> Figure:
    """How often values occur, in 40 bins over their range; marks are upright lines."""
    figure = Figure(figsize=(width, 0.55 * width), layout="constrained")
    panel = figure.subplots()
    (colour,) = colours(1)
    values = np.asarray(content.values, np.float64)
    marks = list(content.marks.values())
    every = np.append(values, marks)
    low, high = float(every.min()), float(every.max())
    around = max(0.05 * (high - low), 0.005)
    bounds = max(0.0, low - around), min(1.0, high + around)
    panel.hist(values, bins=np.linspace(*bounds, 41).tolist(), color=colour)
    for (name, value), shade in zip(content.marks.items(), (INK, *ENSEMBLES), strict=False):
        panel.axvline(value, color=shade, lw=1.1, ls="--", label=f"{words(name)} {value:.3f}")
    panel.set(xlim=bounds, xlabel=words(content.label, 60), ylabel="passes")
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if content.marks:
        figure.legend(loc="outside upper left", ncols=len(content.marks))
    return figure


@styled()
def matrix(content: Matrix, *, width: float = 4.6) -> Figure:
    """A confusion matrix: each count, on a shade that grows with its share of the row."""
    counts = np.asarray(content.counts)
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    figure = Figure(figsize=(width, 0.86 * width), layout="constrained")
    panel = figure.subplots()
    for row, column in np.ndindex(*counts.shape):
        shade = sequential(float(share[row, column]))
        panel.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=shade, ec=PAPER, lw=0.8)
        panel.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=ink_on(shade), fontsize=6.5)
    places, names = range(len(content.classes)), [words(name, 16) for name in content.classes]
    panel.set_xticks(places, names, color=INK, rotation=40, ha="right", rotation_mode="anchor")
    panel.set_yticks(places, names, color=INK)
    panel.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    panel.set_xlabel(f"{content.columns} class", color=MUTED)
    panel.set_ylabel(f"{content.rows} class", color=MUTED)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return figure
