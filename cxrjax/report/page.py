"""Self-contained HTML pages of studies and runs: inline SVG and embedded pictures, no scripts, no network."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxrjax.explain.boxes import HitRate
from cxrjax.metrics.scores import MEAN
from cxrjax.report import pictures, plots, style, tables
from cxrjax.report.content import (
    Cam,
    Diagrams,
    ErfMap,
    Histogram,
    MapsReport,
    Matrix,
    RunReport,
    StudyReport,
    Table,
    by_finding,
    number,
)
from cxrjax.report.style import GRID, INK, MUTED, PAPER, WIDE, colours, panel_grid, shorten, styled

_LABELS = {
    "auc": "AUC of each model, for the mean and for each finding; see the table of AUCs for the numbers",
    "weights": "Stacked bars: the weight of each image size in the ensemble, for each finding",
    "roc": "ROC curves, one panel per finding",
    "training": "Training and validation loss",
    "erf": "Effective receptive fields; see the table below for their sizes",
    "sizes": "Widths and heights of the original images",
    "hits": "Fraction of images whose overlap is above each limit, by finding; see the tables for the numbers",
    "reliability": "Observed frequency against predicted probability, one panel per finding",
}


@dataclass(frozen=True)
class Plot:
    """A figure as two `<svg>` elements for wide and narrow pages."""

    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Picture:
    """A class activation map as an `<img>`: data URI, size or arm, probability, alt text, and positive findings."""

    uri: str
    size: str
    probability: float
    alt: str
    positives: str


def study_page(report: StudyReport) -> str:
    """Return the page of a study as HTML."""
    labels = {
        name: content.caption for section in report.sections for name, content in section.figures.items()
    } | _LABELS  # fmt: skip
    plots = _plots([study_plots(report, width) for width in (style.WIDE, style.NARROW)], labels)
    scores = {model: report.scores[model] for model in report.models}
    return _render(
        "study.html.j2",
        report=report,
        plots=plots,
        auc=tables.score_lines(scores, report.findings, report.sizes),
        precision=tables.score_lines(scores, report.findings, report.sizes, "average_precision"),
        field_table=_field_table(report.erfs),
        cams={finding: _pictures(finding, row) for finding, row in report.cams.items() if row},
    )


def run_page(report: RunReport) -> str:
    """Return the page of an evaluated run as HTML."""
    plots = _plots([run_figures(report, width) for width in (style.WIDE, style.NARROW)], _LABELS)
    rows = {report.title: report.scores}
    auc, precision = (tables.score_lines(rows, report.findings, (), metric) for metric in tables.METRICS)
    lines = [replace(a, cells=a.cells + p.cells) for a, p in zip(auc, precision, strict=True)]
    return _render("run.html.j2", report=report, plots=plots, lines=lines, columns=list(tables.METRICS.values()))


def maps_page(report: MapsReport) -> str:
    """Return the page of a run's saliency maps as HTML."""
    widths = (style.WIDE, style.NARROW) if report.located else ()
    drawn = [{"hits": hit_rates(report.located, width=width)} for width in widths]
    cams = {finding: _pictures(finding, row) for finding, row in report.cams.items()}
    return _render("maps.html.j2", report=report, plots=_plots(drawn, _LABELS) if drawn else {}, cams=cams)


def write_page(report: StudyReport | RunReport | MapsReport, path: str | Path) -> Path:
    """Write the page of a report atomically, and return its path."""
    if isinstance(report, StudyReport):
        html = study_page(report)
    else:
        html = run_page(report) if isinstance(report, RunReport) else maps_page(report)
    return style.write(path, html.encode("utf-8", errors="replace"))


