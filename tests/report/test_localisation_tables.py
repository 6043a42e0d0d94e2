import io

import numpy as np
import pytest
from rich.console import Console

from cxrjax.explain.boxes import LIMITS, box_scores
from cxrjax.explain.localisation import localisation, pooled
from cxrjax.report.content import Cam, MapsReport
from cxrjax.report.page import hit_rates, maps_page
from cxrjax.report.tables import ALL, localisation_tables, terminal_table


@pytest.fixture(scope="module")
def located():
    rng = np.random.default_rng(0)

    def make_scores(images):
        mask = np.zeros((32, 32), bool)
        mask[8:16, 8:20] = True
        maps = rng.random((images, 8, 8), np.float32)
        maps[: images // 2, 2:4, 2:5] += 2
        predicted = [rng.uniform(0.1, 0.4, (1, 4)) for _ in range(images)]
        true = [np.array([[0.25, 0.25, 0.375, 0.25]])] * images
        return localisation(maps, [mask] * images), box_scores(predicted, true), predicted, true

    results = {"Mass": make_scores(20), "Nodule <b>": make_scores(31)}
    scores = {finding: result[:2] for finding, result in results.items()}
    predicted, true = ([boxes for result in results.values() for boxes in result[k]] for k in (2, 3))
    return scores | {ALL: (pooled([points for points, _ in scores.values()]), box_scores(predicted, true))}


def test_tables_show_rate_interval_and_chance(located):
    points, iou, iobb = localisation_tables(located)
    assert [row[0] for row in points.rows] == ["Mass", "Nodule <b>", ALL]
    score, fit = located["Mass"]
    assert points.rows[0][1:4] == (
        20, score.hits, f"{score.hit_rate:.2f} ({score.low:.2f}–{score.high:.2f}, chance {score.chance:.2f})"
    )  # fmt: skip
    for table, name in ((iou, "iou"), (iobb, "iobb")):
        rate = getattr(fit, name)[2]
        assert table.columns[4] == "> 0.3"
        assert [row[0] for row in table.rows[::2]] == list(located)
        assert table.rows[0][4] == f"{rate.rate:.2f} ({rate.low:.2f}–{rate.high:.2f})"
        assert table.rows[1][:1] + table.rows[1][4:5] == ("by chance", f"{rate.chance:.2f}")
        assert len(table.columns) == 2 + len(LIMITS)


def test_terminal_table_fits_and_shows_names_literally(located):
    console = Console(width=120, record=True, file=io.StringIO())
    for table in localisation_tables(located):
        console.print(terminal_table(table))
    text = console.export_text()
    assert "Nodule <b>" in text
    assert f"{located[ALL][1].iou[0].rate:.2f}" in text
    assert "…" not in text


def test_curves_are_the_hit_rates(located):
    figure = hit_rates(located)
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles == [ALL, "Mass", "Nodule <b>"]
    assert [panel.get_title(loc="right") for panel in figure.axes] == ["n = 51", "n = 20", "n = 31"]
    for panel, name in zip(figure.axes, (ALL, "Mass", "Nodule <b>"), strict=True):
        fit = located[name][1]
        drawn = [list(line.get_ydata()) for line in panel.lines]
        expected = [
            [getattr(rate, what) for rate in rates] for rates in (fit.iou, fit.iobb) for what in ("rate", "chance")
        ]
        assert sorted(drawn) == sorted(expected)
        looks = {(line.get_marker(), line.get_linestyle(), line.get_color()) for line in panel.lines}
        assert len(looks) == 4


def test_the_page_shows_maps_and_scores_and_escapes_names(located):
    cam = Cam(np.zeros((16, 16), np.uint8), np.ones((4, 4), np.float32), 0.7, None, np.array([[0.1, 0.1, 0.5, 0.5]]))
    report = MapsReport(
        "Maps of <i>a run", {"Nodule <b>": {"a.png": cam}}, located, localisation_tables(located), notes=["A note."]
    )
    page = maps_page(report)
    assert "<b>0.70</b>" in page
    assert "Nodule &lt;b&gt;" in page
    assert "Nodule <b>" not in page
    assert "<i>" not in page
    assert page.count("<svg") == 2
    assert "IoBB" in page
    bare = maps_page(MapsReport("Bare", {}))
    assert "<svg" not in bare
    assert "<h2" not in bare
