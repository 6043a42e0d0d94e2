"""Percentile bootstrap intervals over patients.

Images of one patient resemble each other, so patients are what is drawn, with replacement; each image then counts as
often as its patient was drawn (Efron & Tibshirani 1993, chapter 13). All findings are measured on the same draws, so
that the interval of their mean honours their correlation. Draw r depends on the patients, the seed and r alone.
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

_AT_ONCE = 64  # draws measured together: a compromise between loop overhead and cache
_CELLS = 1 << 22  # but no more than this many weights (16 MB), however many images there are
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Interval:
    """The middle of a bootstrap distribution.

    Attributes:
      low, high: its bounds; NaN where fewer than half of the draws define the quantity.
      undefined: in how many draws the quantity was undefined (one class only); these are left out.
    """

    low: float
    high: float
    undefined: int = 0


def bootstrap_scores(
    rankings: Sequence[Ranking], patient: Shaped[np.ndarray, " N"], *, resamples: int = 1000, seed: int = 0
) -> tuple[Float64[np.ndarray, "R K"], Float64[np.ndarray, "R K"]]:
    """Measure every finding on draws of patients with replacement.

    Args:
      rankings: one per finding, of the same N images.
      patient: whose image each is; an image without a patient number needs a name of its own.
      resamples: the number of draws, R.
      seed: >= 0, of the draws.

    Returns:
      AUROC and average precision of each draw and finding, NaN where the drawn labels are of one class only.

    Raises:
      CxrError: fewer than one draw, or a negative seed.
    """
    if resamples < 1 or seed < 0:
        raise CxrError(f"resamples={resamples}, seed={seed}: a bootstrap takes at least one draw and a seed from 0 up")
    names, owner = np.unique(patient, return_inverse=True)
    size = max(1, min(_AT_ONCE, _CELLS // max(1, len(owner))))

    def measure(start: int) -> tuple[list, list]:
        weight = _draws(len(names), seed, range(start, min(start + size, resamples)))[owner]
        return tuple(zip(*(ranking.measure(weight) for ranking in rankings), strict=True))  # pyright: ignore

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(measure, range(0, resamples, size)))
    auroc, average_precision = (np.concatenate([np.stack(part[i], axis=1) for part in parts]) for i in (0, 1))
    return auroc, average_precision


def percentile_interval(values: Float64[np.ndarray, " R"], confidence: float = 0.95) -> Interval:
    """The percentile interval of a bootstrap distribution, NaN marking undefined draws.

    Raises:
      CxrError: the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise CxrError(f"confidence={confidence}: give a fraction between 0 and 1, such as 0.95")
    defined = values[~np.isnan(values)]
    undefined = len(values) - len(defined)
    if len(defined) == 0 or undefined > len(defined):
        return Interval(float("nan"), float("nan"), undefined)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), undefined)


