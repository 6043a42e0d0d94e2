"""Holm's adjustment against a worked example, and its family-wise error rate."""

import numpy as np
import pytest

from cxrjax.errors import CxrError
from cxrjax.metrics.comparison import holm


def test_hand_computed_table():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02], rtol=1e-12)
    np.testing.assert_allclose(holm(np.array([0.6, 0.5, 0.001])), [1, 1, 0.003], rtol=1e-12)


def test_undefined_tests_are_not_counted():
    adjusted = holm(np.array([np.nan, 0.01, 0.04, np.nan, 0.03, 0.005]))
    np.testing.assert_allclose(adjusted, [np.nan, 0.03, 0.06, np.nan, 0.06, 0.02], rtol=1e-12)
    assert np.isnan(holm(np.array([np.nan]))).all()
    assert holm(np.zeros(0)).shape == (0,)


def test_adjusted_values_match_the_step_down_procedure():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.random(7) ** 3
        rejected = set()
        for step, k in enumerate(np.argsort(p)):  # Holm's own words: stop at the first that is not small enough
            if p[k] > 0.05 / (7 - step):
                break
            rejected.add(k)
        assert set(np.flatnonzero(holm(p) <= 0.05)) == rejected


def test_the_family_wise_error_rate_is_bounded():
    p = np.random.default_rng(1).random((4000, 14))  # nothing is true
    assert np.mean([holm(row).min() <= 0.05 for row in p]) == pytest.approx(0.05, abs=0.012)
    assert np.mean(p.min(axis=1) <= 0.05) > 0.4  # without it


def test_invalid_p_values_are_refused():
    with pytest.raises(CxrError, match="between 0 and 1"):
        holm(np.array([0.5, 1.5]))
