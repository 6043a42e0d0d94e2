"""Uncertainty from stochastic passes against NumPy, SciPy and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from cxrjax.errors import CxrError
from cxrjax.inference.mc_dropout import summarize_passes, uncertainty_threshold

passes = hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.floats(0, 1))


def of_two(p):
    """Binary entropy by SciPy."""
    return entropy(np.stack([p, 1 - p]), axis=0)


@settings(deadline=None)
@given(passes)
def test_matches_numpy_and_scipy(p):
    result = summarize_passes(p)
    assert result.passes == len(p)
    np.testing.assert_allclose(result.mean, p.mean(0), atol=1e-12)
    np.testing.assert_allclose(result.std, p.std(0), atol=1e-12)
    np.testing.assert_allclose(result.per_image, p.std(0).mean(1), atol=1e-12)
    np.testing.assert_allclose(result.entropy, of_two(p.mean(0)), atol=1e-12)
    np.testing.assert_allclose(result.mutual_information, of_two(p.mean(0)) - of_two(p).mean(0), atol=1e-12)
    assert (result.mutual_information >= 0).all()


@settings(deadline=None)
@given(passes)
def test_exclusive_classes(p):
    p = (p + 1e-3) / (p + 1e-3).sum(axis=2, keepdims=True)
    result = summarize_passes(p, exclusive=True)
    total = entropy(p.mean(0), axis=1)
    np.testing.assert_allclose(result.entropy[:, 0], total, atol=1e-12)
    np.testing.assert_allclose(result.mutual_information[:, 0], total - entropy(p, axis=2).mean(0), atol=1e-12)
    np.testing.assert_allclose(result.std, p.std(0), atol=1e-12)


def test_disagreeing_and_agreeing_passes():
    torn, coin = np.array([[[0.0]], [[1.0]]]), np.full((2, 1, 1), 0.5)
    assert summarize_passes(torn).entropy == summarize_passes(torn).mutual_information == pytest.approx(np.log(2))
    assert summarize_passes(torn).std == 0.5
    assert summarize_passes(coin).entropy == pytest.approx(np.log(2))
    assert summarize_passes(coin).mutual_information == summarize_passes(coin).std == 0


def test_uncertainty_of_an_image_is_the_mean_over_findings():
    spread = np.array([0.05, 0.1, 0.15, 0.3])
    p = np.stack([0.5 + spread, 0.5 - spread])[:, :, None]
    result = summarize_passes(np.concatenate([p, 0 * p + 0.5], axis=2))  # a second class that never varies halves them
    np.testing.assert_allclose(result.per_image, spread / 2)


def test_passes_may_be_streamed_in_any_float():
    p = np.random.default_rng(0).random((100, 5, 3)).astype(np.float32)
    result, streamed = summarize_passes(p), summarize_passes(one for one in p)
    for name in ("mean", "std", "entropy", "mutual_information"):
        np.testing.assert_array_equal(getattr(result, name), getattr(streamed, name))
        assert getattr(result, name).dtype == np.float64
    np.testing.assert_allclose(result.std, p.astype(np.float64).std(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([], "no passes"),
        (np.zeros((2, 3)), "pass 1 has shape .3,.; give images x findings"),
        ([np.zeros((2, 3)), np.zeros((2, 2))], r"pass 2 has shape \(2, 2\); the first has \(2, 3\)"),
        (np.array([[[0.5, 0.5]], [[0.5, 1.5]]]), "pass 2, image 1, finding 2: 1.5 is not a probability"),
        (np.full((1, 1, 1), np.nan), "not a probability"),
    ],
)
def test_bad_passes(p, message):
    with pytest.raises(CxrError, match=message):
        summarize_passes(p)


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 0.5)), st.floats(0.01, 0.5))
def test_the_threshold_is_the_smallest_that_flags_at_most_its_share(validation, share):
    threshold = uncertainty_threshold(validation, share)
    assert (validation > threshold).mean() <= share + 1e-9
    lower = validation[validation < threshold]
    if len(lower):
        assert (validation > lower.max()).mean() > share - 1e-9


def test_a_threshold_needs_images():
    with pytest.raises(CxrError, match="no validation images"):
        uncertainty_threshold(np.zeros(0))
