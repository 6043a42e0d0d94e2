"""Percentile bootstrap over patients.

Images of one patient are correlated, so patients are drawn with replacement, and each image counts as often as its
patient was drawn (Efron & Tibshirani 1993, chapter 13). All findings are evaluated on the same draws, so the interval
of their mean accounts for their correlation. Draw r depends only on the patients, the seed and r.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Shaped

from cxrjax.errors import CxrError
from cxrjax.metrics.auc import Ranking
from cxrjax.metrics.predictions import Predictions

_CHUNK = 64  # draws evaluated together: balances loop overhead against cache misses
_CHUNK_WEIGHTS = 1 << 22  # but at most this many weights (16 MB)
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
      low, high: the bounds; NaN where fewer than half of the draws define the value.
      undefined: the number of draws that leave the value undefined (one class only) and were skipped.
    """

    low: float
    high: float
    undefined: int = 0


def percentile_interval(values: Float64[np.ndarray, " R"], confidence: float = 0.95) -> Interval:
    """Return the percentile interval of R bootstrap values; NaN marks undefined draws.

    Raises:
      CxrError: the confidence is not between 0 and 1.
    """
    check_confidence(confidence)
    defined = values[~np.isnan(values)]
    undefined = len(values) - len(defined)
    if len(defined) == 0 or undefined > len(defined):
        return Interval(float("nan"), float("nan"), undefined)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), undefined)


def check_confidence(confidence: float) -> None:
    """Raise a `CxrError` unless a confidence level is a fraction between 0 and 1."""
    if not 0 < confidence < 1:
        raise CxrError(f"confidence={confidence}: give a fraction between 0 and 1, such as 0.95")


