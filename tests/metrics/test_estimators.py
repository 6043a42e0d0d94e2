"""Estimators of the area under the ROC curve against scikit-learn and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn import metrics

from cxrjax.metrics.auc import AUC_ESTIMATORS, auc_report, binormal_auc, trapezoid_auc
from cxrjax.metrics.predictions import Predictions

both_classes = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


@settings(deadline=None)
@given(both_classes)
def test_trapezoid_and_mann_whitney_match_sklearn_and_scipy(rows):
    score, label = (np.array(column) for column in zip(*rows, strict=True))
    score = score.astype(float)
    fpr, tpr, _ = metrics.roc_curve(label, score)
    assert trapezoid_auc(score, label) == pytest.approx(metrics.auc(fpr, tpr), abs=1e-12)
    u = mannwhitneyu(score[label], score[~label]).statistic
    assert AUC_ESTIMATORS["mann_whitney"](score, label) == pytest.approx(u / (label.sum() * (~label).sum()), abs=1e-12)


def test_binormal_is_the_closed_form():
    rng = np.random.default_rng(0)
    label = np.arange(200_000) < 80_000
    score = np.where(label, 1 + 1.5 * rng.normal(size=200_000), rng.normal(size=200_000))
    truth = norm.cdf(1 / np.hypot(1.5, 1))
    assert binormal_auc(score, label) == pytest.approx(truth, abs=0.004)
    assert binormal_auc(score, label) == pytest.approx(metrics.roc_auc_score(label, score), abs=0.003)
    assert binormal_auc(np.array([0.0, 2, 1, 3]), np.array([0, 0, 1, 1])) == pytest.approx(norm.cdf(1 / 2))


def test_binormal_of_logits_without_bound():
    label = np.array([0, 0, 0, 1, 1, 1])
    small = np.array([-1, 0.5, 0, 1, 0.2, 1])
    assert binormal_auc(small * 1e300, label) == pytest.approx(binormal_auc(small, label), rel=1e-12)


def test_known_labels_only():
    rng = np.random.default_rng(1)
    score, label, label_mask = rng.normal(size=60), rng.random(60) < 0.5, rng.random(60) < 0.6
    for estimator in AUC_ESTIMATORS.values():
        assert estimator(score, label, label_mask) == pytest.approx(
            estimator(score[label_mask], label[label_mask]), abs=1e-12
        )


def test_rows_give_reasons_for_undefined_values():
    label = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    logit = np.array([[2.0, 1, 3], [1, 2, 1], [0, 3, 1], [1, 4, 1]])
    ids = np.arange(4)
    rows = auc_report(Predictions(ids, ids, ("A", "B", "C"), logit, label, np.ones((4, 3), bool)))
    assert [row["finding"] for row in rows] == ["A", "B", "C", "mean"]
    assert [row["reason"] for row in rows[:3]] == ["", "no positive example", ""]
    assert np.isnan([rows[1][name] for name in AUC_ESTIMATORS]).all()
    assert rows[2]["mann_whitney"] == rows[2]["trapezoid"] == 1
    assert np.isnan(rows[2]["binormal"])  # one positive example has no spread
    assert rows[0]["trapezoid"] == rows[0]["mann_whitney"] == 0.875
    assert rows[3]["mann_whitney"] == pytest.approx((0.875 + 1) / 2)
    assert rows[3]["binormal"] == rows[0]["binormal"]
    assert rows[3]["reason"] == "undefined: trapezoid 1, mann_whitney 1, binormal 2"


def test_constant_scores():
    score, label = np.zeros(4), np.array([0, 0, 1, 1])
    assert trapezoid_auc(score, label) == 0.5
    assert np.isnan(binormal_auc(score, label))