def bootstrap_mean(
    values: Float64[np.ndarray, "N K"],
    counts: Bool[np.ndarray, "N K"],
    patient: Shaped[np.ndarray, " N"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, Interval]:
    """The mean of the values that count, such as right or wrong calls, and its interval over the same draws as above.

    Raises:
      CxrError: no value counts, or a setting is out of range.
    """
    if resamples < 1 or seed < 0:
        raise CxrError(f"resamples={resamples}, seed={seed}: a bootstrap takes at least one draw and a seed from 0 up")
    if not counts.any():
        raise CxrError("no value counts, so there is no mean")
    names, owner = np.unique(patient, return_inverse=True)
    parts = np.where(counts, values, 0).sum(1), counts.sum(1)
    total, count = (np.bincount(owner, weights=part, minlength=len(names)) for part in parts)
    means = []
    for start in range(0, resamples, _AT_ONCE):
        weight = _draws(len(names), seed, range(start, min(start + _AT_ONCE, resamples)))
        with np.errstate(invalid="ignore"):  # a draw in which nothing counts has no mean
            means.append((total @ weight) / (count @ weight))
    return float(total.sum() / count.sum()), percentile_interval(np.concatenate(means), confidence)


def _draws(patients: int, seed: int, numbers: range) -> Int32[np.ndarray, "patients R"]:
    """How often each patient is in each of the numbered draws."""
    counts = np.empty((len(numbers), patients), np.int32)
    for row, number in zip(counts, numbers, strict=True):
        row[:] = np.bincount(
            np.random.default_rng([seed, number]).integers(patients, size=patients), minlength=patients
        )
    return np.ascontiguousarray(counts.T)


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """AUROC (0) and average precision (1) of G tables and K findings, and of R draws of the patients.

    Attributes:
      tables: G of them, all of one model or ensemble.
      resamples, seed: of the draws; 0 resamples means none.
      stratum: i[G], equal where tables are of the same images, else the patients are others.
      value: f64[2, G, K], 0 to 1; NaN where `reasons` says why.
      draws: f64[2, G, R, K], NaN too where a draw is of one class only.
      reasons: G x K, why there is no value, else empty.
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
        """Measure a model.

        Args:
          tables: with the same findings; any two of the same images in the same order, or of other patients.
          resamples: draws of patients; 0 for none.
          seed: of the draws; the first images' draws have this one, each other images' the next.

        Raises:
          CxrError: no table, other findings, tables that share some patients only, or a setting out of range.
        """
        if not tables:
            raise CxrError("no predictions are given")
        findings = tables[0].findings
        if any(table.findings != findings for table in tables):
            raise CxrError("tables of one model must have the same findings in the same order")
        stratum = strata(tables)
        values, draws, reasons = [], [], []
        for table, number in zip(tables, stratum.tolist(), strict=True):
            label_mask = [(table.logit[:, k], table.label[:, k], table.label_mask[:, k]) for k in range(len(findings))]
            rankings = [Ranking.from_scores(*columns) for columns in label_mask]
            every = np.ones((len(table), 1), np.int64)
            measured = [np.concatenate(ranking.measure(every)) for ranking in rankings]
            values.append(np.array(measured).reshape(len(findings), 2).T)
            nothing = np.empty((2, 0, len(findings)))
            draws.append(
                np.stack(bootstrap_scores(rankings, table.patient, resamples=resamples, seed=seed + number))
                if resamples else nothing
            )  # fmt: skip
            reasons.append(tuple(ranking.reason for ranking in rankings))
        return cls(
            tuple(tables), resamples, seed, stratum, np.stack(values, axis=1), np.stack(draws, axis=1), tuple(reasons)
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """K names."""
        return self.tables[0].findings

    @property
    def defined(self) -> Bool[np.ndarray, "G K"]:
        """Which tables' labels define which findings' values."""
        return np.array([[not reason for reason in row] for row in self.reasons])

    @property
    def distinct(self) -> list[Predictions]:
        """One table of each stratum: every image once."""
        return [self.tables[g] for g in np.unique(self.stratum, return_index=True)[1]]


def strata(tables: Sequence[Predictions]) -> Int[np.ndarray, " G"]:
    """Number the sets of images that tables are of, in the order of their first appearance.

    Raises:
      CxrError: two tables are neither of the same images in the same order, nor of other patients.
    """
    firsts: list[Predictions] = []
    numbers = []
    for table in tables:
        number = next((i for i, first in enumerate(firsts) if same_images(first, table)), len(firsts))
        if number == len(firsts):
            for first in firsts:
                _refuse_shared(first.patient, table.patient)
            firsts.append(table)
        numbers.append(number)
    return np.array(numbers)


def same_images(first: Predictions, second: Predictions) -> bool:
    """Whether two tables are of the same images and patients, in the same order."""
    return np.array_equal(first.id, second.id) and np.array_equal(first.patient, second.patient)


def _refuse_shared(first: Shaped[np.ndarray, " N"], second: Shaped[np.ndarray, " M"]) -> None:
    shared = np.intersect1d(first, second)
    if len(shared):
        raise CxrError(
            f"two tables of one model share {len(shared):,} patients (the first is {shared[0]}) but are not of the "
            "same images in the same order: predict the same part, or folds without common patients"
        )
