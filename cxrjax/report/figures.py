"""Which figures a report has, by name, and the whole study in one picture."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxrjax.metrics.scores import MEAN
from cxrjax.report import pictures, plots
from cxrjax.report.content import Diagrams, Histogram, Matrix, RunReport, StudyReport
from cxrjax.report.style import GRID, INK, WIDE, styled, words

_STANDING_OUT = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def study_figures(report: StudyReport, width: float = WIDE) -> dict[str, Figure]:
    """All figures that a study has the parts for, by name: those of `study_plots`, and gradcam."""
    drawn = study_plots(report, width)
    if report.cams:
        drawn["gradcam"] = pictures.gradcam_grid(report.cams, report.findings, report.sizes, width=width)
    return drawn


def study_plots(report: StudyReport, width: float = WIDE) -> dict[str, Figure]:
    """The plots that a study has the parts for, by name: auc, weights, roc, training, erf, sizes, and its sections'."""
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
    if report.fields:
        drawn["erf"] = pictures.erf_maps(report.fields, width=width)
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
    """All figures that a run has the parts for, by name: roc, reliability, training."""
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
    """The study in one picture: AUC by size and ensemble, the ensemble's weights, the effective receptive fields.

    Of the AUC lines those of the mean, and of the two findings that gain most and least from larger images, are named.
    """
    blocks: list[tuple[float, Callable[[Figure], None]]] = [(1.2, lambda block: _summary_scores(block, report))]
    if report.weights is not None:
        blocks.append((1.1, lambda block: _summary_weights(block, report)))
    if report.fields:
        blocks.append((0.8, lambda block: _summary_fields(block, report)))
    figure = Figure(figsize=(9.6 * sum(share for share, _ in blocks) / 3.1, 3.0), layout="constrained")
    parts = figure.subfigures(1, len(blocks), width_ratios=[share for share, _ in blocks], squeeze=False)[0]
    for part, (_, draw) in zip(parts, blocks, strict=True):
        draw(part)
    return figure


def _summary_scores(block: Figure, report: StudyReport) -> None:
    table, models = plots.by_finding(report.scores), report.models
    sizes = sum(model in report.sizes for model in models)
    values = {
        finding: np.array([plots.number(table[model].get(finding, {}).get("auroc")) for model in models])
        for finding in (*report.findings, MEAN)
    }
    values = {finding: of for finding, of in values.items() if np.isfinite(of).any()}
    gain = {f: of[sizes - 1] - of[0] for f, of in values.items() if f != MEAN and sizes and np.isfinite(of).all()}
    ranked = sorted(gain, key=lambda finding: -gain[finding])
    named = list(dict.fromkeys(ranked[:2] + ranked[-2:]))
    colour = dict(zip(named, _STANDING_OUT, strict=False)) | {MEAN: INK}
    panel = block.subplots()
    for finding, of in values.items():
        width = 2.2 if finding == MEAN else 1.3 if finding in colour else 0.9
        look = {"color": colour.get(finding, GRID), "lw": width, "ms": 3.5, "zorder": 2 + (finding in colour)}
        panel.plot(of[:sizes], "o-", **look)
        panel.plot(range(sizes, len(models)), of[sizes:], "D", **look)
    if len(models) > sizes:
        panel.axvline(sizes - 0.5, color=GRID, lw=0.8, ls=":")
    panel.set_xticks(range(len(models)), [words(model, 16).replace(" ", "\n") for model in models])
    panel.set(ylabel="AUC", title="AUC by image size")
    panel.grid(axis="y")
    lines = [Line2D([], [], color=colour[f], marker="o", ms=3.5, label=words(f, 20)) for f in named]
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
    columns = math.ceil(math.sqrt(len(report.fields)))
    panels = block.subplots(math.ceil(len(report.fields) / columns), columns, squeeze=False).ravel()
    for panel, (size, field) in zip(panels, report.fields.items(), strict=False):
        pictures.draw_field(panel, size, field)
        panel.set_xlabel(f"{field.diameter_fraction:.0%} of width", color=INK)
    for empty in panels[len(report.fields) :]:
        empty.remove()
    block.suptitle("Effective receptive field", x=0.02, ha="left", fontsize=7.5, fontweight="bold")
