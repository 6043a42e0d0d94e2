"""The grid of activation maps lists the positive findings of each image."""

import dataclasses
import re

import numpy as np
from report_samples import FINDINGS, SIZES

from cxrjax.report.page import study_page
from cxrjax.report.pictures import describe_positives, gradcam_grid


def with_positives(study, **positives):
    cams = {
        f: {s: dataclasses.replace(cam, positives=positives) for s, cam in row.items()} for f, row in study.cams.items()
    }
    return dataclasses.replace(study, cams=cams)


def test_positive_findings_are_listed_below_each_map(study):
    report = with_positives(study, Mass=0.61, **{"Pleural Effusion": 0.987})
    assert describe_positives(report.cams["Mass"]["32 px"]) == "Pleural Effusion 0.99, Mass 0.61"
    figure = gradcam_grid(report.cams, FINDINGS, SIZES)
    below = [" ".join(panel.get_xlabel().split()) for panel in figure.axes]
    assert below == ["Pleural Effusion 0.99, Mass 0.61"] * len(FINDINGS) * len(SIZES)
    page = study_page(report)
    assert page.count("<small>Pleural Effusion 0.99, Mass 0.61</small>") == len(FINDINGS) * len(SIZES)
    assert "all findings with a probability above 0.50" in page


def test_no_positive_findings_differs_from_not_recorded(study):
    assert describe_positives(with_positives(study).cams["Mass"]["32 px"]) == "none above 0.50"
    assert describe_positives(study.cams["Mass"]["32 px"]) == ""
    assert {panel.get_xlabel() for panel in gradcam_grid(study.cams, FINDINGS, SIZES).axes} == {""}
    assert "all findings with a probability above 0.50" not in study_page(study)


def test_many_findings_are_cut_to_three_lines_and_rows_grow_with_them(study):
    many = with_positives(study, **{f"Finding number {k}": 0.9 - k / 100 for k in range(14)})
    text = gradcam_grid(many.cams, FINDINGS, SIZES).axes[0].get_xlabel()
    assert text.count("\n") == 2
    assert re.search(r"…$", text)
    heights = [gradcam_grid(report.cams, FINDINGS, SIZES).get_size_inches()[1] for report in (study, many)]
    np.testing.assert_allclose(heights[1] - heights[0], 0.3 * len(FINDINGS))
