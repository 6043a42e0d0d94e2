"""The patient bootstrap against a plain loop over scikit-learn, and against DeLong's closed form."""

import time

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics

from cxrjax.errors import CxrError
from cxrjax.metrics import bootstrap as module
from cxrjax.metrics.auc import Ranking, auroc
from cxrjax.metrics.bootstrap import bootstrap_mean, bootstrap_scores, percentile_interval


def simulated(images, patients, findings, seed=0, prevalence=0.3):
    rng = np.random.default_rng(seed)
    patient = rng.integers(patients, size=images).astype(str)
    label = rng.random((images, findings)) < prevalence
    score = (rng.normal(size=(images, findings)) + label).round(1)  # with ties
    label_mask = rng.random((images, findings)) < 0.9
    return patient, score, label, label_mask


def rankings_of(score, label, label_mask=None):
    label_mask = np.ones(label.shape, bool) if label_mask is None else label_mask
    return [Ranking.from_scores(score[:, k], label[:, k], label_mask[:, k]) for k in range(label.shape[1])]


def test_matches_a_loop_over_sklearn():
    patient, score, label, label_mask = simulated(80, 30, 3)
    auc, precision = bootstrap_scores(rankings_of(score, label, label_mask), patient, resamples=70, seed=5)
    names = np.unique(patient)
    for r in range(70):
        drawn = names[np.random.default_rng([5, r]).integers(len(names), size=len(names))]
        rows = np.concatenate(
            [np.flatnonzero(patient == name) for name in drawn]
        )  # a patient's images, again and again
        for k in range(3):
            use = rows[label_mask[rows, k]]
            assert auc[r, k] == pytest.approx(metrics.roc_auc_score(label[use, k], score[use, k]), abs=1e-12)
            assert precision[r, k] == pytest.approx(
                metrics.average_precision_score(label[use, k], score[use, k]), abs=1e-12
            )


def test_draws_depend_only_on_the_seed(monkeypatch):
    patient, score, label, label_mask = simulated(60, 25, 2)
    rankings = rankings_of(score, label, label_mask)
    first = bootstrap_scores(rankings, patient, resamples=30, seed=1)
    monkeypatch.setattr(module, "_CHUNK", 7)
    again = bootstrap_scores(rankings, patient, resamples=40, seed=1)
    np.testing.assert_array_equal(first[0], again[0][:30])
    np.testing.assert_array_equal(first[1], again[1][:30])
    assert not np.array_equal(first[0], bootstrap_scores(rankings, patient, resamples=30, seed=2)[0])


def test_one_image_per_patient_is_the_bootstrap_of_images():
    _, score, label, _ = simulated(50, 1, 1)
    patient = np.array([f"p{i:02}" for i in range(50)])
    auc, _ = bootstrap_scores(rankings_of(score, label), patient, resamples=20, seed=3)
    for r in range(20):
        rows = np.random.default_rng([3, r]).integers(50, size=50)
        assert auc[r, 0] == pytest.approx(metrics.roc_auc_score(label[rows, 0], score[rows, 0]), abs=1e-12)


def test_copied_images_do_not_change_patient_intervals():
    _, score, label, _ = simulated(60, 1, 1)
    patient = np.arange(60).astype(str)
    once = bootstrap_scores(rankings_of(score, label), patient, resamples=50, seed=0)[0]
    twice = bootstrap_scores(
        rankings_of(np.repeat(score, 3, 0), np.repeat(label, 3, 0)), np.repeat(patient, 3), resamples=50, seed=0
    )[0]
    np.testing.assert_allclose(once, twice, rtol=0, atol=1e-12)


