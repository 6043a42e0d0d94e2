"""DeLong's covariance against its definition over all pairs, SAS's published example and the bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm
from sklearn.metrics import roc_auc_score

from cxrjax.errors import CxrError
from cxrjax.metrics.auc import Ranking
from cxrjax.metrics.bootstrap import bootstrap_scores
from cxrjax.metrics.comparison import Estimate, delong

# The ovarian cancer data of DeLong et al. (1988) without missing values, as SAS/STAT prints them in the example
# "Comparing Receiver Operating Characteristic Curves" of PROC LOGISTIC: albumin, total protein, K-G score, outcome.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
3.8 5.7 5 1   3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
2.3 4.4 6 1   4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
3.1 6.6 6 1   4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
3.7 6.1 5 1   3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
3.3 5.7 6 1   3.7 6.9 5 1  3.6 6.6 5 1
"""

FIRST, GAP = np.array([1, 0]), np.array([1, -1])  # the first model's AUROC, and its difference from the second's


def by_pairs(scores, label):
    """AUROCs and covariance by the definition: every positive against every negative."""
    kernel = [
        (s[label][:, None] > s[~label][None]) + 0.5 * (s[label][:, None] == s[~label][None]) for s in np.array(scores)
    ]
    of_positive, of_negative = np.stack([k.mean(1) for k in kernel]), np.stack([k.mean(0) for k in kernel])
    covariance = np.atleast_2d(np.cov(of_positive)) / label.sum() + np.atleast_2d(np.cov(of_negative)) / (~label).sum()
    return np.array([k.mean() for k in kernel]), covariance


def test_published_example_of_three_tests():
    albumin, protein, kg, outcome = np.array(OVARIAN.split(), float).reshape(-1, 4).T
    areas = delong(np.stack([albumin, protein, 10 - kg]), outcome)
    np.testing.assert_allclose(areas.auroc, [0.7366, 0.6478, 0.7258], atol=5e-5)
    np.testing.assert_allclose([areas.contrast(row).error for row in np.eye(3)], [0.0927, 0.1000, 0.1028], atol=5e-5)
    np.testing.assert_allclose(areas.contrast(np.eye(3)[0]).interval(), [0.5549, 0.9182], atol=5e-5)
    for first, value, error, square, p in ((0, 0.0108, 0.0953, 0.0127, 0.9102), (1, -0.0780, 0.1046, 0.5554, 0.4561)):
        gap = areas.contrast(np.eye(3)[first] - np.eye(3)[2])
        np.testing.assert_allclose([gap.value, gap.error, gap.z**2, gap.p], [value, error, square, p], atol=5e-5)
    contrast = np.array([[1, 0, -1], [0, 1, -1]])
    gaps = contrast @ areas.auroc
    joint = gaps @ np.linalg.solve(contrast @ areas.covariance @ contrast.T, gaps)
    np.testing.assert_allclose([joint, chi2.sf(joint, 2)], [2.5340, 0.2817], atol=5e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=4, max_size=40).filter(
        lambda rows: 2 <= sum(row[2] for row in rows) <= len(rows) - 2
    )
)
def test_midranks_equal_the_definition_with_ties(rows):
    first, second, label = (np.array(column) for column in zip(*rows, strict=True))
    areas = delong(np.stack([first, second]), label)
    auroc, covariance = by_pairs([first, second], label)
    np.testing.assert_allclose(areas.auroc, auroc, atol=1e-12)
    np.testing.assert_allclose(areas.covariance, covariance, atol=1e-12)
    gap = areas.contrast(GAP)
    contrast = np.array([1, -1])
    assert gap.error**2 == pytest.approx(contrast @ covariance @ contrast, abs=1e-12)
    alone = delong(np.stack([first, second]), label, patient=np.arange(len(first)))  # an image a patient
    np.testing.assert_allclose(alone.covariance, covariance, atol=1e-12)


def test_unknown_labels_do_not_count():
    rng = np.random.default_rng(0)
    score, label, label_mask = rng.normal(size=(2, 80)), rng.random(80) < 0.4, rng.random(80) < 0.7
    masked, cut = delong(score, label, label_mask), delong(score[:, label_mask], label[label_mask])
    np.testing.assert_allclose(masked.covariance, cut.covariance, atol=1e-15)
    assert masked.auroc[1] == pytest.approx(roc_auc_score(label[label_mask], score[1, label_mask]), abs=1e-12)


