"""Temperatures against scikit-learn's logistic regression, and their effect on calibration and ranking."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from cxrjax.errors import CxrError
from cxrjax.metrics.auc import auroc
from cxrjax.metrics.calibration import MAX_TEMPERATURE, calibration_report, fit_temperatures
from cxrjax.metrics.predictions import Predictions, log_odds


def simulated(n, sharpness, seed=0):
    """Findings with calibrated logits, scaled by a sharpness."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, len(sharpness))) * 1.5 - 0.5
    label_mask = rng.random(truth.shape) < 0.9
    return table(truth * sharpness, rng.random(truth.shape) < expit(truth), label_mask)


def table(logit, label, label_mask=None):
    logit, label = (np.array(x, float).reshape(len(logit), -1) for x in (logit, label))
    ids = np.arange(len(logit))
    label_mask = np.ones(label.shape, bool) if label_mask is None else label_mask
    return Predictions(ids, ids, tuple("ABCD"[: label.shape[1]]), logit, label, label_mask)


def test_equals_logistic_regression_without_intercept():
    validation = simulated(2000, (0.4, 1.0, 3.0))
    result = fit_temperatures(validation)
    for k, value in enumerate(result.values):
        label_mask = validation.label_mask[:, k]
        peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
        peer.fit(validation.logit[label_mask, k : k + 1], validation.label[label_mask, k])
        assert 1 / value == pytest.approx(peer.coef_[0, 0], rel=1e-5)
    assert result.reasons == ("", "", "")
    np.testing.assert_allclose(result.values, [0.4, 1, 3], rtol=0.15)


def test_is_the_minimum_of_the_loss():
    validation = simulated(500, (2.0,), seed=1)
    label_mask = validation.label_mask[:, 0]
    signed = np.where(validation.label[label_mask, 0] > 0, 1, -1) * validation.logit[label_mask, 0]
    least = minimize_scalar(lambda t: -log_expit(signed / t).mean(), bounds=(0.01, 100), method="bounded")
    assert fit_temperatures(validation).values[0] == pytest.approx(least.x, rel=1e-4)


def test_scaling_improves_calibration_and_keeps_the_ranking():
    validation, test = (simulated(4000, (1.0, 3.0), seed=seed) for seed in (0, 1))
    scaled = fit_temperatures(validation).apply(test)
    before, after = calibration_report(test), calibration_report(scaled)
    assert after[1]["ece_width"] < 0.25 * before[1]["ece_width"]
    assert after[1]["brier"] < before[1]["brier"]
    for k in range(2):
        label_mask = test.label_mask[:, k]
        assert auroc(scaled.logit[:, k], test.label[:, k], label_mask) == auroc(
            test.logit[:, k], test.label[:, k], label_mask
        )


def test_findings_are_matched_by_name():
    temperatures = fit_temperatures(simulated(500, (1.0, 3.0)))
    test = simulated(50, (1.0, 3.0), seed=1)
    np.testing.assert_array_equal(
        temperatures.apply(test.select("B")).logit[:, 0], temperatures.apply(test).logit[:, 1]
    )
    with pytest.raises(CxrError, match="no temperature for C; fitted for A, B"):
        temperatures.apply(simulated(50, (1, 1, 1)))


def test_undefined_findings_keep_temperature_1():
    result = fit_temperatures(table(np.ones((3, 2)), [[1, 0], [1, 1], [1, 0]], np.array([[True, False]] * 3)))
    assert result.values == (1, 1)
    assert result.reasons == ("no negative example", "no known label")


@pytest.mark.parametrize(
    ("logit", "label", "value", "reason"),
    [
        ([-2, -1, 1, 2], [0, 0, 1, 1], 1 / MAX_TEMPERATURE, "separate"),
        ([-2, -1, 1, 2], [1, 1, 0, 0], MAX_TEMPERATURE, "inverted"),
        ([0, 0, 0, 0], [1, 0, 0, 1], MAX_TEMPERATURE, "uninformative"),
    ],
)
def test_limits_are_named(logit, label, value, reason):
    result = fit_temperatures(table(logit, label))
    assert result.values[0] == pytest.approx(value)
    assert reason in result.reasons[0]


def test_infinite_logits_do_not_overflow():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=200) * 2
    label = rng.random(200) < 1 / (1 + np.exp(-logit))
    logit[:2], label[:2] = 1e300, [True, False]  # certain, and once wrong
    result = fit_temperatures(table(logit, label))
    assert math.isfinite(result.values[0])
    assert np.isfinite(result.apply(table(logit, label)).logit).all()


def exclusive(n, sharpness, seed=0):
    """Images of four exclusive classes with calibrated logits, scaled by a sharpness."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, 4)) * 1.5
    actual = [rng.choice(4, p=p) for p in softmax(truth, axis=1)]
    return table(log_odds(truth * sharpness, "cross_entropy"), np.eye(4)[actual]), truth * sharpness


def test_exclusive_classes_have_one_temperature_which_is_the_minimum_of_their_loss():
    validation, logits = exclusive(3000, 2.5)
    result = fit_temperatures(validation, exclusive=True)

    def loss(t):
        return log_loss(validation.label, softmax(logits / t, axis=1))

    least = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-7})
    assert set(result.values) == {result.values[0]}
    assert result.values[0] == pytest.approx(least.x, rel=1e-5)
    assert result.values[0] == pytest.approx(2.5, rel=0.1)
    scaled = result.apply(validation).probability
    np.testing.assert_allclose(scaled, softmax(logits / result.values[0], axis=1), rtol=1e-10)
    np.testing.assert_allclose(scaled.sum(1), 1)
    with pytest.raises(CxrError, match="needs all of them: A, B, C, D"):
        result.apply(validation.select("AB"))


def test_separable_and_unlabelled_exclusive_classes():
    sure = table(log_odds(np.eye(3) * 5, "cross_entropy"), np.eye(3))
    assert fit_temperatures(sure, exclusive=True).values[0] == pytest.approx(1 / MAX_TEMPERATURE)
    assert "separate" in fit_temperatures(sure, exclusive=True).reasons[2]
    wrong = table(log_odds(np.eye(3) * 5, "cross_entropy"), np.eye(3)[[1, 2, 0]])
    assert fit_temperatures(wrong, exclusive=True).values[0] == pytest.approx(MAX_TEMPERATURE)
    nobody = table(log_odds(np.eye(3), "cross_entropy"), np.eye(3), np.zeros((3, 3), bool))
    assert (fit_temperatures(nobody, exclusive=True).values, fit_temperatures(nobody, exclusive=True).reasons[0]) == (
        (1,) * 3,
        "no known label",
    )