def _plots(drawn: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> dict[str, Plot]:
    """Return each figure at both widths; `drawn` has the wide ones first."""
    wide, narrow = drawn
    return {
        name: Plot(
            style.inline_svg(wide[name], f"{name}-wide", labels[name]),
            style.inline_svg(narrow[name], f"{name}-narrow", labels[name]),
        )
        for name in wide
    }


def _field_table(erfs: Mapping[str, ErfMap]) -> Table:
    rows = [
        (
            size, f"{field.diameter_px:.1f}", f"{field.diameter_fraction:.1%}", f"{field.area_fraction:.1%}",
            None if field.gaussian_px is None else f"{field.gaussian_px:.1f}",
            None if field.theoretical_px is None else f"{field.theoretical_px:.0f}",
        )
        for size, field in erfs.items()
    ]  # fmt: skip
    columns = ("Image", "Effective, px", "of the width", "of the area", "Gaussian fit, px", "Theoretical, px")
    return Table(
        "Sizes of the receptive fields: diameter of the effective one, by mass and by a fitted Gaussian; side of the "
        "theoretical one.",
        columns,
        rows,
    )


def _pictures(finding: str, row: Mapping[str, Cam]) -> list[Picture]:
    return [
        Picture(
            pictures.jpeg_uri(pictures.overlay(cam)),
            size,
            float(cam.probability),
            f"Activation map of {finding} at {size}, probability {cam.probability:.2f}",
            pictures.describe_positives(cam),
        )
        for size, cam in row.items()
    ]


def _render(template: str, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("cxrjax.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["value"] = _value
    environment.filters["cell"] = _cell
    environment.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    return environment.get_template(template).render(**content)


def _cell(cell: Any) -> str:
    """Format a table cell: floats to 3 decimals; a line may break before an interval, but not inside it."""
    text = f"{cell:.3f}" if isinstance(cell, float) else _value(cell)
    match = re.fullmatch(r"([-+.\d]+ )?(\([-+.\d]+–[-+.\d]+\)|[-+.\d]+(?:–| to )[-+.\d]+)", text)
    return Markup('{}<span class="whole">{}</span>').format(match[1] or "", match[2]) if match else text


def _value(value: Any) -> str:
    """Format a provenance value."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_value(item) for item in value)
    return str(value)


_HIGHLIGHTS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
_OVERLAP_STYLES = {"iou": ("o", "-"), "iobb": ("s", (0, (3, 1.2)))}


def study_figures(report: StudyReport, width: float = WIDE) -> dict[str, Figure]:
    """Return all figures that a study has content for, by name: those of `study_plots`, and gradcam."""
    drawn = study_plots(report, width)
    if report.cams:
        drawn["gradcam"] = pictures.gradcam_grid(report.cams, report.findings, report.sizes, width=width)
    return drawn


def study_plots(report: StudyReport, width: float = WIDE) -> dict[str, Figure]:
    """Return the plots that a study has content for, by name: auc, weights, roc, training, erf, sizes, sections."""
    findings, sizes, ensembles = report.findings, report.sizes, report.ensembles
    drawn: dict[str, Figure] = {}
    if report.scores:
        drawn["auc"] = plots.auc_by_size(report.scores, findings, sizes, ensembles, kind=report.kind, width=width)
    if report.weights is not None:
        drawn["weights"] = plots.weights_bars(report.weights, findings, sizes, width=width)
    if report.curves:
        drawn["roc"] = plots.roc_grid(report.curves, findings, sizes, ensembles, width=width)
    if report.training:
        drawn["training"] = plots.loss_curves(report.training, sizes, width=width)
    if report.erfs:
        drawn["erf"] = pictures.erf_maps(report.erfs, width=width)
    if report.image_sizes is not None:
        drawn["sizes"] = plots.size_scatter(report.image_sizes, width=min(width, 4.2))
    for section in report.sections:
        drawn |= {name: _section_figure(content, width) for name, content in section.figures.items()}
    return drawn


def _section_figure(content: Histogram | Matrix | Diagrams, width: float) -> Figure:
    if isinstance(content, Histogram):
        return plots.histogram(content, width=min(width, 4.2))
    if isinstance(content, Matrix):
        return plots.matrix(content, width=min(width, 4.6))
    return plots.reliability_grid(content.curves, list(content.curves), width=width)


def run_figures(report: RunReport, width: float = WIDE) -> dict[str, Figure]:
    """Return the figures that a run has content for, by name: roc, reliability, training."""
    drawn: dict[str, Figure] = {}
    if report.curves:
        drawn["roc"] = plots.roc_grid({report.title: report.curves}, report.findings, [report.title], width=width)
    if report.reliability:
        drawn["reliability"] = plots.reliability_grid(report.reliability, report.findings, width=width)
    if report.training:
        drawn["training"] = plots.loss_curves({report.title: report.training}, [report.title], width=width)
    return drawn


@styled()
def summary(report: StudyReport) -> Figure:
    """Return a study in one figure: AUC by size and ensemble, ensemble weights, and effective receptive fields.

    The AUC lines of the mean, and of the two findings that gain most and least from larger images, are labelled.
    """
    blocks: list[tuple[float, Callable[[Figure], None]]] = [(1.2, lambda block: _summary_scores(block, report))]
    if report.weights is not None:
        blocks.append((1.1, lambda block: _summary_weights(block, report)))
    if report.erfs:
        blocks.append((0.8, lambda block: _summary_fields(block, report)))
    figure = Figure(figsize=(9.6 * sum(share for share, _ in blocks) / 3.1, 3.0), layout="constrained")
    subfigures = figure.subfigures(1, len(blocks), width_ratios=[share for share, _ in blocks], squeeze=False)[0]
    for subfigure, (_, draw) in zip(subfigures, blocks, strict=True):
        draw(subfigure)
    return figure


def _summary_scores(block: Figure, report: StudyReport) -> None:
    table, models = by_finding(report.scores), report.models
    sizes = sum(model in report.sizes for model in models)
    values = {
        finding: np.array([number(table[model].get(finding, {}).get("auroc")) for model in models])
        for finding in (*report.findings, MEAN)
    }
    values = {finding: auc for finding, auc in values.items() if np.isfinite(auc).any()}
    gain = {
        finding: auc[sizes - 1] - auc[0]
        for finding, auc in values.items()
        if finding != MEAN and sizes and np.isfinite(auc).all()
    }
    ranked = sorted(gain, key=lambda finding: -gain[finding])
    named = list(dict.fromkeys(ranked[:2] + ranked[-2:]))
    colour = dict(zip(named, _HIGHLIGHTS, strict=False)) | {MEAN: INK}
    panel = block.subplots()
    for finding, auc in values.items():
        width = 2.2 if finding == MEAN else 1.3 if finding in colour else 0.9
        look = {"color": colour.get(finding, GRID), "lw": width, "ms": 3.5, "zorder": 2 + (finding in colour)}
        panel.plot(auc[:sizes], "o-", **look)
        panel.plot(range(sizes, len(models)), auc[sizes:], "D", **look)
    if len(models) > sizes:
        panel.axvline(sizes - 0.5, color=GRID, lw=0.8, ls=":")
    panel.set_xticks(range(len(models)), [shorten(model, 16).replace(" ", "\n") for model in models])
    panel.set(ylabel="AUC", title="AUC by image size")
    panel.grid(axis="y")
    lines = [Line2D([], [], color=colour[f], marker="o", ms=3.5, label=shorten(f, 20)) for f in named]
    lines.append(Line2D([], [], color=INK, lw=2.2, marker="o", ms=3.5, label="Mean of findings"))
    if len(values) > len(colour):
        lines.append(Line2D([], [], color=GRID, marker="o", ms=3.5, label="other findings"))
    block.legend(handles=lines, loc="outside lower left", ncols=3, fontsize=6.5, columnspacing=1)


def _summary_weights(block: Figure, report: StudyReport) -> None:
    assert report.weights is not None
    panel = block.subplots()
    plots.draw_weights(panel, report.weights, report.findings, report.sizes, least=0.14)
    panel.set_title("Weights in the ensemble")
    block.legend(loc="outside lower left", ncols=len(report.sizes), fontsize=6.5, handlelength=1, columnspacing=1)


def _summary_fields(block: Figure, report: StudyReport) -> None:
    columns = math.ceil(math.sqrt(len(report.erfs)))
    panels = block.subplots(math.ceil(len(report.erfs) / columns), columns, squeeze=False).ravel()
    for panel, (size, field) in zip(panels, report.erfs.items(), strict=False):
        pictures.draw_erf(panel, size, field)
        panel.set_xlabel(f"{field.diameter_fraction:.0%} of width", color=INK)
    for empty in panels[len(report.erfs) :]:
        empty.remove()
    block.suptitle("Effective receptive field", x=0.02, ha="left", fontsize=7.5, fontweight="bold")


@styled()
def hit_rates(located: tables.Located, *, width: float = WIDE) -> Figure:
    """Plot hit rates against the limit, a panel per finding: IoU and IoBB with intervals and chance levels."""
    shown = sorted(located, key=lambda finding: finding != tables.ALL)
    figure, panels = panel_grid(len(shown), width, panel=1.7, height=1.35, legend=True)
    shades = dict(zip(_OVERLAP_STYLES, colours(3)[::2], strict=True))
    for panel, finding in zip(panels, shown, strict=True):
        points, fit = located[finding]
        panel.set_title(shorten(finding, 22))
        panel.set_title(f"n = {points.images:,}", loc="right", fontsize=6, fontweight="normal", color=MUTED)
        for kind, shade in shades.items():
            _curve(panel, getattr(fit, kind), kind, shade)
        panel.set(xlim=(0.05, 0.75), ylim=(-0.03, 1.03))
        panel.set_xticks([0.1, 0.3, 0.5, 0.7])
        panel.grid(axis="y")
    figure.supxlabel("overlap above", fontsize=7, color=MUTED)
    figure.supylabel("fraction of images", fontsize=7, color=MUTED)
    handles = [
        Line2D([], [], color=shades[kind], marker=marker, ls=dashes, ms=3.5, label=tables.OVERLAPS[kind])
        for kind, (marker, dashes) in _OVERLAP_STYLES.items()
    ]
    by_chance = [
        Line2D([], [], color=shades[kind], ls=":", lw=0.9, label=f"{name} by chance")
        for kind, name in tables.OVERLAPS.items()
    ]
    figure.legend(handles=handles + by_chance, loc="outside upper left", ncols=4 if width >= 4 else 2)
    return figure


def _curve(panel: Axes, rates: tuple[HitRate, ...], kind: str, shade: str) -> None:
    marker, dashes = _OVERLAP_STYLES[kind]
    limits = [rate.limit + (0.006 if kind == "iobb" else -0.006) for rate in rates]
    panel.vlines(limits, [rate.low for rate in rates], [rate.high for rate in rates], color=shade, lw=0.9)
    panel.plot(limits, [rate.rate for rate in rates], marker=marker, ls=dashes, color=shade, ms=3.5, mec=PAPER, mew=0.4)
    panel.plot(limits, [rate.chance for rate in rates], ls=":", color=shade, lw=0.9)
