"""Localisation scores against cases computed by hand and textbook formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats

from cxrjax.errors import CxrError
from cxrjax.explain.localisation import distance_to, energy_inside, localisation, overlap, points_at, pooled, resolvable


def box(side: int, top: int, left: int, size: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def peak(cells: int, row: int, column: int) -> np.ndarray:
    heat = np.zeros((cells, cells), np.float32)
    heat[row, column] = 1
    return heat


def test_pointing_game_takes_the_centre_of_the_highest_cell():
    mask = box(32, 8, 8, 8)
    assert points_at(peak(8, 2, 2), mask)  # cell 2 is rows 8 to 11, its centre row 10
    assert points_at(peak(8, 3, 3), mask)
    assert not points_at(peak(8, 4, 3), mask)  # centre row 18, 3 px below the mask
    assert not points_at(peak(8, 4, 3), mask, tolerance=2.5)
    assert points_at(peak(8, 4, 3), mask, tolerance=3)
    assert not points_at(np.zeros((8, 8), np.float32), np.ones((32, 32), bool))


@given(st.integers(0, 10), st.integers(0, 10), st.integers(1, 6))
def test_distances_match_scipy(top, left, size):
    mask = box(16, top, left, size)
    np.testing.assert_allclose(distance_to(mask), ndimage.distance_transform_edt(~mask), rtol=1e-5)


def test_energy_and_overlap_of_known_shapes():
    mask = box(16, 0, 0, 8)
    assert energy_inside(np.ones((16, 16), np.float32), mask) == pytest.approx(0.25)
    assert energy_inside(mask.astype(np.float32), mask) == 1
    assert math.isnan(energy_inside(np.zeros((4, 4), np.float32), mask))
    assert overlap(box(16, 0, 0, 8).astype(np.float32), mask) == 1
    assert overlap(box(16, 0, 4, 8).astype(np.float32), mask) == pytest.approx(32 / 96)
    assert overlap(3 * np.ones((2, 2), np.float32), mask) == pytest.approx(0.25)  # a map's height does not matter
    assert overlap(np.zeros((4, 4), np.float32), mask) == 0


def test_scores_of_a_set():
    mask = box(32, 8, 8, 8)
    maps = np.stack([peak(8, 2, 2), peak(8, 3, 2), peak(8, 6, 6), np.zeros((8, 8), np.float32)])
    scores = localisation(maps, [mask] * 4)
    assert (scores.images, scores.hits, scores.hit_rate, scores.empty, scores.resolvable) == (4, 2, 0.5, 1, True)
    assert scores.chance == scores.area == pytest.approx(1 / 16)
    z, n, p = 1.959964, 4, 0.5  # Wilson's interval as textbooks write it
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (scores.low, scores.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert scores.energy == pytest.approx(np.mean([energy_inside(m, mask) for m in maps[:3]]))

    tolerant = localisation(maps, [mask] * 4, tolerance=1 / 8)
    assert tolerant.chance == pytest.approx((ndimage.distance_transform_edt(~mask) <= 4).mean())
    assert localisation(maps[3:], [mask]).hits == 0
    assert math.isnan(localisation(maps[3:], [mask]).energy)


def test_pooled_scores_match_scores_of_all_maps():
    rng = np.random.default_rng(0)
    masks = [box(32, *rng.integers(0, 20, 2), int(rng.integers(4, 12))) for _ in range(12)]
    maps = rng.random((12, 16, 16), np.float32)
    maps[[1, 10, 11]] = 0
    parts = [slice(0, 3), slice(3, 10), slice(10, 12)]  # the last are all empty
    together = localisation(maps, masks)
    scores = pooled([localisation(maps[part], masks[part]) for part in parts])
    for name, value in vars(together).items():
        assert getattr(scores, name) == pytest.approx(value), name


def test_random_maps_hit_as_often_as_chance():
    rng = np.random.default_rng(0)
    masks = [box(32, *rng.integers(0, 20, 2), int(rng.integers(4, 12))) for _ in range(1500)]
    scores = localisation(rng.random((1500, 16, 16), np.float32), masks)
    assert stats.binomtest(scores.hits, 1500, scores.chance).pvalue > 1e-3
    assert scores.energy == pytest.approx(scores.area, rel=0.05)


def test_maps_of_few_cells_are_not_resolvable():
    assert not resolvable((7, 8))
    assert resolvable((8, 8))
    assert not localisation(np.ones((1, 4, 4), np.float32), [box(8, 0, 0, 4)]).resolvable


def test_bad_scoring_inputs_are_errors():
    maps, mask = np.ones((1, 8, 8), np.float32), box(8, 0, 0, 4)
    with pytest.raises(CxrError, match="one mask per map"):
        localisation(maps, [])
    with pytest.raises(CxrError, match="mask 0 is empty"):
        localisation(maps, [mask & ~mask])
    with pytest.raises(CxrError, match="finite and not negative"):
        localisation(-maps, [mask])
