"""Effective receptive fields of several networks and feature maps, and their sizes against depth."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from cxrjax.report import pictures
from cxrjax.report.content import Field
from cxrjax.report.style import INK, MUTED, PAPER, WIDE, colours, styled, words

_MARKERS = "os^D"


@styled()
def field_grid(fields: Mapping[str, Mapping[str, Field]], *, whole: bool = False, width: float = WIDE) -> Figure:
    """Fields in rows and columns, such as networks and feature maps, on one scale of colour, each with a scale bar.

    Args:
      fields: name of the row -> name of the column -> field; all rows have the same columns.
      whole: show the whole image, else of each column what its widest theoretical field covers, about the centre.
      width: in inches, at most.
    """
    columns = list(dict.fromkeys(name for row in fields.values() for name in row))
    side = min((width - 0.9) / len(columns) - 0.1, 2.2)
    size = (side + 0.1) * len(columns) + 0.9, (side + 0.34) * len(fields) + 0.1
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(fields), len(columns), squeeze=False)
    for row, (network, of) in enumerate(fields.items()):
        panels[row, 0].set_ylabel(words(network), color=INK)
        for column, name in enumerate(columns):
            widest = max(each[name].theoretical_px or math.inf for each in fields.values())
            field = of[name]
            half = 0.5 if whole else min(0.6 * widest / field.map.shape[1], 0.5)
            drawn = pictures.draw_field(panels[row, column], name if row == 0 else "", field, half=half)
            share = f", {field.diameter_fraction:.0%} of width" if whole else ""
            panels[row, column].set_xlabel(f"⌀ {field.diameter_px:.3g} px{share}", color=INK)
    bar = figure.colorbar(drawn, ax=panels.ravel().tolist(), shrink=0.8, aspect=18, pad=0.02, ticks=[0, 0.1, 0.4, 1])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("relative sensitivity")
    return figure


@styled()
def size_by_depth(fields: Mapping[str, Mapping[str, Field]], *, width: float = WIDE) -> Figure:
    """Diameters of the fields of several networks against depth, and the side of the theoretical field.

    Solid lines are by mass, dotted ones by the fitted Gaussian; the axis of sizes is logarithmic.
    """
    figure = Figure(figsize=(min(width, 4.6), 2.7), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(name for row in fields.values() for name in row))
    for (network, row), shade, marker in zip(fields.items(), colours(len(fields) + 1)[::-1], _MARKERS, strict=False):
        places = [names.index(name) for name in row]
        look = {"color": shade, "marker": marker, "ms": 4, "mec": PAPER, "mew": 0.4}
        panel.plot(places, [field.diameter_px for field in row.values()], label=f"{words(network)}, by mass", **look)
        fits = [math.nan if field.gaussian_px is None else field.gaussian_px for field in row.values()]
        if np.isfinite(fits).any():
            panel.plot(places, fits, ls=":", label=f"{words(network)}, Gaussian", **look)
    first = next(iter(fields.values()))
    sides = [field.theoretical_px or math.nan for field in first.values()]
    panel.plot(range(len(names)), sides, color=MUTED, ls=(0, (3, 1.2)), lw=1, label="theoretical")
    across = next(iter(first.values())).map.shape[1]
    panel.axhline(across, color=MUTED, lw=0.6)
    panel.annotate("width of the image", (0, across), (0, 2), textcoords="offset points", color=MUTED, fontsize=6)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xticks(range(len(names)), [words(name, 14) for name in names], rotation=30 if len(names) > 5 else 0)
    panel.set(ylabel="size, px", xlim=(-0.3, len(names) - 0.7))
    panel.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return figure
