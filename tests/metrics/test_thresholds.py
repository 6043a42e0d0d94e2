"""Thresholds and their rates against scikit-learn and an exhaustive search."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.thresholds import ConfusionCounts, OperatingPoints, accuracy_at_half, choose_thresholds


def table(score, label, label_mask=None, findings=None):
    score, label = (np.array(x, float).reshape(len(score), -1) for x in (score, label))
    label_mask = np.ones(label.shape, bool) if label_mask is None else np.array(label_mask, bool).reshape(label.shape)
    ids = np.arange(len(score))
    return Predictions(ids, ids, findings or tuple("ABCDE"[: label.shape[1]]), score, label, label_mask)


def simulated(n=400, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.random((n, 3)) < [0.2, 0.5, 0.05]
    return table(rng.normal(size=(n, 3)).round(1) + label - 0.7, label, rng.random((n, 3)) < 0.9)


both_classes = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


@settings(deadline=None)
@given(both_classes, st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0]))
def test_thresholds_are_the_best_of_all(rows, target):
    score, label = (np.array(column) for column in zip(*rows, strict=True))
    validation = table(score, label)

    def rates(threshold):
        called = score >= threshold
        return called[label].mean(), (~called)[~label].mean()

    every = [*np.unique(score), np.inf]  # all there are
    youden = choose_thresholds(validation)
    fpr, tpr, _ = metrics.roc_curve(label, score)
    assert sum(rates(youden.threshold[0])) - 1 == pytest.approx(max(tpr - fpr))
    result = choose_thresholds(validation, "sensitivity", target)
    reaching = [t for t in every if rates(t)[0] >= target - 1e-9]
    assert result.threshold[0] == max(reaching)
    left = choose_thresholds(validation, "specificity", target)
    assert rates(left.threshold[0])[1] >= target - 1e-9
    assert rates(left.threshold[0]) == rates(min(t for t in every if rates(t)[1] >= target - 1e-9))


def test_rates_match_sklearn():
    validation, test = simulated(seed=0), simulated(seed=1)
    for rule in ("youden", "sensitivity", "specificity"):
        points = choose_thresholds(validation, rule, 0.8)
        for k, row in enumerate(points.apply(test)):
            label_mask = test.label_mask[:, k]
            actual, called = test.label[label_mask, k] > 0, test.logit[label_mask, k] >= points.threshold[k]
            tn, fp, fn, tp = metrics.confusion_matrix(actual, called).ravel()
            assert (row["tp"], row["fp"], row["fn"], row["tn"]) == (tp, fp, fn, tn)
            assert row["sensitivity"] == pytest.approx(metrics.recall_score(actual, called))
            assert row["specificity"] == pytest.approx(metrics.recall_score(~actual, ~called))
            assert row["ppv"] == pytest.approx(metrics.precision_score(actual, called))
            assert row["npv"] == pytest.approx(metrics.precision_score(~actual, ~called))
            assert row["accuracy"] == pytest.approx(metrics.accuracy_score(actual, called))
            assert row["f1"] == pytest.approx(metrics.f1_score(actual, called))
            assert row["threshold"] == pytest.approx(1 / (1 + math.exp(-points.threshold[k])))


def test_a_fixed_sensitivity_is_kept_on_validation():
    validation = simulated()
    points = choose_thresholds(validation, "sensitivity", 0.9)
    assert points.rule == "sensitivity >= 0.9"
    for row in points.apply(validation):
        assert 0.9 <= row["sensitivity"] < 0.9 + 0.1
    assert (
        choose_thresholds(table([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0], [1] * 10 + [0]), "sensitivity", 0.7).threshold[0]
        == 4
    )


def test_a_useless_score_predicts_no_positive():
    points = choose_thresholds(table([0, 1, 2, 3], [1, 1, 0, 0]))
    assert points.threshold[0] == np.inf
    row = points.apply(table([5, 9], [1, 0]))[0]
    assert (row["threshold"], row["sensitivity"], row["specificity"]) == (1, 0, 1)
    assert math.isnan(row["ppv"])


def test_undefined_thresholds_have_a_reason_and_no_rates():
    validation = table(np.zeros((3, 2)), [[1, 0], [0, 0], [1, 0]])
    points = choose_thresholds(validation)
    row = points.apply(simulated().select("AB"))[1]
    assert row["reason"] == "no positive example"
    assert np.isnan([row["threshold"], row["sensitivity"], row["npv"], row["accuracy"]]).all()
    assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == 0


def test_findings_are_matched_by_name():
    points = choose_thresholds(simulated())
    turned = simulated(seed=1).select("CBA")
    assert points.apply(turned) == points.apply(simulated(seed=1))
    with pytest.raises(CxrError, match="unknown finding 'C'"):
        points.apply(simulated().select("AB"))


def test_accuracy_over_all_labels():
    predictions = simulated()
    label_mask = predictions.label_mask
    expected = metrics.accuracy_score(predictions.label[label_mask] > 0, predictions.probability[label_mask] >= 0.5)
    assert accuracy_at_half(predictions) == pytest.approx(expected)
    assert accuracy_at_half(table([0.0, -1e-9, 3], [1, 0, 0], [1, 1, 0])) == 1  # a probability of 0.5 is a yes
    assert math.isnan(accuracy_at_half(table([0.0], [1], [0])))


def test_counts_of_nothing_are_nan():
    counts = ConfusionCounts.from_decisions(np.zeros((2, 1), bool), np.ones((2, 1)), np.array([[True], [False]]))
    assert (counts.tp[0], counts.fp[0], counts.fn[0], counts.tn[0]) == (0, 0, 1, 0)
    rates = {name: value[0] for name, value in counts.rates().items()}
    assert (rates["sensitivity"], rates["f1"], rates["prevalence"], rates["npv"]) == (0, 0, 1, 0)
    assert np.isnan([rates["ppv"], rates["specificity"], rates["balanced_accuracy"]]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: choose_thresholds(t, "yuden"), "did you mean 'youden'"),
        (lambda t: choose_thresholds(t, "sensitivity", 90), "target=90"),
        (lambda t: choose_thresholds(t, "sensitivity", 0), "target=0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(CxrError, match=message):
        call(simulated())


def test_operating_points_can_be_given():
    points = OperatingPoints(("A",), np.zeros(1), ("",), "given")
    assert points.apply(table([1, -1, 2], [1, 0, 0]))[0]["accuracy"] == pytest.approx(2 / 3)
