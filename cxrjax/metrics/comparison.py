"""Comparison of two models: the paired bootstrap for the mean AUROC, DeLong's test for single findings.

A model may come as several tables, one per fold or training seed; its AUROC is then the mean over them (see
`bootstrap.BootstrapResult`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped
from scipy.stats import norm, rankdata, t

from cxrjax.errors import CxrError
from cxrjax.findings import finding_indices
from cxrjax.metrics.auc import undefined_reason
from cxrjax.metrics.bootstrap import BootstrapResult, check_confidence, percentile_interval, same_images, strata
from cxrjax.metrics.ensemble import align
from cxrjax.metrics.predictions import Predictions


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error. NaN where undefined.

    Attributes:
      value: the estimate.
      error: its standard error.
      df: degrees of freedom of Student's t distribution; None for the normal distribution.
    """

    value: float
    error: float
    df: int | None = None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bounds of the confidence interval.

        Raises:
          CxrError: the confidence is not between 0 and 1.
        """
        check_confidence(confidence)
        level = (1 + confidence) / 2
        half = float(norm.ppf(level) if self.df is None else t.ppf(level, self.df)) * self.error
        return float(self.value - half), float(self.value + half)

    @property
    def z(self) -> float:
        """The value in standard errors; 0 for a value of exactly 0, even without any error."""
        if self.error == 0:
            return math.copysign(math.inf, self.value) if self.value else 0.0
        return self.value / self.error

    @property
    def p(self) -> float:
        """Two-sided p-value of the hypothesis that the value is 0."""
        return float(2 * (norm.sf(abs(self.z)) if self.df is None else t.sf(abs(self.z), self.df)))


@dataclass(frozen=True, eq=False)
class CorrelatedAurocs:
    """AUROCs of M models on the same images, and the placements that give their covariance.

    Attributes:
      auroc: f64[M], 0 to 1; NaN where `reason` says why.
      positive, negative: f64[M, P], centred placements of each patient's positive and negative images.
      scale: small-sample corrections of positive x positive, negative x negative and positive x negative products.
      reason: why there is no AUROC or no variance, else empty.
    """

    auroc: Float64[np.ndarray, " M"]
    positive: Float64[np.ndarray, "M P"]
    negative: Float64[np.ndarray, "M P"]
    scale: tuple[float, float, float]
    reason: str = ""

    @property
    def covariance(self) -> Float64[np.ndarray, "M M"]:
        """The covariance of the AUROCs."""
        mixed = self.positive @ self.negative.T
        products = (self.positive @ self.positive.T, self.negative @ self.negative.T, mixed + mixed.T)
        return sum(factor * product for factor, product in zip(self.scale, products, strict=True))  # pyright: ignore

    def contrast(self, weights: Float64[np.ndarray, " M"]) -> Estimate:
        """Return a weighted sum of the AUROCs, such as a difference (weights 1 and -1).

        The variance comes from weighted placements, so equal models differ by exactly 0 with an error of exactly 0.
        """
        positive, negative = weights @ self.positive, weights @ self.negative
        products = (positive @ positive, negative @ negative, 2 * positive @ negative)
        variance = sum(factor * product for factor, product in zip(self.scale, products, strict=True))
        return Estimate(
            float(weights @ self.auroc), math.sqrt(max(float(variance), 0)) if variance == variance else math.nan
        )


def delong(
    scores: Float[np.ndarray, "M N"],
    label: Shaped[np.ndarray, " N"],
    label_mask: Bool[np.ndarray, " N"] | None = None,
    patient: Shaped[np.ndarray, " N"] | None = None,
) -> CorrelatedAurocs:
    """Return the AUROCs of M models for one finding on the same N images, with their covariance.

    Args:
      scores: any increasing function of the probability, not NaN.
      label: positive where true or 1.
      label_mask: which examples count; None means all.
      patient: the patient of each image; None means that all images are independent.

    Returns:
      The AUROCs; without variance where fewer than two patients have positive, or negative, images.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    label_mask = np.ones(scores.shape[1], bool) if label_mask is None else np.asarray(label_mask, bool)
    positive_label = np.asarray(label)[label_mask] > 0
    models, nan = len(scores), np.full((len(scores), 1), np.nan)
    reason = undefined_reason(np.asarray(label), label_mask)
    if reason:
        return CorrelatedAurocs(np.full(models, np.nan), nan, nan, (1.0, 1.0, 1.0), reason)
    scores = scores[:, label_mask]
    owner = (
        np.arange(label_mask.sum())
        if patient is None
        else np.unique(np.asarray(patient)[label_mask], return_inverse=True)[1]
    )

    pos, neg = np.flatnonzero(positive_label), np.flatnonzero(~positive_label)
    ranks = rankdata(scores, axis=1)
    above = (ranks[:, pos] - rankdata(scores[:, pos], axis=1)) / len(neg)  # fraction of negatives below each positive
    below = 1 - (ranks[:, neg] - rankdata(scores[:, neg], axis=1)) / len(pos)
    auroc = above.mean(axis=1)

    with_positive, with_negative = len(np.unique(owner[pos])), len(np.unique(owner[neg]))
    if min(with_positive, with_negative) < 2:
        few = "positive" if with_positive < 2 else "negative"
        return CorrelatedAurocs(auroc, nan, nan, (1.0, 1.0, 1.0), f"only one patient has a {few} example")
    patients = owner.max() + 1
    scale = with_positive / (with_positive - 1), with_negative / (with_negative - 1), patients / (patients - 1)
    positive = _sum_by_patient((above - auroc[:, None]) / len(pos), owner[pos], patients)
    negative = _sum_by_patient((below - auroc[:, None]) / len(neg), owner[neg], patients)
    return CorrelatedAurocs(auroc, positive, negative, scale)


