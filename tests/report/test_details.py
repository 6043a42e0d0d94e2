"""Additional sections of study pages, and their figures."""

import re

import numpy as np
import pytest
from report_samples import BARE, FINDINGS, contrast, study_report

from cxrjax.report import plots, style
from cxrjax.report.content import Diagrams, Histogram, Matrix, Reliability, Section, Table
from cxrjax.report.page import study_figures, study_page, study_plots


@pytest.fixture(scope="module")
def passes():
    values = np.random.default_rng(0).beta(3, 5, 100)
    return Histogram("Passes of one image.", values, "probability of Mass", {"mean": float(values.mean())})


@pytest.fixture(scope="module")
def confusion():
    counts = np.array([[7, 1, 0], [2, 11, 3], [0, 0, 0]])
    return Matrix("Which was taken for which.", ("A", "B", "C"), counts, "actual", "predicted")


def test_a_histogram_holds_every_value_and_its_marks(passes):
    panel = plots.histogram(passes).axes[0]
    assert sum(bar.get_height() for bar in panel.patches) == 100
    low, high = panel.get_xlim()
    assert 0 <= low < passes.values.min() < passes.values.max() < high <= 1
    assert panel.lines[0].get_xdata()[0] == pytest.approx(passes.values.mean())
    steady = plots.histogram(Histogram("", np.full(5, 0.5), ""))
    assert sum(bar.get_height() for bar in steady.axes[0].patches) == 5


def test_a_matrix_shows_counts_in_their_cells(confusion):
    panel = plots.matrix(confusion).axes[0]
    counts_shown = {text.get_position(): text.get_text() for text in panel.texts}
    assert counts_shown == {(c, r): str(confusion.counts[r, c]) for r in range(3) for c in range(3)}
    assert panel.get_xlabel() == "predicted class"
    assert panel.get_ylim()[0] > panel.get_ylim()[1], "the first class is on top"
    for text in panel.texts:
        share = confusion.counts[text.get_position()[::-1]] / max(1, confusion.counts[text.get_position()[1]].sum())
        assert contrast(text.get_color(), style.sequential(share)) >= 4.5


def test_a_page_shows_every_section(passes, confusion):
    bins = Reliability(np.array([0.1, 0.6]), np.array([0.2, 0.5]), np.array([40, 60]))
    sections = [
        Section("First <chapter>", ["Words & words."], {"passes": passes, "confusion": confusion}),
        Section("Second", (), {"reliability-of": Diagrams("Calibration.", {"Mass": bins})},
                [Table("Open", ("A", "B"), [("x", 0.25)])], [Table("Folded", ("A",), [("y",)])]),
    ]  # fmt: skip
    report = study_report(**BARE, lead=(), kind="arm", sections=sections)
    page = study_page(report)
    assert re.findall(r'href="#(section-\d)"', page) == re.findall(r'<h2 id="(section-\d)"', page)
    assert "First &lt;chapter&gt;" in page
    assert "AUC by finding and arm" in page
    assert "image size" not in page
    assert page.index("<details>", page.index("Second</h2>")) < page.index("Folded")
    assert {"passes", "confusion", "reliability-of"} <= set(study_figures(report))
    assert page.count("<svg") == 2 * len(study_plots(report))


def test_arms_are_named_and_not_joined():
    report = study_report(**BARE, kind="arm")
    figure = study_plots(report)["auc"]
    assert len(figure.axes) == len(FINDINGS) + 1
    assert [text.get_text() for text in figure.legends[0].texts] == list(report.models)
    points = {len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() != "None"}
    assert points == {1}
    assert all(len(set(line.get_xdata())) == 1 for panel in figure.axes for line in panel.lines)
