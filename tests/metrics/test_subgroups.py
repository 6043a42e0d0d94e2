"""Scores by sex, age and view: groups, paired draws and gaps."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxrjax.data.records import Record, Records
from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.subgroups import UNKNOWN, age_bands, score_subgroups, subgroup_attributes

FINDINGS = ("Mass", "Nodule")


def predictions(images=400, strength=(1.5, 1.5), seed=0):
    """Two findings that the model detects better in one group than in the other."""
    rng = np.random.default_rng(seed)
    patient = np.arange(images) // 2
    group = np.where(patient % 2, "a", "b")
    label = rng.random((images, 2)) < 0.4
    logit = rng.normal(size=(images, 2)) + label * np.where(group == "a", *strength)[:, None]
    label_mask = rng.random((images, 2)) < 0.9
    return Predictions([f"i{n:04}" for n in range(images)], patient, FINDINGS, logit, label, label_mask), group


def find(rows, **values):
    [row] = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return row


def test_each_group_is_scored_on_its_own_images():
    table, group = predictions()
    result = score_subgroups(table, {"kind": group}, resamples=0)
    assert [(row["group"], row["finding"]) for row in result.groups] == [
        (g, f) for g in "ab" for f in (*FINDINGS, "mean")
    ]
    for name in "ab":
        exact = []
        for k, finding in enumerate(FINDINGS):
            rows = (group == name) & table.label_mask[:, k]
            row = find(result.groups, group=name, finding=finding)
            exact.append(roc_auc_score(table.label[rows, k], table.logit[rows, k]))
            assert row["auroc"] == pytest.approx(exact[-1], abs=1e-12)
            assert (row["positives"], row["negatives"]) == (
                table.label[rows, k].sum(), (table.label[rows, k] == 0).sum(),
            )  # fmt: skip
            assert (row["images"], row["patients"], row["findings"]) == (200, 100, 1)
            assert math.isnan(row["low"])
        mean = find(result.groups, group=name, finding="mean")
        assert mean["auroc"] == pytest.approx(np.mean(exact))
        assert mean["findings"] == 2


def test_gaps_are_between_the_best_and_the_worst_on_the_same_draws():
    table, group = predictions(strength=(2.5, 0.8))
    result = score_subgroups(table, {"kind": group}, resamples=60, seed=2)
    names, owner = np.unique(table.patient, return_inverse=True)
    draws = []
    for r in range(60):
        weight = np.bincount(np.random.default_rng([2, r]).integers(len(names), size=len(names)), minlength=len(names))
        one = {}
        for name in "ab":
            for k in range(2):
                rows = (group == name) & table.label_mask[:, k]
                one[name, k] = roc_auc_score(
                    table.label[rows, k], table.logit[rows, k], sample_weight=weight[owner][rows]
                )
        draws.append([one["a", 0], one["b", 0], one["a", 0] - one["b", 0], one["a", 1] - one["b", 1]])
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    for k, name in enumerate("ab"):
        row = find(result.groups, group=name, finding="Mass")
        assert (row["low"], row["high"]) == pytest.approx((low[k], high[k]), abs=1e-12)
    gap = find(result.gaps, finding="Mass")
    assert (gap["best"], gap["worst"]) == ("a", "b")
    values = [find(result.groups, group=name, finding="Mass")["auroc"] for name in "ab"]
    assert gap["gap"] == pytest.approx(values[0] - values[1])
    assert (gap["low"], gap["high"]) == pytest.approx((low[2], high[2]), abs=1e-12)
    assert gap["low"] > 0
    mean = find(result.gaps, finding="mean")
    middle = np.quantile(np.mean(np.array(draws)[:, 2:], axis=1), [0.025, 0.975])
    assert (mean["low"], mean["high"]) == pytest.approx(tuple(middle), abs=1e-12)


def test_small_and_unknown_groups_enter_no_gap():
    table, group = predictions()
    group = group.astype("U8")
    group[:6], group[6:160] = "tiny", UNKNOWN
    result = score_subgroups(table, {"kind": group}, resamples=0, min_images=50)
    assert {row["group"] for row in result.groups} == {"a", "b", "tiny", UNKNOWN}
    for gap in result.gaps:
        assert {gap["best"], gap["worst"]} == {"a", "b"}
    few = score_subgroups(table, {"kind": group}, resamples=0, min_images=10_000).gaps
    assert [row["reason"] for row in few] == ["fewer than two groups that define it"] * 3
    assert all(math.isnan(row["gap"]) for row in few)


def test_a_finding_undefined_in_a_group_is_not_in_the_gap_of_the_mean():
    table, group = predictions()
    label = np.where((group == "b")[:, None] & [True, False], 0, table.label)
    table = Predictions(table.id, table.patient, FINDINGS, table.logit, label, table.label_mask)
    result = score_subgroups(table, {"kind": group}, resamples=20)
    row = find(result.groups, group="b", finding="Mass")
    assert (row["reason"], row["findings"], math.isnan(row["auroc"])) == ("no positive example", 0, True)
    mean = find(result.groups, group="b", finding="mean")
    assert (mean["reason"], mean["findings"]) == ("left out: Mass", 1)
    assert find(result.gaps, finding="Mass")["reason"]
    nodule, mean = find(result.gaps, finding="Nodule"), find(result.gaps, finding="mean")
    assert (mean["gap"], mean["low"], mean["best"]) == (nodule["gap"], nodule["low"], nodule["best"])


def test_equal_groups_have_gaps_around_zero():
    table, group = predictions(2000)
    gap = find(score_subgroups(table, {"kind": group}, resamples=200).gaps, finding="mean")
    assert gap["low"] < 0 < gap["high"]


def record(image, age, sex, view):
    return Record(image, "p", "s", view, age, sex, "nih", (1, 0))


def test_attributes_come_from_the_records_in_the_order_of_the_predictions():
    images = [record("x", 17.0, "M", "PA"), record("y", math.nan, "", "AP"), record("z", 80.0, "F", "")]
    records = Records.from_records(images, FINDINGS, dataset="nih")
    zeros = np.zeros((2, 2))
    table = Predictions(["z", "y"], ["p", "p"], FINDINGS, zeros, zeros, zeros > 1)
    result = subgroup_attributes(records, table)
    assert {name: list(values) for name, values in result.items()} == {
        "sex": ["F", UNKNOWN], "age": ["80+", UNKNOWN], "view": [UNKNOWN, "AP"],
    }  # fmt: skip
    with pytest.raises(CxrError, match=r"1 predicted images \(q, ...\) are not records of nih"):
        subgroup_attributes(records, Predictions(["q"], ["p"], FINDINGS, zeros[:1], zeros[:1], zeros[:1] > 1))


def test_age_bands():
    bands = age_bands(np.array([0, 17.9, 18, 39, 40, 79.5, 80, 120, 411, -1, np.nan]))
    assert list(bands) == [
        "0-17", "0-17", "18-39", "18-39", "40-59", "60-79", "80+", "80+", UNKNOWN, UNKNOWN, UNKNOWN,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"resamples": -1}, "resamples=-1"), ({"min_images": 0}, "min_images=0"), ({"confidence": 95}, "between 0 and 1")],
)
def test_bad_arguments(arguments, message):
    table, group = predictions(20)
    with pytest.raises(CxrError, match=message):
        score_subgroups(table, {"kind": group}, **arguments)
    with pytest.raises(CxrError, match="attribute kind has shape"):
        score_subgroups(table, {"kind": group[1:]})


def test_tables_are_plain_rows():
    table, group = predictions(200)
    result = score_subgroups(table, {"kind": group}, resamples=20)
    assert json.loads(json.dumps([*result.groups, *result.gaps]))[0]["group"] == "a"
