"""Means over folds against SciPy's t-test and the formula of the correction."""

import numpy as np
import pytest
from scipy import stats

from cxrjax.errors import CxrError
from cxrjax.metrics.comparison import mean_over_folds

EACH = (0.031, 0.018, 0.044, 0.027, -0.002)


def test_without_shared_training_images_it_is_the_t_test():
    result, expected = mean_over_folds(EACH, test_to_train=0), stats.ttest_1samp(EACH, 0)
    assert result.p == pytest.approx(expected.pvalue)
    for confidence in (0.9, 0.95):
        assert result.interval(confidence) == pytest.approx(tuple(expected.confidence_interval(confidence)))


def test_shared_training_images_widen_the_interval():
    plain, corrected = mean_over_folds(EACH, test_to_train=0), mean_over_folds(EACH, test_to_train=0.25)
    assert corrected.value == plain.value == pytest.approx(np.mean(EACH))
    # Five folds, a quarter as many test as training images: 1/5 + 1/4 in place of 1/5.
    assert corrected.error / plain.error == pytest.approx(np.sqrt(0.45 / 0.2))
    assert corrected.error == pytest.approx(np.std(EACH, ddof=1) * np.sqrt(0.45))
    assert corrected.p > plain.p


def test_coverage_is_nominal_for_correlated_folds():
    # Values whose correlation is test / (test + train), which is what the correction stands for.
    rng, ratio, k = np.random.default_rng(3), 0.25, 5
    shared = np.sqrt(ratio / (1 + ratio))
    values = shared * rng.standard_normal((4000, 1)) + np.sqrt(1 - shared**2) * rng.standard_normal((4000, k))
    bounds = np.array([mean_over_folds(row, test_to_train=ratio).interval(0.9) for row in values])
    holds = np.mean((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0))
    assert holds == pytest.approx(0.9, abs=0.02)


def test_one_fold_or_equal_folds():
    alone = mean_over_folds([0.1], test_to_train=0.3)
    assert alone.value == 0.1
    assert np.isnan([alone.error, alone.p, *alone.interval()]).all()
    assert mean_over_folds([0.1, 0.1], test_to_train=0.3).interval() == (0.1, 0.1)
    assert (mean_over_folds([0.1, 0.1], test_to_train=0).p, mean_over_folds([0, 0], test_to_train=0).p) == (0, 1)


def test_bad_input_is_refused():
    with pytest.raises(CxrError, match="0 folds"):
        mean_over_folds([], test_to_train=0.2)
    with pytest.raises(CxrError, match="give at least 1 fold"):
        mean_over_folds(EACH, test_to_train=-1)
    with pytest.raises(CxrError, match="confidence=95"):
        mean_over_folds(EACH, test_to_train=0.2).interval(95)
