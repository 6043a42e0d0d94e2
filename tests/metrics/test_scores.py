"""Scores of a table: values, intervals of the mean, undefined findings."""

import json

import numpy as np
import pytest
from sklearn import metrics

from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN, score

FINDINGS = ("Mass", "Nodule", "Hernia")


def predictions(images=120):
    """Two findings with both classes, and Hernia without positives."""
    rng = np.random.default_rng(0)
    label = rng.random((images, 3)) < [0.3, 0.5, 0]
    return Predictions(
        id=np.arange(images), patient=np.arange(images) // 3, findings=FINDINGS,
        logit=rng.normal(size=(images, 3)) + label, label=label, label_mask=rng.random((images, 3)) < 0.8,
    )  # fmt: skip


def test_scores_match_sklearn_on_known_labels():
    table = predictions()
    scores = score(table, resamples=0)
    for k, row in enumerate(scores.findings[:2]):
        label_mask = table.label_mask[:, k]
        label, logit = table.label[label_mask, k], table.logit[label_mask, k]
        assert row.finding == FINDINGS[k]
        assert row.auroc == pytest.approx(metrics.roc_auc_score(label, logit), abs=1e-12)
        assert row.average_precision == pytest.approx(metrics.average_precision_score(label, logit), abs=1e-12)
        assert (row.positives, row.negatives) == (label.sum(), (label == 0).sum())
    assert scores.mean.auroc == pytest.approx(np.mean([row.auroc for row in scores.findings[:2]]))
    assert (scores.images, scores.patients) == (120, 40)


def test_undefined_findings_are_nan_and_not_in_the_mean():
    scores = score(predictions(), resamples=20)
    hernia = scores.findings[2]
    assert np.isnan(hernia.auroc)
    assert np.isnan(hernia.average_precision)
    assert hernia.auroc_interval is None
    assert (hernia.reason, hernia.findings) == ("no positive example", 0)
    assert (scores.mean.findings, scores.mean.reason) == (2, "left out: Hernia (no positive example)")
    nothing = score(predictions().select(["Hernia"]), resamples=20)
    assert np.isnan(nothing.mean.auroc)
    assert nothing.mean.findings == 0


def test_rows_and_json():
    rows = score(predictions(), resamples=20, seed=4).rows()
    assert [row["finding"] for row in rows] == [*FINDINGS, MEAN]
    assert {tuple(row) for row in rows} == {
        (
            "finding", "auroc", "auroc_low", "auroc_high", "average_precision", "average_precision_low",
            "average_precision_high", "positives", "negatives", "findings", "undefined_resamples", "reason",
        )
    }  # fmt: skip
    for row in (rows[0], rows[1], rows[3]):
        assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
        assert row["average_precision_low"] < row["average_precision_high"]
    assert rows[3]["positives"] is None
    assert np.isnan(rows[2]["auroc_high"])
    value = json.loads(json.dumps(score(predictions(), resamples=20, seed=4).as_dict(), allow_nan=False))
    assert value["scores"][2]["auroc"] is None
    assert value["scores"][0]["auroc_high"] == rows[0]["auroc_high"]
    assert (value["images"], value["patients"], value["resamples"], value["seed"]) == (120, 40, 20, 4)
    without = score(predictions(), resamples=0).as_dict()
    assert without["scores"][0]["auroc_low"] is None


def test_the_interval_of_the_mean_comes_from_means_of_draws():
    table = predictions(90)
    one = table.select(["Mass"])
    same = Predictions(
        one.id, one.patient, ("A", "B"), *(np.repeat(x, 2, axis=1) for x in (one.logit, one.label, one.label_mask))
    )
    scores = score(same, resamples=200)
    assert scores.mean.auroc_interval == scores.findings[0].auroc_interval  # two findings that are one: nothing to gain
    other = score(table, resamples=200)
    width = [row.auroc_interval.high - row.auroc_interval.low for row in (*other.findings[:2], other.mean)]
    assert width[2] < max(width[:2])  # unrelated findings average out


def test_draws_are_paired_between_models_and_follow_the_seed():
    table = predictions()
    assert score(table, resamples=30, seed=1).as_dict() == score(table, resamples=30, seed=1).as_dict()
    assert score(table, resamples=30, seed=1).mean != score(table, resamples=30, seed=2).mean


@pytest.mark.parametrize(
    "arguments",
    [{"resamples": -5}, {"seed": -1, "resamples": 5}, {"confidence": 95}, {"resamples": 0, "confidence": 2}],
)
@pytest.mark.parametrize("finding", ["Mass", "Hernia"])
def test_bad_arguments(arguments, finding):
    with pytest.raises(CxrError):
        score(predictions(9).select([finding]), **arguments)
