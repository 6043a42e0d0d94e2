"""How well maps show where findings are: tables for page and terminal, and hit rates against the limit."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from cxrjax.explain.boxes import BoxScores, HitRate
from cxrjax.explain.localisation import Localisation
from cxrjax.report.content import Table
from cxrjax.report.style import MUTED, PAPER, WIDE, colours, panel_grid, styled, words

ALL, BY_CHANCE = "All findings", "by chance"
NAMES = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "layercam": "LayerCAM",
    "integrated": "Integrated gradients",
}
_LOOKS = {"iou": ("IoU", "o", "-"), "iobb": ("IoBB", "s", (0, (3, 1.2)))}
Located = Mapping[str, tuple[Localisation, BoxScores]]


def tables(located: Located) -> list[Table]:
    """The pointing game, then hit rates by IoU and by IoBB: a row per finding, with intervals and chance."""
    points = Table(
        "Pointing game: maps whose maximum lies in the finding. Energy: share of the map in the finding. By chance "
        "both are the finding's share of the image.",
        ("Finding", "Images", "Hits", "Hit rate", "Energy", "Empty maps"),
        [
            (finding, of.images, of.hits, f"{of.hit_rate:.2f} ({of.low:.2f}–{of.high:.2f}, chance {of.chance:.2f})",
             None if math.isnan(of.energy) else f"{of.energy:.2f} (chance {of.area:.2f})", of.empty)
            for finding, (of, _) in located.items()
        ],
    )  # fmt: skip
    meanings = {
        "iou": "intersection over union of the box around what the map marks and the true box",
        "iobb": "intersection over the area of the box around what the map marks",
    }
    return [points, *(_box_table(located, kind, meaning) for kind, meaning in meanings.items())]


def _box_table(located: Located, kind: str, meaning: str) -> Table:
    limits = [rate.limit for rate in getattr(next(iter(located.values()))[1], kind)]
    rows = []
    for finding, (_, of) in located.items():
        rates: tuple[HitRate, ...] = getattr(of, kind)
        cells = [f"{rate.rate:.2f} ({rate.low:.2f}–{rate.high:.2f})" for rate in rates]
        rows.append((finding, f"{getattr(of, f'mean_{kind}'):.2f}", *cells))
        rows.append((BY_CHANCE, "", *(f"{rate.chance:.2f}" for rate in rates)))
    return Table(
        f"{_LOOKS[kind][0]}, {meaning}: its mean, and the share of images where it is above a limit. By chance: the "
        "same boxes anywhere in the image.",
        ("Finding", "Mean", *(f"> {limit:g}" for limit in limits)),
        rows,
    )


def terminal(table: Table) -> TerminalTable:
    """A table for the terminal; what is in brackets goes below its number."""
    drawn = TerminalTable(
        title=Text(table.caption), title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for number, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        if row[0] == ALL:
            drawn.add_section()
        drawn.add_row(*map(_in_lines, row), style="dim" if row[0] == BY_CHANCE else "")
    return drawn


def _in_lines(cell: Any) -> Text:
    value, _, rest = ("–" if cell is None else str(cell)).partition(" (")
    below = rest.removesuffix(")").replace(", ", "\n").replace("0.", ".")
    return Text.assemble(value, (f"\n{below}" if below else "", "dim"))


@styled()
def hit_rates(located: Located, *, width: float = WIDE) -> Figure:
    """Hit rates against the limit, a panel per finding: IoU and IoBB with their intervals, and what chance gives."""
    shown = sorted(located, key=lambda finding: finding != ALL)
    figure, panels = panel_grid(len(shown), width, panel=1.7, height=1.35, legend=True)
    shades = dict(zip(_LOOKS, colours(3)[::2], strict=True))
    for panel, finding in zip(panels, shown, strict=True):
        points, fit = located[finding]
        panel.set_title(words(finding, 22))
        panel.set_title(f"n = {points.images:,}", loc="right", fontsize=6, fontweight="normal", color=MUTED)
        for kind, shade in shades.items():
            _curve(panel, getattr(fit, kind), kind, shade)
        panel.set(xlim=(0.05, 0.75), ylim=(-0.03, 1.03))
        panel.set_xticks([0.1, 0.3, 0.5, 0.7])
        panel.grid(axis="y")
    figure.supxlabel("overlap is above", fontsize=7, color=MUTED)
    figure.supylabel("share of images", fontsize=7, color=MUTED)
    handles = [
        Line2D([], [], color=shades[kind], marker=marker, ls=dashes, ms=3.5, label=name)
        for kind, (name, marker, dashes) in _LOOKS.items()
    ]
    by_chance = [
        Line2D([], [], color=shades[kind], ls=":", lw=0.9, label=f"{name} by chance")
        for kind, (name, _, _) in _LOOKS.items()
    ]
    figure.legend(handles=handles + by_chance, loc="outside upper left", ncols=4 if width >= 4 else 2)
    return figure


def _curve(panel: Axes, rates: tuple[HitRate, ...], kind: str, shade: str) -> None:
    _, marker, dashes = _LOOKS[kind]
    limits = [rate.limit + (0.006 if kind == "iobb" else -0.006) for rate in rates]
    panel.vlines(limits, [rate.low for rate in rates], [rate.high for rate in rates], color=shade, lw=0.9)
    panel.plot(limits, [rate.rate for rate in rates], marker=marker, ls=dashes, color=shade, ms=3.5, mec=PAPER, mew=0.4)
    panel.plot(limits, [rate.chance for rate in rates], ls=":", color=shade, lw=0.9)
