import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxrjax.errors import CxrError
from cxrjax.metrics.comparison import compare_findings, delong, difference
from cxrjax.metrics.predictions import Predictions


def table(seed, strength, n=60):
    rng = np.random.default_rng(7)
    label = rng.integers(0, 2, (n, 2)).astype(float)
    patient = np.array([f"p{i // 2}" for i in range(n)])
    noise = np.random.default_rng(seed).standard_normal((n, 2))
    ids = np.array([f"i{i:03}" for i in range(n)])
    return Predictions(ids, patient, ("A", "B"), strength * label + noise, label, np.ones((n, 2), bool))


def test_the_interval_matches_a_paired_loop_over_sklearn():
    first, second = table(0, 1.5), table(1, 0.5)
    result = difference([first], [second], ["A", "B"], resamples=200, seed=3)
    names, owner = np.unique(first.patient, return_inverse=True)
    gains = []
    for number in range(200):
        drawn = np.random.default_rng([3, number]).integers(len(names), size=len(names))
        weight = np.bincount(drawn, minlength=len(names))[owner]
        mean = [
            np.mean([roc_auc_score(t.label[:, k], t.logit[:, k], sample_weight=weight) for k in range(2)])
            for t in (first, second)
        ]
        gains.append(mean[0] - mean[1])
    np.testing.assert_allclose((result.low, result.high), np.quantile(gains, [0.025, 0.975]), atol=1e-9)
    exact = [np.mean([roc_auc_score(t.label[:, k], t.logit[:, k]) for k in range(2)]) for t in (first, second)]
    assert result.value == pytest.approx(exact[0] - exact[1])
    assert result.low > 0


def test_a_model_does_not_differ_from_itself():
    result = difference([table(0, 1)], [table(0, 1)], ["B"], resamples=20)
    assert (result.value, result.low, result.high) == (0, 0, 0)


def test_a_finding_of_one_class_is_left_out_and_named():
    first, second = (dataclasses.replace(t, label=t.label * [1, 0]) for t in (table(0, 1.5), table(1, 0.5)))
    result = difference([first], [second], ["A", "B"], resamples=50)
    assert result == dataclasses.replace(difference([first], [second], ["A"], resamples=50), left_out=("B",))
    assert "without B" in str(result)
    nothing = difference([first], [second], ["B"], resamples=50)
    assert np.isnan(nothing.value)


def test_different_images_are_refused():
    with pytest.raises(CxrError, match="same images"):
        difference([table(0, 1)], [table(0, 1, n=58)], ["A"], resamples=20)


def test_finding_tests_are_clustered_by_patient_and_adjusted():
    first, second = table(0, 1.5), table(1, 0.5)
    rows = compare_findings(first, second)
    assert [row["finding"] for row in rows] == ["A", "B"]
    for k, row in enumerate(rows):
        exact = [roc_auc_score(t.label[:, k], t.logit[:, k]) for t in (first, second)]
        assert (row["first"], row["second"]) == pytest.approx(tuple(exact))
        assert row["difference"] == pytest.approx(exact[0] - exact[1])
        gap = delong(np.stack([first.logit[:, k], second.logit[:, k]]), first.label[:, k], patient=first.patient)
        assert row["p"] == gap.contrast(np.array([1, -1])).p
        assert row["low"] < row["difference"] < row["high"]
    p = sorted(row["p"] for row in rows)
    assert sorted(row["p_holm"] for row in rows) == pytest.approx([2 * p[0], max(2 * p[0], p[1])])


def test_tests_agree_with_the_paired_bootstrap():
    first, second = table(0, 1.2, n=2000), table(1, 0.9, n=2000)
    for row in compare_findings(first, second):
        drawn = difference([first], [second], [row["finding"]], resamples=1000)
        assert (row["low"], row["high"]) == pytest.approx((drawn.low, drawn.high), abs=0.004)


def test_rows_of_the_second_table_may_be_in_another_order():
    first, second = table(0, 1.5), table(1, 0.5)
    assert compare_findings(first, second.take(np.arange(60)[::-1])) == compare_findings(first, second)
    with pytest.raises(CxrError, match="differ in 2 images"):
        compare_findings(first, table(0, 1, n=58))


def test_an_untestable_finding_is_nan_and_not_counted():
    first, second = (dataclasses.replace(t, label=t.label * [1, 0]) for t in (table(0, 1.5), table(1, 0.5)))
    rows = compare_findings(first, second)
    assert rows[1]["reason"] == "no positive example"
    assert np.isnan([rows[1][name] for name in ("first", "difference", "low", "z", "p", "p_holm")]).all()
    assert rows[0]["p_holm"] == rows[0]["p"]
