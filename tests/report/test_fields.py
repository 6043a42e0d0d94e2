import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from report_samples import gaussian_field

from cxrjax.report.pictures import erf_grid, round_length, scale_bar, size_by_depth


@given(st.floats(1e-6, 1e6))
def test_round_lengths_are_one_two_or_five(most):
    length = round_length(most)
    assert most / 2.5 * (1 - 1e-6) < length <= most * (1 + 1e-6)
    assert float(f"{length:e}".partition("e")[0]) in (1, 2, 5)


@pytest.mark.parametrize(
    ("limits", "width_cm", "pixels", "label"),
    [
        ((0, 1), None, 200, "200 px"),  # at most a third of 1024
        ((0.45, 0.55), None, 20, "20 px"),
        ((0, 1), 35, 10 / 35 * 1024, "10 cm (293 px)"),
        ((0.49, 0.51), 35, 2 / 350 * 1024, "2 mm (6 px)"),
    ],
)
def test_scale_bar_length_matches_its_label(limits, width_cm, pixels, label):
    panel = Figure().subplots()
    panel.set(xlim=limits, ylim=limits[::-1])
    scale_bar(panel, 1024, width_cm)
    (line,), (text,) = panel.lines, panel.texts
    assert np.diff(line.get_xdata()) * 1024 == pytest.approx(pixels)
    assert text.get_text() == label
    assert limits[0] < min(line.get_xdata()) < max(line.get_xdata()) < limits[1]


def fields():
    """Two networks and two feature maps at 128 px, of diameters 6.4 and 32 px, theoretical 20 and 87 px."""
    fine, coarse = gaussian_field(128, 0.0201), gaussian_field(128, 0.1)
    fine = dataclasses.replace(fine, theoretical_px=20, map=np.roll(fine.map, (10, 4), (0, 1)))
    row = {"stem": fine, "final": dataclasses.replace(coarse, gaussian_px=30.0)}
    return {"trained": row, "untrained": row}


def test_erf_grid_panels():
    panels = erf_grid(fields()).axes[:4]
    assert [panel.get_ylabel() for panel in panels] == ["trained", "", "untrained", ""]
    assert [panel.get_title(loc="left") for panel in panels] == ["stem", "final", "", ""]
    left, right = panels[0].get_xlim()
    bottom, top = panels[0].get_ylim()
    assert (right - left) * 128 == pytest.approx(1.2 * 20)
    assert ((left + right) / 2 - 0.5) * 128 == pytest.approx(4, abs=0.01)  # it goes with the field
    assert ((bottom + top) / 2 - 0.5) * 128 == pytest.approx(10, abs=0.01)
    assert panels[1].get_xlim() == pytest.approx((0.5 - 0.6 * 87 / 128, 0.5 + 0.6 * 87 / 128), abs=1e-6)
    whole = erf_grid(fields(), whole=True).axes[:4]
    assert {panel.get_xlim() for panel in whole} == {(0, 1)}
    assert whole[1].get_xlabel() == "⌀ 63.6 px, 50% of width"


def test_sizes_are_plotted_against_depth():
    (panel,) = size_by_depth(fields()).axes
    lines = {line.get_label(): line for line in panel.lines}
    diameters = [field.diameter_px for field in fields()["trained"].values()]
    assert list(lines["trained, by mass"].get_ydata()) == pytest.approx(diameters)
    assert list(lines["untrained, Gaussian"].get_ydata())[1] == 30
    assert list(lines["theoretical"].get_ydata()) == [20, 87]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["stem", "final"]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(looks) == len(lines)
