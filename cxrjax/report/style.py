"""The style of all figures, and how figures are written to files and embedded in pages."""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure

from cxrjax.errors import CxrError
from cxrjax.files import atomic_path

WIDE, NARROW = 7.2, 3.4
"""Figure widths in inches: two columns of a journal (desktop), one column (phone)."""

INK, MUTED, GRID, PAPER = "#1d2329", "#5f6873", "#d9dde2", "#fefefe"
"""Colours that a page replaces with those of its light or dark theme."""
WHITE = "#fffffe"
"""White in both themes."""
ENSEMBLES = ("#d55e00", "#8b8f94", "#b8860b", "#b05a8c")
"""Colours of ensembles, distinct from the sizes' teal to violet with any colour vision."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 7.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 4,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "cxrjax",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 6.5,
    "xtick.major.size": 2,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelsize": 6.5,
    "ytick.major.size": 2,
    "ytick.major.width": 0.6,
}

_RAMP = LinearSegmentedColormap.from_list("sizes", ["#58c6b6", "#2f98c8", "#4a69c0", "#6a3a9c"])

_SHADES = LinearSegmentedColormap.from_list("shades", ["#f3f6fa", "#58c6b6", "#2f98c8", "#3f52a0"])


def styled():
    """Return a context manager and decorator that applies the style."""
    return mpl.rc_context(STYLE)


def colours(sizes: int, ensembles: int = 0) -> list[str]:
    """Return hex colours of the sizes, light to dark, then of the ensembles."""
    ramp = [to_hex(_RAMP(x)) for x in np.linspace(0, 1, sizes)] if sizes > 1 else [to_hex(_RAMP(0.45))] * sizes
    return ramp + [ENSEMBLES[i % len(ENSEMBLES)] for i in range(ensembles)]


def sequential(fraction: float) -> str:
    """Return the hex colour of a fraction, from nearly white at 0 to dark at 1."""
    return to_hex(_SHADES(fraction))


def ink_on(colour: str) -> str:
    """Return white or black, whichever contrasts more with a hex colour: at least 4.5 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return WHITE if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def shorten(text: object, most: int = 30) -> str:
    """Return `text` as one line of at most `most` printable characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def panel_grid(
    count: int, width: float, *, panel: float, height: float, legend: bool = False, smallest: int = 1
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, about `panel` inches wide and `height` high, and the panels."""
    columns = max(smallest, min(count, int(width / panel)))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(width, rows * height + (0.4 if legend else 0.2)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def save(figure: Figure, path: str | Path, *, dpi: int = 200) -> Path:
    """Write a figure as SVG, PNG or PDF, by the suffix; the file is written atomically and is reproducible."""
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("svg", "png", "pdf"):
        raise CxrError(f"figure {path}: the suffix must be .svg, .png, .pdf")
    return write(path, render(figure, kind, dpi))


def render(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """Return a figure as "svg", "png" or "pdf" bytes, without a date."""
    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    with styled(), warnings.catch_warnings():
        # An SVG is drawn with the reader's fonts, which may have the glyph.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=undated[kind])
    return buffer.getvalue()


def write(path: str | Path, data: bytes) -> Path:
    """Write a file atomically, and return its path."""
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


_INHERITED = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)", "#ffffff": "none"}
_NAMESPACE = re.compile(r"^\{[^}]*\}")
_REFERENCE = re.compile(r"#([\w.-]+)")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as an `<svg>` element that takes the width, colours and font of its page.

    Args:
      figure: the figure.
      name: prefix of its ids, unique in the page.
      label: text for screen readers.
    """
    root = ET.fromstring(render(figure, "svg", dpi=220))
    for parent in list(root.iter()):
        for child in list(parent):
            if _NAMESPACE.sub("", child.tag) in ("metadata", "style"):
                parent.remove(child)
    links = ("clip-path", "href")
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        element.attrib = {_NAMESPACE.sub("", key): value for key, value in element.attrib.items()}
    used = {match for element in root.iter() for key in links for match in _REFERENCE.findall(element.get(key, ""))}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in used:
                    element.set(key, f"{name}-{value}")
                else:
                    del element.attrib[key]
            elif key in links and not value.startswith("data:"):
                element.set(key, _REFERENCE.sub(rf"#{name}-\1", value))
            elif key == "style":
                element.set(key, _page_style(value))
            elif key in ("d", "x", "y", "width", "height", "transform"):
                element.set(key, _DECIMALS.sub(lambda m: f"{float(m[0]):.2f}", value).replace("\n", ""))
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ET.tostring(root, encoding="unicode"))


def _page_style(style: str) -> str:
    style = re.sub(r"font-family: [^;]*", "font-family: var(--sans)", style)
    return re.sub(r"#[0-9a-f]{6}", lambda m: _INHERITED.get(m[0], m[0]), style)
