"""Folds and seeds of one model: mean AUROCs and per-fold draws of patients, against loops over scikit-learn."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from cxrjax.errors import CxrError
from cxrjax.metrics.bootstrap import BootstrapResult
from cxrjax.metrics.comparison import compare_findings, delong, difference
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import score, scores_from_bootstrap


def table(fold=0, strength=1.0, noise=0, n=60):
    """Two findings of n images and n / 2 patients; folds have different patients."""
    rng = np.random.default_rng(fold)
    label = rng.integers(0, 2, (n, 2)).astype(float)
    name = "abcdefg"[fold]
    patient = np.array([f"{name}{i // 2}" for i in range(n)])
    logit = strength * label + np.random.default_rng([fold, noise]).standard_normal((n, 2)) + 10 * fold
    return Predictions(np.array([f"{name}{i}" for i in range(n)]), patient, ("A", "B"), logit, label, label >= 0)


def auc(table, k, weight=None):
    return roc_auc_score(table.label[:, k], table.logit[:, k], sample_weight=weight)


def weights(table, seed, number):
    names, owner = np.unique(table.patient, return_inverse=True)
    drawn = np.random.default_rng([seed, number]).integers(len(names), size=len(names))
    return np.bincount(drawn, minlength=len(names))[owner]


FOLDS = [table(0, n=60), table(1, n=80), table(2, n=50)]


def test_fold_scores_are_means_and_draws_are_per_fold():
    result = scores_from_bootstrap(BootstrapResult.from_tables(FOLDS, resamples=100, seed=4), confidence=0.9)
    for k in range(2):
        assert result.findings[k].auroc == pytest.approx(np.mean([auc(fold, k) for fold in FOLDS]))
        precision = [average_precision_score(fold.label[:, k], fold.logit[:, k]) for fold in FOLDS]
        assert result.findings[k].average_precision == pytest.approx(np.mean(precision))
    draws = np.array([
        [[auc(fold, k, weights(fold, 4 + f, number)) for k in range(2)] for f, fold in enumerate(FOLDS)]
        for number in range(100)
    ])  # fmt: skip
    for k, row in enumerate(result.findings):
        expected = np.quantile(draws[:, :, k].mean(1), [0.05, 0.95])
        np.testing.assert_allclose((row.auroc_interval.low, row.auroc_interval.high), expected, atol=1e-12)
    expected = np.quantile(draws.mean((1, 2)), [0.05, 0.95])
    np.testing.assert_allclose((result.mean.auroc_interval.low, result.mean.auroc_interval.high), expected, atol=1e-12)
    assert (result.images, result.patients) == (190, 95)
    assert result.findings[0].positives == sum(int(fold.label[:, 0].sum()) for fold in FOLDS)


def test_scores_of_different_tables_are_never_ranked_together():
    apart = [dataclasses.replace(fold, logit=fold.logit * 3 - 50 * f) for f, fold in enumerate(FOLDS)]
    assert scores_from_bootstrap(BootstrapResult.from_tables(apart, resamples=20)) == scores_from_bootstrap(
        BootstrapResult.from_tables(FOLDS, resamples=20)
    )


def test_seeds_share_patients_and_draws():
    seeds = [table(noise=1), table(noise=2)]
    sample = BootstrapResult.from_tables(seeds, resamples=20)
    assert sample.stratum.tolist() == [0, 0]
    single = [BootstrapResult.from_tables([table], resamples=20) for table in seeds]
    np.testing.assert_array_equal(sample.draws, np.concatenate([result.draws for result in single], axis=1))
    result = scores_from_bootstrap(sample)
    assert (result.images, result.patients) == (60, 30), "every image once"
    assert result.findings[0].positives == int(seeds[0].label[:, 0].sum())
    assert scores_from_bootstrap(BootstrapResult.from_tables([table(), table()])) == score(table())


def test_a_finding_undefined_in_some_folds_averages_the_others():
    lacking = dataclasses.replace(FOLDS[1], label=FOLDS[1].label * [1, 0])
    result = scores_from_bootstrap(BootstrapResult.from_tables([FOLDS[0], lacking, FOLDS[2]], resamples=20))
    assert result.findings[1].auroc == pytest.approx(np.mean([auc(FOLDS[0], 1), auc(FOLDS[2], 1)]))
    assert result.findings[1].reason == "no positive example in 1 of 3 test sets"
    assert (result.mean.findings, result.mean.reason) == (2, "")
    nothing = scores_from_bootstrap(BootstrapResult.from_tables([lacking], resamples=20))
    assert nothing.mean.reason == "left out: B (no positive example)"
    gain = difference([FOLDS[0], lacking], [FOLDS[0], lacking], ["A", "B"], resamples=20)
    assert gain.left_out == ("B",)


def test_fold_differences_are_means_of_pairs():
    first, second = [[table(f, strength) for f in range(3)] for strength in (1.5, 0.5)]
    result = difference(first, second, ["A", "B"], resamples=50, seed=3)
    differences = [np.mean([auc(a, k) - auc(b, k) for k in range(2)]) for a, b in zip(first, second, strict=True)]
    assert result.per_table == pytest.approx(tuple(differences))
    assert result.value == pytest.approx(np.mean(differences))
    gains = [
        np.mean([
            auc(a, k, weights(a, 3 + f, number)) - auc(b, k, weights(b, 3 + f, number))
            for f, (a, b) in enumerate(zip(first, second, strict=True)) for k in range(2)
        ])
        for number in range(50)
    ]  # fmt: skip
    np.testing.assert_allclose((result.low, result.high), np.quantile(gains, [0.025, 0.975]), atol=1e-12)


def test_finding_tests_treat_folds_as_independent_and_seeds_as_paired():
    first, second = [[table(f, strength) for f in range(3)] for strength in (1.5, 0.5)]
    for k, row in enumerate(compare_findings(first, second)):
        gaps = [
            delong(np.stack([a.logit[:, k], b.logit[:, k]]), a.label[:, k], patient=a.patient).contrast(
                np.array([1, -1])
            )
            for a, b in zip(first, second, strict=True)
        ]
        assert row["difference"] == pytest.approx(np.mean([gap.value for gap in gaps]))
        assert row["difference"] / row["z"] == pytest.approx(np.sqrt(sum(gap.error**2 for gap in gaps)) / 3)
        assert row["first"] == pytest.approx(np.mean([auc(fold, k) for fold in first]))
    once, twice = compare_findings(first[0], second[0]), compare_findings(first[:1] * 2, second[:1] * 2)
    for one, two in zip(once, twice, strict=True):  # a seed that repeats another adds nothing
        assert {key: value for key, value in two.items() if key != "finding"} == pytest.approx(
            {key: value for key, value in one.items() if key != "finding"}
        )


def test_finding_tests_match_the_bootstrap_over_folds():
    first, second = [[table(f, strength, n=1200) for f in range(3)] for strength in (1.2, 0.9)]
    for row in compare_findings(first, second):
        drawn = difference(first, second, [row["finding"]], resamples=1000)
        assert (row["low"], row["high"]) == pytest.approx((drawn.low, drawn.high), abs=0.003)


def test_incompatible_tables_are_refused():
    with pytest.raises(CxrError, match=r"share 29 patients \(the first is a0\)"):
        BootstrapResult.from_tables([table(n=60), table(n=58)])
    with pytest.raises(CxrError, match="share 30 patients"):
        BootstrapResult.from_tables([table(), table().take(np.arange(60)[::-1])])
    with pytest.raises(CxrError, match="same findings"):
        BootstrapResult.from_tables([table(0), table(1).select(["B", "A"])])
    with pytest.raises(CxrError, match="no predictions"):
        BootstrapResult.from_tables([])
    with pytest.raises(CxrError, match="same images"):
        difference([table(0)], [table(0), table(1)], ["A"], resamples=5)
    with pytest.raises(CxrError, match="1 and 2 prediction tables"):
        compare_findings([table(0)], [table(0), table(1)])
