"""Effective receptive fields side by side, each with a scale bar, and their sizes against depth."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxrjax.report import pictures
from cxrjax.report.content import Field
from cxrjax.report.style import INK, MUTED, PAPER, WHITE, WIDE, colours, styled, words

_MARKERS = "os^D"


def round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most `most`, which is above 0."""
    power = 10.0 ** math.floor(math.log10(most))
    return power * next(step for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))


def scale_bar(panel: Axes, field: Field) -> None:
    """A bar of a round length, at most a third of what the panel shows: in cm too where the image's width is known."""
    across = field.map.shape[1]
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    shown = (right - left) * across / 3
    if field.width_cm is None:
        pixels = round_length(max(shown, 1))
        label = f"{pixels:g} px"
    else:
        per_px = field.width_cm / across
        length = round_length(shown * per_px)
        pixels = length / per_px
        label = f"{length:g} cm" if length >= 1 else f"{10 * length:g} mm"
        label = f"{label} ({pixels:.0f} px)"
    x, y = left + 0.06 * (right - left), bottom + 0.06 * (top - bottom)
    around = [patheffects.withStroke(linewidth=2.2, foreground="#101418")]
    panel.plot([x, x + pixels / across], [y, y], color=WHITE, lw=1.6, solid_capstyle="butt", path_effects=around)
    above = y + 0.035 * (top - bottom)
    panel.text(x, above, label, color=WHITE, fontsize=6.2, va="bottom", path_effects=around)


@styled()
def field_grid(fields: Mapping[str, Mapping[str, Field]], *, width: float = WIDE) -> Figure:
    """Fields of several networks (down) and feature maps (across), each on the same scale of colour.

    What a feature map cannot see is cut off: a column shows the part of the image that its widest field needs.
    """
    columns = list(dict.fromkeys(name for row in fields.values() for name in row))
    side = min((width - 0.9) / len(columns), 2.4)
    figure = Figure(figsize=(side * len(columns) + 0.9, (side + 0.42) * len(fields) + 0.1), layout="constrained")
    panels = figure.subplots(len(fields), len(columns), squeeze=False)
    drawn = None
    for row, (network, of) in enumerate(fields.items()):
        panels[row, 0].set_ylabel(words(network), color=INK)
        for column, name in enumerate(columns):
            panel, field = panels[row, column], of[name]
            drawn = pictures.draw_field(panel, name if row == 0 else "", field)
            half = window(max(each[name].theoretical_px or math.inf for each in fields.values()), field.map.shape[1])
            panel.set(xlim=(0.5 - half, 0.5 + half), ylim=(0.5 + half, 0.5 - half))
            panel.set_xlabel(f"⌀ {field.diameter_px:.3g} px", color=INK)
            scale_bar(panel, field)
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=panels.ravel().tolist(), shrink=0.8, aspect=18, pad=0.02, ticks=[0, 0.1, 0.4, 1])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("relative sensitivity")
    return figure


def window(pixels: float, across: int) -> float:
    """Half the side of the part of the image to show around its centre, as a fraction of its width: 1/2 for all."""
    return 0.5 if pixels == 0 else min(0.6 * pixels / across, 0.5)


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
