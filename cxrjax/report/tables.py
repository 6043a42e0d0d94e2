"""Tables of scores and of localisation results: for pages, for the terminal, and as CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from cxrjax.explain.boxes import BoxScores, HitRate
from cxrjax.explain.localisation import Localisation
from cxrjax.metrics.scores import MEAN
from cxrjax.report.content import Row, Table, by_finding, number

METRICS = {"auroc": "AUC", "average_precision": "Average precision"}
COLUMNS = (
    "finding", "auroc", "auroc_low", "auroc_high", "average_precision", "average_precision_low",
    "average_precision_high", "positives", "negatives", "reason",
)  # fmt: skip
ALL, CHANCE = "All findings", "by chance"
METHOD_NAMES = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "layercam": "LayerCAM",
    "integrated": "Integrated gradients",
}
OVERLAPS = {"iou": "IoU", "iobb": "IoBB"}
Located = Mapping[str, tuple[Localisation, BoxScores]]


@dataclass(frozen=True)
class Cell:
    """A score as text, such as "0.921", its interval "0.902–0.938" (or why there is none), and its rank."""

    value: float
    text: str
    interval: str
    best: bool = False
    best_size: bool = False


@dataclass(frozen=True)
class Line:
    """A finding (or the mean): numbers of positive and negative images, a cell per model, and a note."""

    finding: str
    positives: int | None
    negatives: int | None
    cells: tuple[Cell, ...]
    is_mean: bool = False
    note: str = ""


def score_lines(
    scores: Mapping[str, Sequence[Row]], findings: Sequence[str], sizes: Sequence[str], metric: str = "auroc"
) -> list[Line]:
    """Return the lines of a table of scores: findings in order, then the mean.

    `best` marks the highest value of a line, `best_size` the highest among the models in `sizes`. Values that print the
    same are tied; a value without others to compare with is not marked.

    Args:
      scores: model -> rows, in the order of the columns.
      findings: names, in the order of the lines.
      sizes: models that are single sizes.
      metric: "auroc" or "average_precision".
    """
    table = by_finding(scores)
    result = []
    for finding in (*findings, MEAN):
        rows: dict[str, Row] = {model: scored.get(finding, {}) for model, scored in table.items()}
        if not any(rows.values()):
            continue
        values = {model: number(row.get(metric)) for model, row in rows.items()}
        best = _highest(values.values())
        best_size = _highest(value for model, value in values.items() if model in sizes)
        cells = []
        for model, value in values.items():
            text, interval = _texts(rows[model], metric)
            cells.append(Cell(value, text, interval, text == best, model in sizes and text == best_size))
        count = next((row for row in rows.values() if row.get("positives") is not None), {})
        notes = {str(rows[model].get("reason") or "") for model, value in values.items() if not math.isnan(value)}
        note = "; ".join(sorted(notes - {""}))
        result.append(
            Line(finding, count.get("positives"), count.get("negatives"), tuple(cells), finding == MEAN, note)
        )
    return result


def _texts(row: Row, metric: str) -> tuple[str, str]:
    if not row:
        return "–", ""
    value, low, high = (number(row.get(metric + suffix)) for suffix in ("", "_low", "_high"))
    if math.isnan(value):
        return "n/a", str(row.get("reason") or "")
    return _format(value), "" if math.isnan(low + high) else f"{_format(low)}–{_format(high)}"


def _format(value: float) -> str:
    return f"{value:.3f}"


def _highest(values: Iterable[float]) -> str | None:
    finite = [value for value in values if not math.isnan(value)]
    return _format(max(finite)) if len(finite) > 1 else None


def terminal_scores(
    scores: Mapping[str, Sequence[Row]], findings: Sequence[str], sizes: Sequence[str] = (), *,
    metric: str = "auroc", title: str | None = None,
) -> TerminalTable:  # fmt: skip
    """Return a terminal table of scores with their intervals; the best of each finding is bold."""
    table = TerminalTable(
        title=None if title is None else Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    longest = max((len(word) for finding in findings for word in finding.split()), default=0)
    table.add_column(METRICS[metric], min_width=min(max(longest, 12), 24), overflow="fold")
    for model in scores:
        table.add_column(Text(model), justify="right", min_width=9, overflow="fold")
    for line in score_lines(scores, findings, sizes, metric):
        if line.is_mean:
            table.add_section()
        note = line.note if line.positives is None else f"{line.positives:,} positive"
        table.add_row(
            _two_lines("Mean" if line.is_mean else line.finding, note),
            *(_two_lines(cell.text, _short_interval(cell), bold=cell.best) for cell in line.cells),
        )
    return table


def likeliest_findings(
    names: Sequence[str],
    findings: Sequence[str],
    probability: Float[np.ndarray, "N K"],
    uncertain: Sequence[bool] | np.ndarray | None = None,
    most: int = 40,
) -> TerminalTable:
    """Return a terminal table of the most likely findings of each image, for the first `most` images."""
    table = TerminalTable("image", "most likely findings", "", box=box.SIMPLE_HEAD, show_edge=False)
    flags = [False] * len(names) if uncertain is None else uncertain
    for name, row, flag in list(zip(names, probability, flags, strict=True))[:most]:
        order = np.argsort(-row)[:4]
        likeliest = ", ".join(f"{findings[k]} {row[k]:.3f}" for k in order)
        table.add_row(Text(name), Text(likeliest), "uncertain" if flag else "")
    if len(names) > most:
        table.add_row(Text(f"and {len(names) - most} more", "dim"))
    return table


def _two_lines(text: str, note: str, *, bold: bool = False) -> Text:
    return Text.assemble((text, "bold" if bold else ""), (f"\n{note}" if note else "", "dim"))


def _short_interval(cell: Cell) -> str:
    if math.isnan(cell.value) and cell.interval:
        return f"({cell.interval})"
    return cell.interval.replace("0.", ".").replace("1.000", "1.00")  # nine characters


def scores_csv(scores: Mapping[str, Sequence[Row]]) -> str:
    """Return all scores as CSV at full precision, a line per model and finding; NaN is `n/a`, with a `reason`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", *COLUMNS))
    for model, rows in scores.items():
        for row in rows:
            writer.writerow((model, *(_csv_value(row.get(column)) for column in COLUMNS)))
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str | Integral):
        return value
    return "n/a" if math.isnan(value) else float(value)


