"""Gaussians fitted to maps of known shape: sampled ones, sums of two, and the random walk of uniform kernels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import convolve2d
from scipy.stats import multivariate_normal

from cxrjax.errors import CxrError
from cxrjax.explain import erf
from cxrjax.explain.erf import fit_least_squares, fit_moments


def sampled(shape, centre, major, minor, degrees) -> np.ndarray:
    """SciPy's density on the centres of pixels; the longer axis is turned from the columns' direction to the rows'."""
    turn = math.radians(degrees)
    axes = np.array([[math.sin(turn), math.cos(turn)], [math.cos(turn), -math.sin(turn)]])  # rows: major, minor
    covariance = axes.T @ np.diag([major**2, minor**2]) @ axes
    return multivariate_normal(np.asarray(centre, float), covariance).pdf(np.moveaxis(np.indices(shape), 0, -1))


@given(st.floats(3, 8), st.floats(0.4, 0.9), st.floats(-80, 80), st.floats(-5, 5))
@settings(max_examples=15, deadline=None)
def test_a_gaussian_is_recovered(major, ratio, degrees, shift):
    field = 5 * sampled((96, 110), (48 + shift, 55 - shift), major, ratio * major, degrees)
    for fit in (fit_moments(field), fit_least_squares(field)):
        assert (fit.row, fit.column) == pytest.approx((48 + shift, 55 - shift), abs=1e-3)
        assert (fit.major, fit.minor) == pytest.approx((major, ratio * major), rel=1e-3)
        assert fit.angle == pytest.approx(degrees, abs=0.1)
        assert fit.explained == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mass", [0.5, 0.9545])
def test_diameter_is_the_mass_quantile(mass):
    field = sampled((200, 200), (100, 100), 14, 9, 30)
    assert fit_moments(field).diameter(mass) == pytest.approx(erf.erf_size(field, mass)[1], rel=0.01)
    assert fit_moments(field).diameter(1.0) == math.inf


def test_a_faint_wide_tail_widens_the_moments_and_not_the_fit():
    bulk, tail = sampled((128, 128), (64, 64), 4, 4, 0), sampled((128, 128), (64, 64), 20, 20, 0)
    field = 0.9 * bulk + 0.1 * tail
    assert fit_moments(field).major == pytest.approx(math.sqrt(0.9 * 16 + 0.1 * 400), rel=0.01)
    assert fit_least_squares(field).major == pytest.approx(4, rel=0.03)
    assert fit_moments(field).explained < fit_least_squares(field).explained


def test_a_truncated_map_is_fitted():
    field = sampled((64, 64), (60, 32), 9, 9, 0)
    assert fit_least_squares(field).major == pytest.approx(9, rel=1e-3)
    assert fit_least_squares(field).row == pytest.approx(60, abs=1e-2)
    assert fit_moments(field).minor < 8


def test_large_maps_are_averaged_without_bias():
    fit = fit_least_squares(sampled((700, 1000), (300, 450), 12, 7, 20))
    assert (fit.row, fit.column) == pytest.approx((300, 450), abs=0.01)
    assert (fit.major, fit.minor, fit.angle) == pytest.approx((12, 7, 20), rel=0.01)


def test_uniform_kernels_in_a_row_are_a_random_walk():
    """Luo et al., section 2.2: the standard deviation is sqrt(n (k^2 - 1) / 12)."""
    field = np.ones((1, 1))
    for _ in range(40):
        field = convolve2d(field, np.ones((3, 3)) / 9)
    sigma = math.sqrt(40 * (3**2 - 1) / 12)
    assert (fit_moments(field).major, fit_moments(field).minor) == pytest.approx((sigma, sigma), rel=1e-9)
    assert fit_least_squares(field).major == pytest.approx(sigma, rel=0.02)
    squared = fit_least_squares(field**2)
    assert squared.major == pytest.approx(sigma / math.sqrt(2), rel=0.02)
    assert squared.explained > 0.999


def test_single_pixels_and_lines_have_a_size():
    field = np.zeros((16, 16))
    field[4, 9] = 2
    assert (fit_moments(field).row, fit_moments(field).column, fit_moments(field).major) == (4, 9, 0)
    assert fit_least_squares(field).major < 0.5
    field[4, :] = 2
    assert fit_moments(field).major == pytest.approx(math.sqrt((16**2 - 1) / 12))
    assert fit_moments(field).minor == pytest.approx(0, abs=1e-9)
    assert fit_moments(field).angle == pytest.approx(0, abs=1e-6)


def test_maps_without_a_gaussian_are_errors():
    for field in (np.zeros((4, 4)), np.array([[1.0, -1.0]]), np.array([[1.0, np.nan]])):
        for fit in (fit_moments, fit_least_squares):
            with pytest.raises(CxrError, match="finite, not negative, and not zero"):
                fit(field)
