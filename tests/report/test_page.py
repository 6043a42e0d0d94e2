import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_samples import BARE, FINDINGS, contrast, run_report, study_report

from cxrjax.report.content import Table
from cxrjax.report.page import run_page, study_page, write_page

VOID = {"meta", "link", "img", "br", "hr"}


class Outline(HTMLParser):
    """Elements and text of a page; refuses tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def outline(pages):
    return {name: Outline((pages / f"{name}.html").read_text()) for name in ("study", "run")}


@pytest.mark.parametrize("name", ["study", "run"])
def test_page_is_self_contained(pages, outline, name):
    html = (pages / f"{name}.html").read_text()
    assert not re.search(r"https?:", html)
    assert "@import" not in html
    assert outline[name].all("script") == []
    for tag, attributes in outline[name].elements:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), f"{tag} refers to {attributes[key]}"
        assert not any(key.startswith("on") for key in attributes)
    assert len(html) < 1_500_000


@pytest.mark.parametrize("name", ["study", "run"])
def test_page_is_accessible(outline, name):
    page = outline[name]
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in page.all("svg"))
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")]
    assert set(targets) <= set(ids)


def test_study_page_shows_its_numbers(study, outline):
    text = " ".join(outline["study"].text)
    for rows in study.scores.values():
        for row in rows:
            assert f"{row['auroc']:.3f}" in text
            assert f"{row['auroc_low']:.3f}–{row['auroc_high']:.3f}" in text
    for phrase in (*study.lead, *study.notes, study.interval, *(c.evidence for c in study.claims)):
        assert phrase in text
    assert "9f3a" * 16 in text
    assert "0.994" in text
    assert "34.8%" in text, "of the width, at 128 px"
    assert len(outline["study"].all("img")) == len(FINDINGS) * 3


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(pages, dark):
    blocks = re.findall(r":root \{(.*?)\}", (pages / "study.html").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[dark]))
    paper = {"#fff": "#ffffff"}.get(colours["paper"], colours["paper"])
    for name in ("ink", "muted", "accent", "yes", "no", "undecided"):
        assert contrast(colours[name], paper) >= 4.5, name


def test_sections_without_content_are_left_out():
    bare = study_page(
        study_report(
            **BARE, lead=(), claims=(), notes=(), interval="", control=None, provenance={}
        )
    )  # fmt: skip
    outline = Outline(bare)
    assert [a.get("id") for a in outline.all("h2")] == ["scores"]
    assert [a["href"] for a in outline.all("a")] == ["#scores"]
    assert len(outline.all("svg")) == 2
    assert "None" not in outline.text
    empty = Outline(study_page(study_report(
        **BARE, scores={}, lead=(), claims=(), notes=(), control=None, provenance={}
    )))  # fmt: skip
    assert empty.all("h2") == []
    bare_run = Outline(run_page(run_report(curves={}, reliability={}, training=(), provenance={})))
    assert [a["id"] for a in bare_run.all("h2")] == ["scores"]


def test_columns_follow_the_models_whatever_the_order_of_the_scores(study):
    backwards = study_report(**BARE, scores=dict(reversed(study.scores.items())))
    assert study_page(backwards) == study_page(study_report(**BARE))


def test_a_finding_without_a_score_shows_the_reason(study):
    rows = [dict(row) for row in study.scores["32 px"]]
    rows[0] |= {"auroc": np.nan, "auroc_low": np.nan, "auroc_high": np.nan, "reason": "no <positive> image"}
    text = " ".join(Outline(study_page(study_report(**BARE, scores={"32 px": rows}))).text)
    assert re.search(r"n/a\s+\(no <positive> image\)", text)


def test_long_names_break_at_underscores_and_intervals_do_not():
    table = Table(
        "Any.", ("Finding", "densenet_<b>"), [["a_b", "0.886 (0.859–0.910)"], ["c", "-0.1 to +0.2"], ["d", "n/a (no)"]]
    )
    html = study_page(study_report(**BARE, control=table))
    assert "densenet_<wbr>&lt;b&gt;</th>" in html
    assert '0.886 <span class="whole">(0.859–0.910)</span>' in html
    assert '<span class="whole">-0.1 to +0.2</span>' in html
    assert "<td>n/a (no)</td>" in html


def test_pages_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "report" / "index.html"
    bare = {"curves": {}, "reliability": {}, "training": ()}
    write_page(run_report(**bare, title="first \ud800"), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(run_report(**bare, title="second"), path)
    assert path.read_bytes() == before
    assert [name.name for name in path.parent.iterdir()] == ["index.html"]
