import csv
import io
import math
import re

import pytest
from rich.console import Console

from cxrjax.metrics.scores import MEAN
from cxrjax.report import tables


def row(finding, auroc, low=None, high=None, positives=10, negatives=90, reason=""):
    low, high = auroc - 0.01 if low is None else low, auroc + 0.01 if high is None else high
    return {
        "finding": finding, "auroc": auroc, "auroc_low": low, "auroc_high": high, "average_precision": auroc / 2,
        "average_precision_low": low / 2, "average_precision_high": high / 2, "positives": positives,
        "negatives": negatives, "reason": reason,
    }  # fmt: skip


NAN = math.nan
SCORES = {
    "32 px": [row("A", 0.9), row("B", NAN, NAN, NAN, 0, 100, "no positive image"), row(MEAN, 0.93, positives=None)],
    "64 px": [row("A", 0.9004), row("B", NAN, NAN, NAN, 0, 100, "no positive image"), row(MEAN, 0.8, positives=None)],
    "stacked": [row("A", 0.95, 0.9, 0.99), row("B", 0.5), row(MEAN, 0.7, NAN, NAN, None, reason="without B")],
}


def test_lines_hold_text_intervals_and_ranks():
    a, b, mean = tables.score_lines(SCORES, ["A", "B"], ["32 px", "64 px"])
    assert [cell.text for cell in a.cells] == ["0.900", "0.900", "0.950"]
    assert [cell.interval for cell in a.cells] == ["0.890–0.910", "0.890–0.910", "0.900–0.990"]
    assert [cell.best for cell in a.cells] == [False, False, True]
    assert [cell.best_size for cell in a.cells] == [True, True, False], "what prints the same is equally good"
    assert (a.positives, a.negatives, a.is_mean) == (10, 90, False)
    assert [(cell.text, cell.interval) for cell in b.cells[:2]] == [("n/a", "no positive image")] * 2
    assert not any(cell.best for cell in b.cells), "a single value is not the best of anything"
    assert mean.is_mean
    assert mean.note == "without B"
    assert mean.cells[2].interval == ""


def test_lines_follow_the_given_order_and_metric():
    lines = tables.score_lines(SCORES, ["B", "A", "not scored"], [], "average_precision")
    assert [line.finding for line in lines] == ["B", "A", MEAN]
    assert [cell.text for cell in lines[1].cells] == ["0.450", "0.450", "0.475"]


def test_a_model_without_the_finding_shows_a_dash():
    scores = {"one": [row("A", 0.9)], "other": [row("B", 0.8)]}
    assert [cell.text for cell in tables.score_lines(scores, ["A"], [])[0].cells] == ["0.900", "–"]


def test_csv_reads_back_at_full_precision():
    scores = {'a "model", really': [row("Effusion\nleft", 2 / 3)], "b": SCORES["32 px"][1:2]}
    first, second = csv.DictReader(io.StringIO(tables.scores_csv(scores)))
    assert first["model"] == 'a "model", really'
    assert first["finding"] == "Effusion\nleft"
    assert float(first["auroc"]) == 2 / 3
    assert first["positives"] == "10"
    assert (second["auroc"], second["reason"]) == ("n/a", "no positive image")


@pytest.fixture
def printed():
    def show(scores, findings):
        console = Console(record=True, width=100, file=io.StringIO(), color_system="standard", force_terminal=True)
        console.print(tables.terminal_scores(scores, findings, ["32 px", "64 px"]))
        return console.export_text(styles=True, clear=False), console.export_text()

    return show


def test_terminal_prints_the_best_in_bold_and_reasons(printed):
    styled, plain = printed(SCORES, ["A", "B"])
    assert re.search(r"\x1b\[1m *0\.950", styled)
    assert not re.search(r"\x1b\[1m *0\.900", styled)
    assert ".890–.910" in plain
    assert "10 positive" in plain
    assert "n/a" in plain
    assert "(no positive image)" in plain


def test_terminal_shows_markup_as_text(printed):
    scores = {"[red]m[/red]": [row("[bold]A[/bold] [/nothing]", 0.9)]}
    _, plain = printed(scores, ["[bold]A[/bold] [/nothing]"])
    assert "[bold]A[/bold] [/nothing]" in plain
    assert "[red]m[/red]" in plain