def test_undefined_draws_are_counted_and_left_out():
    label = np.zeros((12, 1), bool)
    label[0] = True  # a draw misses the only positive patient with probability (11/12)^12 = .35
    score = np.arange(12.0)[:, None]
    auc, _ = bootstrap_scores(rankings_of(score, label), np.arange(12).astype(str), resamples=400, seed=0)
    missed = int(np.isnan(auc).sum())
    assert 400 * 0.35 - 40 < missed < 400 * 0.35 + 40
    spread = percentile_interval(auc[:, 0])
    assert spread.undefined == missed
    assert spread.low == np.nanquantile(auc, 0.025)
    assert spread.high == np.nanquantile(auc, 0.975)


def test_no_interval_from_a_minority_of_draws():
    values = np.array([0.5, 0.6, np.nan, np.nan, np.nan])
    assert np.isnan(percentile_interval(values).low)
    assert percentile_interval(values).undefined == 3
    assert not np.isnan(percentile_interval(values[:4]).low)


def test_agrees_with_delong_where_images_are_independent():
    rng = np.random.default_rng(1)
    label = rng.random(3000) < 0.2
    score = rng.normal(size=3000) + 1.2 * label
    higher = score[label][:, None] > score[~label][None, :]
    variance = higher.mean(1).var(ddof=1) / label.sum() + higher.mean(0).var(ddof=1) / (~label).sum()  # DeLong 1988
    half = norm.ppf(0.975) * variance**0.5
    auc, _ = bootstrap_scores(
        rankings_of(score[:, None], label[:, None]), np.arange(3000).astype(str), resamples=1000, seed=0
    )
    spread = percentile_interval(auc[:, 0])
    assert spread.low == pytest.approx(auroc(score, label) - half, abs=0.1 * half)
    assert spread.high == pytest.approx(auroc(score, label) + half, abs=0.1 * half)


def test_correlated_images_widen_the_interval():
    rng = np.random.default_rng(2)
    label = np.repeat(rng.random(200) < 0.4, 5)
    score = np.repeat(rng.normal(size=200), 5) + label  # the five images of a patient say the same
    rankings = rankings_of(score[:, None], label[:, None])
    by_patient = percentile_interval(bootstrap_scores(rankings, np.repeat(np.arange(200), 5), resamples=400)[0][:, 0])
    by_image = percentile_interval(bootstrap_scores(rankings, np.arange(1000), resamples=400)[0][:, 0])
    assert (by_patient.high - by_patient.low) / (by_image.high - by_image.low) == pytest.approx(5**0.5, rel=0.15)


def test_the_official_test_set_is_bootstrapped_in_seconds():
    patient, score, label, _ = simulated(25_596, 2_797, 14, prevalence=0.05)
    start = time.process_time()  # of all threads, so that a busy machine does not matter
    bootstrap_scores(rankings_of(score, label), patient, resamples=100)
    assert time.process_time() - start < 60 / 1000 * 100  # a minute for 1,000 draws on one core


@pytest.mark.parametrize("arguments", [{"resamples": 0}, {"resamples": -1}, {"seed": -1}])
def test_bad_arguments(arguments):
    with pytest.raises(CxrError, match="at least 1 resample"):
        bootstrap_scores([], np.array(["a"]), **arguments)


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_bad_confidence(confidence):
    with pytest.raises(CxrError, match="between 0 and 1"):
        percentile_interval(np.zeros(3), confidence)


def test_bootstrap_mean_matches_a_loop():
    patient, score, _, label_mask = simulated(50, 20, 2)
    mean, spread = bootstrap_mean(score, label_mask, patient, resamples=90, seed=4)
    assert mean == pytest.approx(score[label_mask].mean(), abs=1e-12)
    names, draws = np.unique(patient), []
    for r in range(90):
        drawn = names[np.random.default_rng([4, r]).integers(len(names), size=len(names))]
        rows = np.concatenate([np.flatnonzero(patient == name) for name in drawn])
        draws.append(score[rows][label_mask[rows]].mean())
    np.testing.assert_allclose((spread.low, spread.high), np.quantile(draws, [0.025, 0.975]), atol=1e-12)
    with pytest.raises(CxrError, match="the mean has no values"):
        bootstrap_mean(score, np.zeros_like(label_mask), patient)
