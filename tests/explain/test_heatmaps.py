"""Normalised, resized and smoothed maps against expected values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cxrjax.explain.localisation import normalise, resize, smooth


@given(hnp.arrays(np.float32, (2, 3, 4, 5), elements=st.just(0.0) | st.floats(2**-20, 2**20, width=32)))
def test_normalised_maps_reach_from_zero_to_one(maps):
    normal = normalise(maps)
    assert normal.dtype == np.float32
    for before, after in zip(maps.reshape(6, 4, 5), normal.reshape(6, 4, 5), strict=True):
        assert after.max() == (1 if before.any() else 0)
        assert after.min() >= 0
        np.testing.assert_allclose(after * before.max(), before, rtol=1e-6)


def test_resizing_interpolates_between_centres():
    maps = np.array([[[[0.0, 1.0], [2.0, 3.0]]]], np.float32)
    large = resize(maps, 4, 8)
    assert large.shape == (1, 1, 4, 8)
    columns = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)
    rows = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)
    np.testing.assert_allclose(large[0, 0], 2 * rows[:, None] + columns, atol=1e-6)


def test_maps_are_smoothed_independently():
    maps = np.zeros((2, 1, 9, 9), np.float32)
    maps[0, 0, 4, 4] = 3
    blurred = smooth(maps, 1.0)
    around = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    around /= around.sum()
    np.testing.assert_allclose(blurred[0, 0], 3 * np.outer(around, around), atol=1e-4)
    assert blurred.sum() == pytest.approx(3, rel=1e-5)
    assert not blurred[1].any()