def bootstrap_scores(
    rankings: Sequence[Ranking], patient: Shaped[np.ndarray, " N"], *, resamples: int = 1000, seed: int = 0
) -> tuple[Float64[np.ndarray, "R K"], Float64[np.ndarray, "R K"]]:
    """Return the AUROC and average precision of K findings on R draws of patients.

    Args:
      rankings: one per finding, over the same N images.
      patient: the patient of each image; an image without a patient number needs a unique name.
      resamples: the number of draws, R.
      seed: >= 0.

    Returns:
      AUROC and average precision of each draw and finding; NaN where the drawn labels have one class only.

    Raises:
      CxrError: fewer than one draw, or a negative seed.
    """
    _check_draws(resamples, seed)
    names, owner = np.unique(patient, return_inverse=True)
    size = max(1, min(_CHUNK, _CHUNK_WEIGHTS // max(1, len(owner))))

    def measure(start: int) -> tuple[list, list]:
        weight = _draw_counts(len(names), seed, range(start, min(start + size, resamples)))[owner]
        return tuple(zip(*(ranking.measure(weight) for ranking in rankings), strict=True))  # pyright: ignore

    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = list(pool.map(measure, range(0, resamples, size)))
    auroc, average_precision = (np.concatenate([np.stack(chunk[i], axis=1) for chunk in chunks]) for i in (0, 1))
    return auroc, average_precision


def bootstrap_mean(
    values: Float64[np.ndarray, "N K"],
    mask: Bool[np.ndarray, "N K"],
    patient: Shaped[np.ndarray, " N"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, Interval]:
    """Return the mean of the values under a mask, and its interval over the draws that `bootstrap_scores` uses.

    Raises:
      CxrError: the mask is false everywhere, or a setting is out of range.
    """
    _check_draws(resamples, seed)
    if not mask.any():
        raise CxrError("the mean has no values: the mask is false everywhere")
    names, owner = np.unique(patient, return_inverse=True)
    per_image = np.where(mask, values, 0).sum(1), mask.sum(1)
    total, count = (np.bincount(owner, weights=column, minlength=len(names)) for column in per_image)
    means = []
    for start in range(0, resamples, _CHUNK):
        weight = _draw_counts(len(names), seed, range(start, min(start + _CHUNK, resamples)))
        with np.errstate(invalid="ignore"):  # 0/0 in a draw without any counted value
            means.append((total @ weight) / (count @ weight))
    return float(total.sum() / count.sum()), percentile_interval(np.concatenate(means), confidence)


def _check_draws(resamples: int, seed: int) -> None:
    if resamples < 1 or seed < 0:
        raise CxrError(f"resamples={resamples}, seed={seed}: give at least 1 resample and a seed of 0 or more")


def _draw_counts(patients: int, seed: int, numbers: range) -> Int32[np.ndarray, "patients R"]:
    """Return how often each patient occurs in each of the numbered draws."""
    counts = np.empty((len(numbers), patients), np.int32)
    for row, number in zip(counts, numbers, strict=True):
        drawn = np.random.default_rng([seed, number]).integers(patients, size=patients)
        row[:] = np.bincount(drawn, minlength=patients)
    return np.ascontiguousarray(counts.T)


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """AUROC (index 0) and average precision (1) of G tables and K findings, and of R draws of patients.

    Attributes:
      tables: G prediction tables of one model or ensemble, for instance one per fold or per seed.
      resamples, seed: of the draws; 0 resamples means none.
      stratum: i[G], equal where tables cover the same images; tables of different strata share no patient.
      value: f64[2, G, K], 0 to 1; NaN where `reasons` says why.
      draws: f64[2, G, R, K]; also NaN where a draw has one class only.
      reasons: G x K, why a value is undefined, else empty.
    """

    tables: tuple[Predictions, ...]
    resamples: int
    seed: int
    stratum: Int[np.ndarray, " G"]
    value: Float64[np.ndarray, "2 G K"]
    draws: Float64[np.ndarray, "2 G R K"]
    reasons: tuple[tuple[str, ...], ...]

    @classmethod
    def from_tables(cls, tables: Sequence[Predictions], *, resamples: int = 1000, seed: int = 0) -> "BootstrapResult":
        """Score one model's tables and bootstrap their patients.

        Args:
          tables: with the same findings; any two cover the same images in the same order, or disjoint patients.
          resamples: draws of patients; 0 for none.
          seed: of the first stratum's draws; each further stratum uses the next integer.

        Raises:
          CxrError: no table, different findings, tables that share only some patients, or a setting out of range.
        """
        if not tables:
            raise CxrError("no predictions are given")
        findings = tables[0].findings
        if any(table.findings != findings for table in tables):
            raise CxrError("tables of one model must have the same findings in the same order")
        stratum = strata(tables)
        values, draws, reasons = [], [], []
        for table, number in zip(tables, stratum.tolist(), strict=True):
            rankings = [
                Ranking.from_scores(table.logit[:, k], table.label[:, k], table.label_mask[:, k])
                for k in range(len(findings))
            ]
            ones = np.ones((len(table), 1), np.int64)
            scores = [np.concatenate(ranking.measure(ones)) for ranking in rankings]
            values.append(np.array(scores).reshape(len(findings), 2).T)
            draws.append(
                np.stack(bootstrap_scores(rankings, table.patient, resamples=resamples, seed=seed + number))
                if resamples else np.empty((2, 0, len(findings)))
            )  # fmt: skip
            reasons.append(tuple(ranking.reason for ranking in rankings))
        return cls(
            tuple(tables), resamples, seed, stratum, np.stack(values, axis=1), np.stack(draws, axis=1), tuple(reasons)
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the K findings."""
        return self.tables[0].findings

    @property
    def defined(self) -> Bool[np.ndarray, "G K"]:
        """Where a table's labels define a finding's scores."""
        return np.array([[not reason for reason in row] for row in self.reasons])

    @property
    def unique_tables(self) -> list[Predictions]:
        """One table per stratum, so that every image occurs once."""
        return [self.tables[g] for g in np.unique(self.stratum, return_index=True)[1]]


def strata(tables: Sequence[Predictions]) -> Int[np.ndarray, " G"]:
    """Number the sets of images that the tables cover, in order of first appearance.

    Raises:
      CxrError: two tables neither cover the same images in the same order nor have disjoint patients.
    """
    firsts: list[Predictions] = []
    numbers = []
    for table in tables:
        number = next((i for i, first in enumerate(firsts) if same_images(first, table)), len(firsts))
        if number == len(firsts):
            for first in firsts:
                _check_disjoint(first.patient, table.patient)
            firsts.append(table)
        numbers.append(number)
    return np.array(numbers)


def same_images(first: Predictions, second: Predictions) -> bool:
    """Return whether two tables cover the same images and patients in the same order."""
    return np.array_equal(first.id, second.id) and np.array_equal(first.patient, second.patient)


def _check_disjoint(first: Shaped[np.ndarray, " N"], second: Shaped[np.ndarray, " M"]) -> None:
    shared = np.intersect1d(first, second)
    if len(shared):
        raise CxrError(
            f"two tables of one model share {len(shared):,} patients (the first is {shared[0]}) but do not cover the "
            "same images in the same order: predict the same split, or folds with disjoint patients"
        )
