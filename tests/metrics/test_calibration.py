"""Reliability diagrams, calibration errors and Brier scores against scikit-learn and exact identities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn import calibration as sklearn_calibration
from sklearn import metrics

from cxrjax.errors import CxrError
from cxrjax.metrics.calibration import brier_score, calibration_report, reliability_diagram
from cxrjax.metrics.predictions import Predictions

examples = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda x: x / 10)), st.booleans()),
    min_size=2, max_size=60,
).filter(lambda rows: len({label for _, label in rows}) == 2)  # fmt: skip


@settings(deadline=None)
@given(examples, st.integers(1, 12), st.sampled_from([("width", "uniform"), ("mass", "quantile")]))
def test_bins_match_sklearn(rows, bins, spacing):
    probability, label = (np.array(column) for column in zip(*rows, strict=True))
    result = reliability_diagram(probability, label, bins=bins, spacing=spacing[0])
    observed, predicted = sklearn_calibration.calibration_curve(label, probability, n_bins=bins, strategy=spacing[1])
    full = result.count > 0
    np.testing.assert_allclose(result.observed[full], observed, atol=1e-12)
    np.testing.assert_allclose(result.predicted[full], predicted, atol=1e-12)
    assert np.isnan(result.observed[~full]).all()
    assert result.count.sum() == len(label)
    assert result.ece == pytest.approx((result.count[full] * abs(observed - predicted)).sum() / len(label), abs=1e-12)


@settings(deadline=None)
@given(examples, st.integers(1, 12), st.sampled_from(["width", "mass"]))
def test_brier_score_matches_sklearn_and_its_terms_add_up(rows, bins, spacing):
    probability, label = (np.array(column) for column in zip(*rows, strict=True))
    brier = brier_score(probability, label, bins=bins, spacing=spacing)
    assert brier.score == pytest.approx(metrics.brier_score_loss(label, probability), abs=1e-12)
    assert brier.score == pytest.approx(brier.reliability - brier.resolution + brier.uncertainty, abs=1e-12)
    assert brier.uncertainty == pytest.approx(label.var(), abs=1e-12)
    assert brier.reliability >= 0


def test_murphys_decomposition_of_a_few_distinct_forecasts():
    probability = np.repeat([0.1, 0.4, 0.8], [10, 20, 30])
    label = np.concatenate([np.arange(10) < 2, np.arange(20) < 10, np.arange(30) < 27])
    brier = brier_score(probability, label, bins=10)
    rate = np.array([0.2, 0.5, 0.9])  # of each forecast; nothing varies inside a bin (Murphy 1973)
    share = np.array([10, 20, 30]) / 60
    assert brier.reliability == pytest.approx(share @ (np.array([0.1, 0.4, 0.8]) - rate) ** 2)
    assert brier.resolution == pytest.approx(share @ (rate - label.mean()) ** 2)


def test_expected_calibration_error_by_hand():
    probability, label = np.array([0.1, 0.2, 0.7, 0.9, 0.9]), np.array([0, 1, 1, 1, 0])
    result = reliability_diagram(probability, label, bins=2)
    np.testing.assert_array_equal(result.count, [2, 3])
    assert result.ece == pytest.approx(0.4 * abs(0.5 - 0.15) + 0.6 * abs(2 / 3 - 2.5 / 3))
    whole = reliability_diagram(probability, label, bins=1, spacing="mass")
    assert whole.ece == pytest.approx(abs(0.6 - 2.8 / 5))


def test_bins_of_equal_mass_are_of_equal_mass():
    probability = np.random.default_rng(0).beta(0.5, 20, size=3000)  # findings are rare: most of it is near 0
    result = reliability_diagram(probability, probability > 0.1, bins=15, spacing="mass")
    np.testing.assert_array_equal(result.count, 200)
    assert reliability_diagram(probability, probability > 0.1, bins=15).count[0] > 2000


def simulated(n=20_000, sharpness=(1.0, 2.5), seed=0):
    """Findings with calibrated logits, scaled by a sharpness."""
    rng = np.random.default_rng(seed)
    truth = logit(rng.beta(0.8, 2, size=(n, len(sharpness))))
    label = rng.random(truth.shape) < expit(truth)
    label_mask = rng.random(truth.shape) < 0.9
    ids = np.arange(n)
    return Predictions(ids, ids, tuple("ABCD"[: len(sharpness)]), truth * sharpness, label, label_mask)


def test_overconfidence_is_measured():
    rows = calibration_report(simulated())
    assert [row["finding"] for row in rows] == ["A", "B", "mean"]
    for name in ("ece_width", "ece_mass"):
        assert rows[0][name] < 0.015
        assert rows[1][name] > 0.08
        assert rows[2][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)
    assert rows[0]["brier_reliability"] < 0.001 < 0.01 < rows[1]["brier_reliability"]


def test_unknown_labels_do_not_count():
    table = simulated(300)
    label_mask = table.label_mask[:, 0]
    masked = reliability_diagram(table.probability[:, 0], table.label[:, 0], label_mask)
    cut = reliability_diagram(table.probability[label_mask, 0], table.label[label_mask, 0])
    np.testing.assert_array_equal(masked.observed, cut.observed)
    assert brier_score(table.probability[:, 0], table.label[:, 0], label_mask) == brier_score(
        table.probability[label_mask, 0], table.label[label_mask, 0]
    )


def test_no_known_labels_give_nan():
    table = simulated(20)
    nothing = Predictions(
        table.id, table.patient, table.findings, table.logit, table.label, table.label_mask & [True, False]
    )
    rows = calibration_report(nothing)
    assert np.isnan([rows[1]["ece_width"], rows[1]["ece_mass"], rows[1]["brier"], rows[1]["brier_resolution"]]).all()
    assert rows[1]["reason"] == "no known label"
    assert rows[2]["ece_width"] == rows[0]["ece_width"]
    assert rows[2]["reason"] == "left out: B (no known label)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 0}, "above 0"),
        ({"spacing": "size"}, "choose from mass, width"),
        ({"probability": 1.5}, "1.5 is not a"),
    ],
)
def test_bad_arguments(arguments, message):
    probability = np.array([0.5, arguments.pop("probability", 0.5)])
    with pytest.raises(CxrError, match=message):
        reliability_diagram(probability, np.array([0, 1]), **arguments)
