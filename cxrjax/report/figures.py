"""The figures of reports by name, a summary of a study in one figure, and hit rates of saliency maps."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxrjax.explain.boxes import HitRate
from cxrjax.metrics.scores import MEAN
from cxrjax.report import pictures, plots, tables
from cxrjax.report.content import Diagrams, Histogram, Matrix, RunReport, StudyReport, by_finding, number
from cxrjax.report.style import GRID, INK, MUTED, PAPER, WIDE, colours, panel_grid, shorten, styled

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
