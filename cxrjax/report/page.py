"""Self-contained HTML pages of studies and runs: inline SVG and embedded pictures, no scripts, no network."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cxrjax.report import figures, pictures, style, tables
from cxrjax.report.content import Cam, ErfMap, MapsReport, RunReport, StudyReport, Table

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
    plots = _plots([figures.study_plots(report, width) for width in (style.WIDE, style.NARROW)], labels)
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
    plots = _plots([figures.run_figures(report, width) for width in (style.WIDE, style.NARROW)], _LABELS)
    rows = {report.title: report.scores}
    auc, precision = (tables.score_lines(rows, report.findings, (), metric) for metric in tables.METRICS)
    lines = [replace(a, cells=a.cells + p.cells) for a, p in zip(auc, precision, strict=True)]
    return _render("run.html.j2", report=report, plots=plots, lines=lines, columns=list(tables.METRICS.values()))


def maps_page(report: MapsReport) -> str:
    """Return the page of a run's saliency maps as HTML."""
    widths = (style.WIDE, style.NARROW) if report.located else ()
    drawn = [{"hits": figures.hit_rates(report.located, width=width)} for width in widths]
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