def test_patients_are_the_unit_as_in_the_bootstrap():
    rng = np.random.default_rng(3)
    patient = rng.integers(500, size=2000)
    label = rng.random(2000) < 0.2 + 0.4 * (patient % 2)  # some patients have more, and both kinds of image
    shared = rng.normal(size=500)[patient]
    scores = np.stack([label + shared + rng.normal(size=2000), 0.7 * label + shared + rng.normal(size=2000)])
    draws = bootstrap_scores([Ranking.from_scores(s, label) for s in scores], patient, resamples=2000, seed=1)[0]
    areas = delong(scores, label, patient=patient)
    np.testing.assert_allclose(np.sqrt(np.diag(areas.covariance)), draws.std(axis=0, ddof=1), rtol=0.06)
    assert areas.contrast(GAP).error == pytest.approx((draws[:, 0] - draws[:, 1]).std(ddof=1), rel=0.06)
    assert (
        areas.contrast(FIRST).error > 1.15 * delong(scores, label).contrast(FIRST).error
    )  # as independent images: too sure


def test_copied_images_change_nothing():
    rng = np.random.default_rng(4)
    scores, label, patient = rng.normal(size=(2, 60)), rng.random(60) < 0.5, np.arange(60) // 2
    once, thrice = (
        delong(np.repeat(scores, n, axis=1), np.repeat(label, n), patient=np.repeat(patient, n)) for n in (1, 3)
    )
    np.testing.assert_allclose(once.covariance, thrice.covariance, rtol=1e-12)


def test_the_test_holds_its_level():
    rng = np.random.default_rng(5)
    p = []
    for _ in range(400):
        label = np.arange(120) < 40
        common = rng.normal(size=120) + label
        p.append(delong(common + rng.normal(size=(2, 120)), label).contrast(GAP).p)  # two equally good models
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09
    assert 0.4 < np.mean(np.array(p) < 0.5) < 0.6


def test_equal_rankings_do_not_differ():
    rng = np.random.default_rng(6)
    score, label = rng.normal(size=50), rng.random(50) < 0.5
    gap = delong(np.stack([score, np.exp(score)]), label).contrast(GAP)
    assert (gap.value, gap.error, gap.z, gap.p) == (0, 0, 0, 1)


def test_perfect_and_reversed_rankings_have_no_variance():
    label = np.array([0, 0, 1, 1])
    areas = delong(np.stack([label, 1 - label]), label)
    np.testing.assert_array_equal(areas.auroc, [1, 0])
    assert areas.contrast(GAP).p == 0
    assert areas.contrast(FIRST).interval() == (1, 1)


@pytest.mark.parametrize(
    ("label", "patient", "auroc", "reason"),
    [
        ([0, 0, 0, 0], None, np.nan, "no positive example"),
        ([1, 0, 0, 0], None, 0, "only one patient has a positive example"),
        ([1, 0, 1, 0], [0, 1, 0, 2], 0.25, "only one patient has a positive example"),
        ([1, 0, 1, 0], [0, 1, 2, 1], 0.25, "only one patient has a negative example"),
    ],
)
def test_undefined_estimates_are_nan_with_a_reason(label, patient, auroc, reason):
    areas = delong(np.arange(4.0)[None], np.array(label), patient=None if patient is None else np.array(patient))
    assert areas.reason == reason
    np.testing.assert_array_equal(areas.auroc, [auroc])
    assert np.isnan(areas.covariance).all()
    estimate = areas.contrast(np.ones(1))
    assert np.isnan([estimate.error, estimate.p, *estimate.interval()]).all()


def test_intervals_are_normal_quantiles():
    low, high = Estimate(0.8, 0.1).interval(0.9)
    np.testing.assert_allclose([low, high], norm.interval(0.9, 0.8, 0.1))
    with pytest.raises(CxrError, match="between 0 and 1"):
        Estimate(0.8, 0.1).interval(95)
