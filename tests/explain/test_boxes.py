"""Detected boxes against cases computed by hand, pixel counts and OpenCV components."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from cxrjax.errors import CxrError
from cxrjax.explain.boxes import LIMITS, box_scores, boxes_of, detected, overlaps


def boxes_array(*boxes) -> np.ndarray:
    return np.array(boxes, np.float64).reshape(-1, 4)


def test_overlaps_of_rectangles_by_hand():
    predicted = boxes_array((0, 0, 0.4, 0.4), (0.2, 0.2, 0.2, 0.2), (0.8, 0.8, 0.2, 0.2), (0.1, 0.1, 0, 0.3))
    true = boxes_array((0.2, 0.2, 0.4, 0.2))
    iou, iobb = (pairs[:, 0] for pairs in overlaps(predicted[:, None], true[None]))
    np.testing.assert_allclose(iou, [0.04 / 0.20, 0.04 / 0.08, 0, 0], atol=1e-12)
    np.testing.assert_allclose(iobb, [0.04 / 0.16, 1, 0, 0], atol=1e-12)


boxes = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 20)] * 2)


@given(boxes, boxes)
def test_overlaps_match_pixel_counts(first, second):
    masks = np.zeros((2, 32, 32), bool)
    for mask, (x, y, w, h) in zip(masks, (first, second), strict=True):
        mask[y : y + h, x : x + w] = True
    iou, iobb = overlaps(np.array(first) / 32, np.array(second) / 32)
    both = (masks[0] & masks[1]).sum()
    assert iou == pytest.approx(both / (masks[0] | masks[1]).sum())
    assert iobb == pytest.approx(both / masks[0].sum())
    np.testing.assert_allclose(boxes_of(masks[0]), [np.array(first) / 32])


@given(hnp.arrays(bool, (9, 12)))
def test_boxes_match_opencv_components(mask):
    count, _, measured, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    theirs = {tuple(row[:4]) for row in measured[1:]}
    ours = boxes_of(mask) * [12, 9, 12, 9]
    assert len(ours) == count - 1
    assert {tuple(row) for row in ours.round().astype(int)} == theirs
    areas = [row[4] for row in sorted(measured[1:], key=lambda row: -row[4])]
    if areas:
        largest = {tuple(row[:4]) for row in measured[1:] if row[4] == areas[0]}
        assert tuple(ours[0].round().astype(int)) in largest


def two_spots() -> np.ndarray:
    """256 px, so that nothing is resized: a high and a large but lower spot, joined by nothing above 0.3."""
    heat = np.full((256, 256), 0.3, np.float32)
    heat[16:32, 32:64] = 0.8
    heat[20, 40] = 1.0
    heat[128:192, 128:256] = 0.6
    return heat


def test_the_detected_region_holds_the_maximum():
    small, large = (32 / 256, 16 / 256, 32 / 256, 16 / 256), (128 / 256, 128 / 256, 128 / 256, 64 / 256)
    np.testing.assert_allclose(detected(two_spots()), [small])
    np.testing.assert_allclose(detected(7 * two_spots(), regions="all"), [large, small])
    np.testing.assert_allclose(detected(two_spots(), threshold=0.7, regions="all"), [small])
    np.testing.assert_allclose(detected(two_spots(), threshold=0.3), [(0, 0, 1, 1)])
    np.testing.assert_allclose(detected(two_spots(), threshold=1.0), [(40 / 256, 20 / 256, 1 / 256, 1 / 256)])
    assert detected(np.zeros((8, 8), np.float32)).shape == (0, 4)


def test_coarse_maps_are_interpolated():
    heat = np.zeros((8, 8), np.float32)
    heat[2, 5] = 1
    # Bilinear between centres 32 px apart: half the maximum is reached 16 px to both sides of the centre.
    np.testing.assert_allclose(detected(heat), [(5 / 8, 2 / 8, 1 / 8, 1 / 8)], atol=1 / 256)


def test_hit_rates_computed_by_hand():
    true = [
        boxes_array((0, 0, 0.5, 0.5)),
        boxes_array((0.5, 0.5, 0.2, 0.2), (0, 0, 0.2, 0.2)),
        boxes_array((0, 0, 0.5, 1)),
        boxes_array((0, 0, 1, 1)),
    ]
    predicted = [
        boxes_array((0, 0, 0.5, 0.5)),  # IoU 1, IoBB 1
        boxes_array((0, 0, 0.4, 0.2), (0.9, 0.9, 0.1, 0.1)),  # the best pair: .04/.08 = IoU .5, IoBB .5; one false box
        boxes_array((0.25, 0, 0.5, 1)),  # .25/.75 = IoU 1/3, IoBB .5
        boxes_array(),  # an empty map
    ]
    scores = box_scores(predicted, true)
    assert scores.images == 4
    assert scores.mean_iou == pytest.approx((1 + 0.5 + 1 / 3) / 4)
    assert scores.mean_iobb == pytest.approx((1 + 0.5 + 0.5) / 4)
    assert [rate.limit for rate in scores.iou] == list(LIMITS)
    assert [rate.hits for rate in scores.iou] == [3, 3, 3, 2, 1, 1, 1]  # .5 > .5 is false
    assert [rate.hits for rate in scores.iobb] == [3, 3, 3, 3, 1, 1, 1]
    assert [rate.false_boxes for rate in scores.iou] == [0.25, 0.25, 0.25, 0.5, 0.75, 0.75, 0.75]
    rate = scores.iou[3]
    z, n, p = 1.959964, 4, 0.5  # Wilson's interval as textbooks write it
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (rate.low, rate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_chance_of_a_box_that_fits_in_two_ways():
    # A box of width 1/2 and full height slides by 0 to 1/2; the true one is the left half: IoBB = 1 - 2 x, so it is
    # above T for x < (1 - T) / 2, of 1/2; IoU = (1/2 - x) / (1/2 + x) > T for x < (1 - T) / (1 + T) / 2.
    scores = box_scores([boxes_array((0.5, 0, 0.5, 1))], [boxes_array((0, 0, 0.5, 1))])
    for iou, iobb, limit in zip(scores.iou, scores.iobb, LIMITS, strict=True):
        assert iobb.chance == pytest.approx(1 - limit, abs=1 / 32)
        assert iou.chance == pytest.approx((1 - limit) / (1 + limit), abs=1 / 32)
        assert iou.hits == iobb.hits == 0
    twice = box_scores([boxes_array((0.5, 0, 0.5, 1), (0, 0, 0.5, 1))], [boxes_array((0, 0, 0.5, 1))])
    for one, two in zip(scores.iou, twice.iou, strict=True):
        assert two.chance == pytest.approx(1 - (1 - one.chance) ** 2)


def test_random_boxes_hit_as_often_as_chance():
    rng = np.random.default_rng(0)

    def somewhere(count):
        sizes = rng.uniform(0.1, 0.5, (count, 2))
        return [boxes_array((*(rng.random(2) * (1 - size)), *size)) for size in sizes]

    scores = box_scores(somewhere(3000), somewhere(3000))
    for rate in (*scores.iou[:4], *scores.iobb):
        assert stats.binomtest(rate.hits, 3000, rate.chance).pvalue > 1e-5


def test_bad_scoring_inputs_are_errors():
    box = boxes_array((0, 0, 1, 1))
    with pytest.raises(CxrError, match="1 for 2"):
        box_scores([box, box], [box])
    with pytest.raises(CxrError, match="image 1 has no true box"):
        box_scores([box, box], [box, boxes_array()])
    heat = np.ones((8, 8), np.float32)
    with pytest.raises(CxrError, match="threshold must be above 0"):
        detected(heat, threshold=0)
    with pytest.raises(CxrError, match="regions must not be 'most'"):
        detected(heat, regions="most")
