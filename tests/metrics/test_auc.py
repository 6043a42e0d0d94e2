"""AUROC, average precision and ROC curves against scikit-learn, with ties, weights and unknown labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from cxrjax.metrics.auc import Ranking, auroc, mean_auroc, roc_curve, undefined_reason

examples = st.lists(
    st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 4), st.booleans()), min_size=2, max_size=40
).filter(lambda rows: len({positive for _, positive, weight, _ in rows if weight}) == 2)


def columns(rows):
    score, label, weight, label_mask = (np.array(column) for column in zip(*rows, strict=True))
    return score / 2, label, weight, label_mask


def measure(score, label, label_mask=None, weight=None):
    """AUROC and average precision of one finding."""
    weight = np.ones(len(score)) if weight is None else weight.astype(float)
    return [float(value[0]) for value in Ranking.from_scores(score, label, label_mask).measure(weight[:, None])]


@given(examples)
def test_matches_sklearn_with_ties_and_weights(rows):
    score, label, weight, _ = columns(rows)
    expected = [f(label, score, sample_weight=weight) for f in (metrics.roc_auc_score, metrics.average_precision_score)]
    assert measure(score, label, weight=weight) == pytest.approx(expected, abs=1e-12)


@given(examples)
def test_unknown_labels_do_not_count(rows):
    score, label, _, label_mask = columns(rows)
    if undefined_reason(label, label_mask):
        assert np.isnan(measure(score, label, label_mask)).all()
    else:
        assert auroc(score, label, label_mask) == pytest.approx(
            metrics.roc_auc_score(label[label_mask], score[label_mask]), abs=1e-12
        )


@given(examples)
def test_weights_act_like_copies(rows):
    score, label, weight, _ = columns(rows)
    copies = np.repeat(np.arange(len(score)), weight)
    assert measure(score, label, weight=weight)[0] == pytest.approx(auroc(score[copies], label[copies]), abs=1e-12)


@given(examples)
def test_curve_matches_sklearn_and_its_area_is_the_auroc(rows):
    score, label, _, _ = columns(rows)
    if len(np.unique(label)) < 2:
        return
    curve = roc_curve(score, label)
    fpr, tpr, _ = metrics.roc_curve(label, score, drop_intermediate=False)
    assert {(round(x, 9), round(y, 9)) for x, y in zip(curve.fpr, curve.tpr, strict=True)} <= {
        (round(x, 9), round(y, 9)) for x, y in zip(fpr, tpr, strict=True)
    }
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(auroc(score, label), abs=1e-12)
    for fpr, tpr, threshold in zip(*curve, strict=True):
        called = score >= threshold
        assert called[label].mean() == pytest.approx(tpr)
        assert called[~label].mean() == pytest.approx(fpr)


def test_curve_drops_collinear_points():
    curve = roc_curve(np.arange(100.0), np.arange(100) >= 40)  # perfect: up, then across
    np.testing.assert_array_equal(curve.fpr, [0, 0, 1])
    np.testing.assert_array_equal(curve.tpr, [0, 1, 1])
    np.testing.assert_array_equal(curve.threshold, [np.inf, 40, 0])


def test_several_weightings_are_computed_at_once():
    rng = np.random.default_rng(0)
    score, label, weight = rng.normal(size=50).round(1), rng.random(50) < 0.3, rng.random((50, 7))
    at_once = Ranking.from_scores(score, label).measure(weight)
    for r in range(7):
        assert at_once[0][r] == pytest.approx(
            metrics.roc_auc_score(label, score, sample_weight=weight[:, r]), abs=1e-12
        )
        assert at_once[1][r] == pytest.approx(
            metrics.average_precision_score(label, score, sample_weight=weight[:, r]), abs=1e-12
        )


def test_known_values():
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75  # scikit-learn's own example
    assert auroc(np.zeros(6), np.array([0, 1, 0, 1, 0, 1])) == 0.5
    assert measure(np.zeros(4), np.array([1, 0, 0, 0]))[1] == 0.25


@pytest.mark.parametrize(
    ("label", "label_mask", "reason"),
    [
        ([0, 0, 0], [1, 1, 1], "no positive example"),
        ([1, 1, 1], [1, 1, 1], "no negative example"),
        ([1, 0, 0], [0, 1, 1], "no positive example"),
        ([1, 0, 1], [0, 0, 0], "no known label"),
        ([1, 0, 1], [1, 1, 0], ""),
    ],
)
def test_undefined_scores_are_nan_with_a_reason(label, label_mask, reason):
    score, label, label_mask = np.array([0.2, 0.5, 0.9]), np.array(label), np.array(label_mask, bool)
    assert undefined_reason(label, label_mask) == Ranking.from_scores(score, label, label_mask).reason == reason
    assert np.isnan(auroc(score, label, label_mask)) == bool(reason)
    assert (roc_curve(score, label, label_mask) is None) == bool(reason)


def test_only_one_class_weightings_are_nan():
    ranking = Ranking.from_scores(np.array([3.0, 2.0, 1.0]), np.array([1, 0, 1]))
    values = ranking.measure(np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0]]))
    np.testing.assert_array_equal(values[0], [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(np.isnan(values[1]), [False, True, True])


def test_infinite_scores_rank_but_nan_scores_do_not():
    label = np.array([0, 0, 1, 1])
    assert auroc(np.array([-np.inf, 0.0, 1.0, np.inf]), label) == 1
    assert np.isnan(auroc(np.array([np.nan, 0.0, 1.0, 2.0]), label))


def test_mean_skips_undefined_findings():
    logits = np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], np.float32)
    labels = np.array([[0, 0], [1, 0], [0, 0]], np.float32)
    assert mean_auroc(logits, labels, np.ones((3, 2), bool)) == 0.5
    assert np.isnan(mean_auroc(logits, labels, np.zeros((3, 2), bool)))
