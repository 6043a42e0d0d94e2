import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from report_samples import BARE, ENSEMBLES, FINDINGS, SIZES, contrast, luminance, study_report
from sklearn.metrics import auc

from cxrjax.errors import CxrError
from cxrjax.report import page, plots, style
from cxrjax.report.content import Claim, Curve, Table

HOSTILE = [
    "<script>window.pwned=1</script>",
    "</svg><img src=x onerror=alert(1)>",
    r"$\frac{",
    "a\x00\x1b\ud800b",
    "é — 肺",
]


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("}text")]


def test_auc_panels_plot_the_rows(study):
    figure = plots.auc_by_size(study.scores, FINDINGS, SIZES, ENSEMBLES)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["Mean of findings", *FINDINGS]
    for panel, finding in zip(figure.axes[1:], FINDINGS, strict=True):
        rows = [next(row for row in study.scores[m] if row["finding"] == finding) for m in (*SIZES, *ENSEMBLES)]
        lines = [line.get_xydata() for line in panel.get_lines()]
        for x, row in enumerate(rows):
            assert any(np.array_equal(line, [[x, row["auroc"]]]) for line in lines)
            assert any(np.array_equal(line, [[x, row["auroc_low"]], [x, row["auroc_high"]]]) for line in lines)
            assert panel.get_ylim()[0] <= row["auroc_low"]
        joined = [[x, row["auroc"]] for x, row in enumerate(rows[:3])]
        assert any(np.array_equal(line, joined) for line in lines), "the line joins the sizes only"


def test_auc_panel_without_a_value_shows_the_reason():
    row = {"finding": "A", "auroc": np.nan, "auroc_low": np.nan, "auroc_high": np.nan, "reason": "no positive image"}
    figure = plots.auc_by_size({"32 px": [row]}, ["A"], ["32 px"])
    assert figure.axes[0].texts[0].get_text() == "n/a\nno positive image"


def test_bars_have_the_weights_as_widths(study):
    panel = plots.weights_bars(study.weights, FINDINGS, SIZES).axes[0]
    width = np.array([[bar.get_width() for bar in bars] for bars in panel.containers]).T
    left = np.array([[bar.get_x() for bar in bars] for bars in panel.containers]).T
    np.testing.assert_allclose(width, study.weights)
    np.testing.assert_allclose(left[:, 1:], np.cumsum(study.weights, 1)[:, :-1])
    printed = {text.get_text() for text in panel.texts}
    assert printed == {f"{w:.2f}" for w in study.weights.ravel() if w >= 0.4 / style.WIDE}


def test_thinned_curves_are_short_and_keep_their_area():
    rng = np.random.default_rng(0)
    fpr, tpr = (np.concatenate([[0], np.sort(rng.beta(a, b, 20_000)), [1]]) for a, b in ((1, 1), (1, 4)))
    x, y = plots._thinned(Curve(fpr, tpr))
    assert 100 <= len(x) <= 160
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert auc(x, y) == pytest.approx(auc(fpr, tpr), abs=1e-3)


def test_series_skips_lines_without_both_values():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": None}, {"step": 4, "loss": np.nan}, {"loss": 1}]
    x, y = plots.series([*rows, {"step": 5, "loss": 1.0}], "step", "loss")
    assert (x.tolist(), y.tolist()) == ([1, 5], [2, 1])


