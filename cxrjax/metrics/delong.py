"""Variances of AUROCs and tests of their differences without resampling (DeLong et al., Biometrics 1988).

Placements are computed from midranks in O(N log N) (Sun & Xu, IEEE Signal Processing Letters 2014). Images of one
patient are not independent, so their placements are summed per patient (Obuchowski, Biometrics 1997). With one image
per patient that is exactly DeLong's estimate.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped
from scipy.stats import norm, rankdata, t

from cxrjax.metrics.auc import undefined_reason
from cxrjax.metrics.bootstrap import check_confidence


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

    def area(self, model: int = 0) -> Estimate:
        """Return the AUROC of one model."""
        return self.contrast(np.eye(len(self.auroc))[model])

    def difference(self, first: int = 0, second: int = 1) -> Estimate:
        """Return the AUROC of one model minus that of another."""
        return self.contrast(np.eye(len(self.auroc))[first] - np.eye(len(self.auroc))[second])

    def contrast(self, weights: Float64[np.ndarray, " M"]) -> Estimate:
        """Return a weighted sum of the AUROCs, such as a difference.

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
