"""Figures of effective receptive fields, and class activation maps overlaid on images."""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from cxrjax.report.content import Cam, ErfMap
from cxrjax.report.style import INK, MUTED, PAPER, WHITE, WIDE, colours, panel_grid, shorten, styled

_OUTLINE = (0, 229, 255)
_DASHES = ((255, 255, 255), (16, 20, 24))
"""Of detected boxes: alternately light and dark, to be visible on any background."""


def overlay(cam: Cam, side: int = 288) -> UInt8[np.ndarray, "h w 3"]:
    """Return a class activation map overlaid on its image.

    Args:
      cam: image and map; a true mask is outlined in cyan, detected boxes are dashed.
      side: longer side of the result, px. Smaller images are enlarged without interpolation, larger ones are averaged;
        the map is interpolated.

    Returns:
      uint8[h, w, 3].
    """
    height, width = cam.image.shape
    size = (max(1, round(side * width / max(height, width))), max(1, round(side * height / max(height, width))))
    grey = Image.fromarray(np.asarray(cam.image, np.uint8))
    resampling = Image.Resampling.NEAREST if max(height, width) <= side else Image.Resampling.BOX
    base = np.asarray(grey.resize(size, resampling), np.float32)[..., None]
    heat = Image.fromarray(np.clip(np.nan_to_num(cam.cam), 0, 1).astype(np.float32))
    heat = np.asarray(heat.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = mpl.colormaps["inferno"](heat)[..., :3].astype(np.float32) * 255
    alpha = 0.65 * heat[..., None] ** 0.8
    picture = (base * (1 - alpha) + colour * alpha).round().astype(np.uint8)
    if cam.mask is not None:
        inside = np.asarray(Image.fromarray(np.asarray(cam.mask, np.uint8) * 255).resize(size)) > 127
        picture[_edge(inside, max(1, side // 144))] = _OUTLINE
    for box in () if cam.boxes is None else cam.boxes:
        _dash(picture, box, max(1, side // 144))
    return picture


def _dash(picture: UInt8[np.ndarray, "h w 3"], box: np.ndarray, thickness: int) -> None:
    """Draw the edge of a box, given as fractions of the sides, with dashes six times as long as thick."""
    height, width = picture.shape[:2]
    left, top = round(box[0] * width), round(box[1] * height)
    right, bottom = max(round((box[0] + box[2]) * width), left + 1), max(round((box[1] + box[3]) * height), top + 1)
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    edge = _edge(inside, thickness)
    y, x = np.indices(edge.shape)
    dark = (x + y) // (6 * thickness) % 2 == 1
    for colour, where in zip(_DASHES, (~dark, dark), strict=True):
        picture[edge & where] = colour


def _edge(inside: np.ndarray, thickness: int) -> np.ndarray:
    core = inside
    for _ in range(thickness):
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def mass_level(field: Float[np.ndarray, "H W"], mass: float = 0.9545) -> float:
    """Return the contour level: cells of `field` with at least this value hold `mass` of its sum."""
    values = np.sort(np.asarray(field, np.float64), axis=None)[::-1]
    total = np.cumsum(values)
    return float(values[np.searchsorted(total, mass * total[-1])])


def jpeg_uri(picture: np.ndarray, quality: int = 82) -> str:
    """Return a `data:` URI of uint8[H, W] or uint8[H, W, 3] as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@styled()
def erf_maps(erfs: Mapping[str, ErfMap], *, width: float = WIDE) -> Figure:
    """Plot effective receptive fields over the image area (square-root scale), with the contour of their mass."""
    figure, panels = panel_grid(len(erfs), width, panel=1.7, height=1.75, smallest=2)
    drawn = [draw_erf(panel, size, field) for panel, (size, field) in zip(panels, erfs.items(), strict=True)]
    _add_colorbar(figure, drawn[0], panels)
    return figure


def _add_colorbar(figure: Figure, image: AxesImage, panels: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=18, pad=0.02, ticks=[0, 0.1, 0.4, 1])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("relative sensitivity")


def draw_erf(panel: Axes, size: str, field: ErfMap, *, half: float = 0.5) -> AxesImage:
    """Draw an effective receptive field with a scale bar; the axes are 0 to 1 across the image.

    If `half` is below 1/2, only that fraction of the image on each side of the field's centre of mass is shown.
    """
    values = np.asarray(field.map, np.float64)
    image = panel.imshow(values, cmap="magma", norm=PowerNorm(0.5, 0, 1), extent=(0, 1, 1, 0), interpolation="nearest")
    height, across = values.shape
    x, y = (np.arange(across) + 0.5) / across, (np.arange(height) + 0.5) / height
    panel.contour(x, y, values, levels=[mass_level(values, field.mass)], colors="#7fe3ff", linewidths=0.7)
    if half < 0.5:
        share = values / values.sum()
        column, row = float(share.sum(0) @ x), float(share.sum(1) @ y)
        panel.set(xlim=(column - half, column + half), ylim=(row + half, row - half))
    else:
        panel.set(xlim=(0, 1), ylim=(1, 0))
    scale_bar(panel, across, field.width_cm)
    panel.set_title(shorten(size))
    panel.set_xlabel(f"⌀ {field.diameter_px:.0f} px, {field.diameter_fraction:.0%} of width", color=INK)
    panel.set(xticks=[], yticks=[], aspect="equal", facecolor="black")
    panel.spines[:].set_visible(False)
    return image


@styled()
def gradcam_grid(
    cams: Mapping[str, Mapping[str, Cam]], findings: Sequence[str], sizes: Sequence[str], *, width: float = WIDE
) -> Figure:
    """Plot class activation maps with probabilities and true outlines (cyan): a row per finding, a column per size.

    Findings with a probability above 0.5 are listed below each map that has them.
    """
    rows = [finding for finding in findings if cams.get(finding)]
    columns = [size for size in sizes if any(size in cams[finding] for finding in rows)]
    side = (width - 0.3) / max(1, len(columns))
    below = {(f, s): _lines(describe_positives(cam), side) for f in rows for s, cam in cams[f].items()}
    lines = max((text.count("\n") + 1 for text in below.values() if text), default=0)
    figure = Figure(figsize=(width, 0.3 + len(rows) * (side + 0.05 + 0.1 * lines)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for r, finding in enumerate(rows):
        panels[r, 0].set_ylabel(shorten(finding), color=INK)
        for c, size in enumerate(columns):
            panel, cam = panels[r, c], cams[finding].get(size)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if r == 0:
                panel.set_title(shorten(size), loc="center")
            if cam is not None:
                panel.imshow(overlay(cam), interpolation="nearest")
                panel.set_xlabel(below[finding, size], fontsize=5.6, labelpad=2)
                panel.text(
                    0.04, 0.95, f"{cam.probability:.2f}", transform=panel.transAxes, va="top", color=WHITE, fontsize=7,
                    fontweight="bold" if cam.probability >= 0.5 else "normal",
                    bbox={"facecolor": "#101418", "edgecolor": "none", "alpha": 0.6, "pad": 1.5},
                )  # fmt: skip
    return figure


def describe_positives(cam: Cam) -> str:
    """List the findings with a probability above 0.5, the most likely first; empty if the map has none recorded."""
    if cam.positives is None:
        return ""
    ranked = sorted(cam.positives.items(), key=lambda item: -item[1])
    return ", ".join(f"{shorten(name, 24)} {probability:.2f}" for name, probability in ranked) or "none above 0.50"


def _lines(text: str, side: float) -> str:
    """Wrap a text to the width of a map of `side` inches."""
    return "\n".join(textwrap.wrap(text, max(12, int(side * 25)), max_lines=3, placeholder=" …"))


_MARKERS = "os^D"


@styled()
def erf_grid(erfs: Mapping[str, Mapping[str, ErfMap]], *, whole: bool = False, width: float = WIDE) -> Figure:
    """Plot a grid of effective receptive fields, such as networks x feature maps, with one colour scale.

    Args:
      erfs: row -> column -> field; all rows have the same columns.
      whole: show the whole image; otherwise, the area of each column's widest theoretical field.
      width: maximum width in inches.
    """
    columns = list(dict.fromkeys(name for row in erfs.values() for name in row))
    side = min((width - 0.9) / len(columns) - 0.1, 2.2)
    size = (side + 0.1) * len(columns) + 0.9, (side + 0.34) * len(erfs) + 0.1
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(erfs), len(columns), squeeze=False)
    for row, (network, by_layer) in enumerate(erfs.items()):
        panels[row, 0].set_ylabel(shorten(network), color=INK)
        for column, name in enumerate(columns):
            widest = max(fields[name].theoretical_px or math.inf for fields in erfs.values())
            field = by_layer[name]
            half = 0.5 if whole else min(0.6 * widest / field.map.shape[1], 0.5)
            drawn = draw_erf(panels[row, column], name if row == 0 else "", field, half=half)
            share = f", {field.diameter_fraction:.0%} of width" if whole else ""
            panels[row, column].set_xlabel(f"⌀ {field.diameter_px:.3g} px{share}", color=INK)
    _add_colorbar(figure, drawn, panels.ravel().tolist())
    return figure


@styled()
def size_by_depth(erfs: Mapping[str, Mapping[str, ErfMap]], *, width: float = WIDE) -> Figure:
    """Plot the diameters of several networks' fields against depth, and the side of the theoretical field.

    Solid lines are diameters by mass, dotted lines by a fitted Gaussian; the size axis is logarithmic.
    """
    figure = Figure(figsize=(min(width, 4.6), 2.7), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(name for row in erfs.values() for name in row))
    for (network, row), shade, marker in zip(erfs.items(), colours(len(erfs) + 1)[::-1], _MARKERS, strict=False):
        places = [names.index(name) for name in row]
        look = {"color": shade, "marker": marker, "ms": 4, "mec": PAPER, "mew": 0.4}
        panel.plot(places, [field.diameter_px for field in row.values()], label=f"{shorten(network)}, by mass", **look)
        fits = [math.nan if field.gaussian_px is None else field.gaussian_px for field in row.values()]
        if np.isfinite(fits).any():
            panel.plot(places, fits, ls=":", label=f"{shorten(network)}, Gaussian", **look)
    first = next(iter(erfs.values()))
    sides = [field.theoretical_px or math.nan for field in first.values()]
    panel.plot(range(len(names)), sides, color=MUTED, ls=(0, (3, 1.2)), lw=1, label="theoretical")
    across = next(iter(first.values())).map.shape[1]
    panel.axhline(across, color=MUTED, lw=0.6)
    panel.annotate("width of the image", (0, across), (0, 2), textcoords="offset points", color=MUTED, fontsize=6)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xticks(range(len(names)), [shorten(name, 14) for name in names], rotation=30 if len(names) > 5 else 0)
    panel.set(ylabel="size, px", xlim=(-0.3, len(names) - 0.7))
    panel.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


_AROUND = [patheffects.withStroke(linewidth=2.2, foreground="#101418")]


def round_length(most: float) -> float:
    """Return the largest number not above `most` that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(most))
    return power * next(step for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))


def scale_bar(panel: Axes, across: int, width_cm: float | None = None) -> None:
    """Draw a scale bar of a round length, at most a third of the panel.

    Args:
      panel: axes whose coordinates are fractions of the image's sides.
      across: width of the image, px.
      width_cm: width in cm of what the image shows; if given, the length is round in cm, otherwise in px.
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