def localisation_tables(located: Located) -> list[Table]:
    """Return tables of the pointing game and of hit rates by IoU and IoBB: a row per finding, with chance levels."""
    points = Table(
        "Pointing game: maps whose maximum is inside the finding. Energy: fraction of the map inside the finding. The "
        "chance level of both is the finding's fraction of the image.",
        ("Finding", "Images", "Hits", "Hit rate", "Energy", "Empty maps"),
        [
            (finding, score.images, score.hits,
             f"{score.hit_rate:.2f} ({score.low:.2f}–{score.high:.2f}, chance {score.chance:.2f})",
             None if math.isnan(score.energy) else f"{score.energy:.2f} (chance {score.area:.2f})", score.empty)
            for finding, (score, _) in located.items()
        ],
    )  # fmt: skip
    meanings = {
        "iou": "intersection over union of detected and true box",
        "iobb": "intersection over the area of the detected box",
    }
    return [points, *(_box_table(located, kind, meaning) for kind, meaning in meanings.items())]


def _box_table(located: Located, kind: str, meaning: str) -> Table:
    limits = [rate.limit for rate in getattr(next(iter(located.values()))[1], kind)]
    rows = []
    for finding, (_, score) in located.items():
        rates: tuple[HitRate, ...] = getattr(score, kind)
        cells = [f"{rate.rate:.2f} ({rate.low:.2f}–{rate.high:.2f})" for rate in rates]
        rows.append((finding, f"{getattr(score, f'mean_{kind}'):.2f}", *cells))
        rows.append((CHANCE, "", *(f"{rate.chance:.2f}" for rate in rates)))
    return Table(
        f"{OVERLAPS[kind]}, {meaning}: its mean, and the fraction of images above each limit. By chance: the same "
        "boxes placed at random in the image.",
        ("Finding", "Mean", *(f"> {limit:g}" for limit in limits)),
        rows,
    )


def terminal_table(table: Table) -> TerminalTable:
    """Return a table for the terminal, with text in brackets below its number."""
    result = TerminalTable(
        title=Text(table.caption), title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for index, column in enumerate(table.columns):
        result.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        if row[0] == ALL:
            result.add_section()
        result.add_row(*map(_in_lines, row), style="dim" if row[0] == CHANCE else "")
    return result


def _in_lines(cell: Any) -> Text:
    value, _, rest = ("–" if cell is None else str(cell)).partition(" (")
    below = rest.removesuffix(")").replace(", ", "\n").replace("0.", ".")
    return Text.assemble(value, (f"\n{below}" if below else "", "dim"))
