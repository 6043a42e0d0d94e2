"""A scale bar of a round length on a picture of an image's frame."""

import math

from matplotlib import patheffects
from matplotlib.axes import Axes

from cxrjax.report.style import WHITE

_AROUND = [patheffects.withStroke(linewidth=2.2, foreground="#101418")]


def round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most `most`, which is above 0."""
    power = 10.0 ** math.floor(math.log10(most))
    return power * next(step for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))


def scale_bar(panel: Axes, across: int, width_cm: float | None = None) -> None:
    """Draw a bar of a round length, at most a third of what the panel shows.

    Args:
      panel: whose coordinates are fractions of the image's sides.
      across: width of the image, px.
      width_cm: of what the image shows; then the length is round in cm, else in px.
    """
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    shown = (right - left) * across / 3
    if width_cm is None:
        pixels = round_length(max(shown, 1))
        label = f"{pixels:g} px"
    else:
        per_px = width_cm / across
        length = round_length(shown * per_px)
        pixels = length / per_px
        label = f"{length:g} cm" if length >= 1 else f"{10 * length:g} mm"
        label = f"{label} ({pixels:.0f} px)"
    x, y = left + 0.06 * (right - left), bottom + 0.06 * (top - bottom)
    panel.plot([x, x + pixels / across], [y, y], color=WHITE, lw=1.6, solid_capstyle="butt", path_effects=_AROUND)
    above = y + 0.035 * (top - bottom)
    panel.text(x, above, label, color=WHITE, fontsize=6.2, va="bottom", path_effects=_AROUND)