def test_losses_are_against_steps_where_epochs_are_not_logged():
    figure = plots.loss_curves({"32 px": [{"step": i, "train_loss": 1 / (i + 1)} for i in range(5)]}, ["32 px"])
    assert len(figure.axes) == 1
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert "validation loss" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_study_has_the_figures_of_its_content(study):
    assert set(page.study_figures(study)) == {"auc", "weights", "roc", "training", "erf", "gradcam"}
    bare = study_report(**BARE)
    assert set(page.study_figures(bare)) == {"auc"}
    assert len(page.summary(bare).subfigs) == 1
    assert len(page.summary(study).subfigs) == 3
    scattered = study_report(**BARE, image_sizes=np.array([[2500, 3056], [2500, 3056], [2000, 2000]]))
    assert "sizes" in page.study_plots(scattered)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_saved_figures_are_reproducible(study, tmp_path, suffix):
    names = [style.save(plots.weights_bars(study.weights, FINDINGS, SIZES), tmp_path / f"{i}.{suffix}") for i in "ab"]
    first, second = (name.read_bytes() for name in names)
    assert first == second
    assert len(first) > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]


def test_an_unknown_suffix_is_an_error(study, tmp_path):
    with pytest.raises(CxrError, match=r"f\.bmp.*\.svg, \.png, \.pdf"):
        style.save(plots.weights_bars(study.weights, FINDINGS, SIZES), tmp_path / "f.bmp")
    assert list(tmp_path.iterdir()) == []


def test_names_are_drawn_literally():
    figure = plots.weights_bars(np.full((5, 2), 0.5), HOSTILE, ["$x$", "<b>"])
    svg = style.render(figure, "svg")
    shown = texts(svg)
    assert "<script>window.pwned=1</s…" in shown
    assert r"$\frac{" in shown
    assert "a   b" in shown
    assert "é — 肺" in shown
    assert {"$x$", "<b>"} <= set(shown)
    inline = str(style.inline_svg(figure, "weights", 'say "<this>"'))
    root = ET.fromstring(inline)
    assert root.get("aria-label") == 'say "<this>"'
    assert {element.tag for element in root.iter()} <= {"svg", "g", "path", "text", "defs", "clipPath", "rect", "use"}
    assert "<script" not in inline
    assert style.render(figure, "png").startswith(b"\x89PNG")


def test_an_inline_figure_is_self_contained(study):
    root = ET.fromstring(style.inline_svg(plots.auc_by_size(study.scores, FINDINGS, SIZES), "auc", "label"))
    ids = {element.get("id") for element in root.iter()} - {None}
    links = {v.strip("url(#)") for e in root.iter() for k, v in e.items() if k in ("href", "clip-path")}
    assert links <= ids
    assert all(name.startswith("auc-") for name in ids)
    assert not any("http" in value for element in root.iter() for value in element.attrib.values())
    style_of_text = next(element.get("style") for element in root.iter("text"))
    assert "var(--sans)" in style_of_text
    assert "var(--" in style_of_text.split("fill:")[1]


@pytest.mark.parametrize("sizes", [2, 3, 4, 6])
def test_sizes_darken_as_they_grow_and_their_labels_can_be_read(sizes):
    colours = style.colours(sizes)
    steps = np.diff([luminance(colour) for colour in colours])
    assert (steps < -0.02).all(), "told apart without hue"
    assert all(contrast(colour, style.ink_on(colour)) >= 4.5 for colour in colours)
    assert all(contrast(colour, page) >= 2 for colour in colours for page in ("#ffffff", "#14171b"))


def test_inconsistent_content_is_an_error():
    with pytest.raises(CxrError, match=r"weights have shape \(2, 3\), not findings x sizes \(7, 3\)"):
        study_report(weights=np.ones((2, 3)))
    with pytest.raises(CxrError, match="scores names '16 px'; choose from 32 px"):
        study_report(scores={"16 px": []})
    with pytest.raises(CxrError, match="cams of Mass names 'voting'"):
        study_report(cams={"Mass": {"voting": None}})
    with pytest.raises(CxrError, match="row 2 has 1 cells, not 2"):
        Table("t", ("a", "b"), [(1, 2), (1,)])
    with pytest.raises(CxrError, match="use yes, no or undecided"):
        Claim("s", "maybe", "e")  # pyright: ignore[reportArgumentType]


def test_reports_need_neither_jax_nor_global_figures():
    code = "import sys, cxrjax.report.page; print({'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