def _sum_by_patient(
    values: Float64[np.ndarray, "M n"], owner: Shaped[np.ndarray, " n"], patients: int
) -> Float64[np.ndarray, "M P"]:
    return np.stack([np.bincount(owner, weights=row, minlength=patients) for row in values])


@dataclass(frozen=True)
class Difference:
    """Mean AUROC of one model minus that of another.

    Attributes:
      value: the difference.
      low, high: its percentile interval.
      left_out: findings whose labels leave the AUROC undefined in some table.
      per_table: the difference in each table (fold or seed).
    """

    value: float
    low: float
    high: float
    left_out: tuple[str, ...] = ()
    per_table: tuple[float, ...] = ()

    def __str__(self) -> str:
        without = f", without {', '.join(self.left_out)} (one class only)" if self.left_out else ""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}){without}"


def difference(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    findings: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Return the mean AUROC of `first` minus that of `second`, with a paired bootstrap over patients.

    Args:
      first: tables of one model, one per fold or training seed; their AUROCs are averaged.
      second: tables of the other model, each of the same images and patients as that of `first`.
      findings: to average over; both models must have them. Undefined ones are left out and named in the result.
      resamples: draws of patients.
      seed: of the draws.
      confidence: level of the interval.

    Raises:
      CxrError: the tables cover different images, or a finding is missing.
    """
    one, other = (
        BootstrapResult.from_tables([table.select(findings) for table in tables], resamples=resamples, seed=seed)
        for tables in (first, second)
    )
    return difference_from_bootstrap(one, other, findings, confidence=confidence)


def difference_from_bootstrap(
    first: BootstrapResult, second: BootstrapResult, findings: Sequence[str], *, confidence: float = 0.95
) -> Difference:
    """Return `difference` from results that were computed before, on the same draws.

    Raises:
      CxrError: the results are of different images or draws, or a finding is missing.
    """
    paired = (first.resamples, first.seed, len(first.tables)) == (second.resamples, second.seed, len(second.tables))
    if not (paired and all(map(same_images, first.tables, second.tables))):
        raise CxrError("models can only be compared on the same images in the same order: predict the same split")
    columns = [np.array(finding_indices(findings, result.findings)) for result in (first, second)]
    defined: np.ndarray = np.all(first.defined[:, columns[0]] & second.defined[:, columns[1]], axis=0)
    left_out = tuple(finding for finding, ok in zip(findings, defined, strict=True) if not ok)
    if not defined.any():
        return Difference(math.nan, math.nan, math.nan, left_out)
    columns = [column[defined] for column in columns]
    per_table = first.value[0][:, columns[0]].mean(1) - second.value[0][:, columns[1]].mean(1)
    draws = [
        result.draws[0][:, :, column].mean((0, 2)) for result, column in zip((first, second), columns, strict=True)
    ]
    interval = percentile_interval(draws[0] - draws[1], confidence)
    return Difference(float(per_table.mean()), interval.low, interval.high, left_out, tuple(map(float, per_table)))


def compare_findings(
    first: Predictions | Sequence[Predictions], second: Predictions | Sequence[Predictions], *, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Test every finding for a difference in AUROC between two models, with patients as the independent unit.

    Args:
      first: predictions of one model, or several tables as in `difference`. Folds are independent of each other;
        training seeds share their patients.
      second: of the other model; each table of the same images and findings as that of `first`, in any order.
      confidence: level of each finding's interval.

    Returns:
      A flat row per finding: finding, first and second (the AUROCs), difference (first - second), low, high, z, p
      (two-sided, see `delong`), p_holm (adjusted for the number of findings that could be tested), reason (why a value
      is NaN, else empty).

    Raises:
      CxrError: the tables differ in images, findings, patients or labels.
    """
    firsts, seconds = ([tables] if isinstance(tables, Predictions) else list(tables) for tables in (first, second))
    if len(firsts) != len(seconds) or not firsts:
        raise CxrError(f"models with {len(firsts)} and {len(seconds)} prediction tables cannot be compared")
    pairs = [align(pair) for pair in zip(firsts, seconds, strict=True)]
    findings = pairs[0][0].findings
    pairs = [[table.select(findings) for table in pair] for pair in pairs]
    stratum = strata([pair[0] for pair in pairs])
    groups = [[pair for pair, i in zip(pairs, stratum, strict=True) if i == number] for number in set(stratum)]
    rows: list[dict[str, Any]] = []
    for k, finding in enumerate(findings):
        terms = [_contrast(group, k, len(pairs)) for group in groups]
        reason = next((reason for *_, reason in terms if reason), "")
        gap = Estimate(sum(term[0].value for term in terms), math.sqrt(sum(term[0].error ** 2 for term in terms)))
        low, high = gap.interval(confidence)
        rows.append(
            {"finding": finding, "first": sum(term[1] for term in terms), "second": sum(term[2] for term in terms)}
            | {"difference": gap.value, "low": low, "high": high, "z": gap.z, "p": gap.p, "reason": reason}
        )
    adjusted = holm(np.array([row["p"] for row in rows]))
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _contrast(pairs: Sequence[Sequence[Predictions]], k: int, tables: int) -> tuple[Estimate, float, float, str]:
    """Return one stratum's terms of the means over all `tables`: the difference, both AUROCs, why they are NaN."""
    table = pairs[0][0]
    scores = np.stack([table.logit[:, k] for pair in pairs for table in pair])
    aurocs = delong(scores, table.label[:, k], table.label_mask[:, k], table.patient)
    weights = np.tile([1.0, -1.0], len(pairs)) / tables
    first, second = aurocs.auroc[::2].sum() / tables, aurocs.auroc[1::2].sum() / tables
    return aurocs.contrast(weights), float(first), float(second), aurocs.reason


def mean_over_folds(values: Sequence[float], *, test_to_train: float) -> Estimate:
    """Return the mean over folds, by the corrected resampled t-test (Nadeau & Bengio, Machine Learning 2003).

    Folds share training images, so their values are correlated and the usual variance of the mean, s^2 / k, is too
    small. The corrected variance is s^2 (1 / k + `test_to_train`), the latter being test images per training image in
    one fold. With fewer than two folds there is no standard error (NaN).

    Raises:
      CxrError: no value, or a ratio below 0.
    """
    if not len(values) or test_to_train < 0:
        raise CxrError(
            f"{len(values)} folds with {test_to_train} test images per training image: give at least 1 fold and a "
            "ratio of 0 or more"
        )
    array, folds = np.asarray(values, np.float64), len(values)
    spread = float(array.std(ddof=1)) if folds > 1 else math.nan
    return Estimate(float(array.mean()), spread * math.sqrt(1 / folds + test_to_train), folds - 1)


def holm(p: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """Adjust p-values for multiple testing, controlling the family-wise error rate (Holm 1979).

    The i-th smallest of m p-values is multiplied by m - i + 1, made monotone and clipped at 1. NaN marks a test that
    could not be made; it stays and does not count towards m.

    Raises:
      CxrError: a p-value is below 0 or above 1.
    """
    p = np.asarray(p, np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    if not ((p[tested] >= 0) & (p[tested] <= 1)).all():
        raise CxrError(f"p-values {p} must lie between 0 and 1")
    ascending = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    stepped = p[ascending] * np.arange(len(ascending), 0, -1)
    adjusted[ascending] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted
