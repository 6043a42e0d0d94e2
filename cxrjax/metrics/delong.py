"""Variances of AUROCs and tests of their differences without resampling (DeLong et al., Biometrics 1988).

The placements of the scores come from midranks, in O(N log N) (Sun & Xu, IEEE Signal Processing Letters 2014). Images
of one patient are not independent, so their placements are summed first (Obuchowski, Biometrics 1997); with one image
per patient that is exactly DeLong's estimate.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped
from scipy.stats import norm, rankdata

from cxrjax.errors import CxrError
from cxrjax.metrics.auc import undefined_reason


@dataclass(frozen=True)
class Estimate:
    """A quantity with its standard error, and the normal distribution's word on it; NaN where undefined.

    Attributes:
      value: the quantity.
      error: its standard error.
    """

    value: float
    error: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The bounds value -+ z x error.

        Raises:
          CxrError: the confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise CxrError(f"confidence={confidence}: give a fraction between 0 and 1, such as 0.95")
        half = norm.ppf((1 + confidence) / 2) * self.error
        return float(self.value - half), float(self.value + half)

    @property
    def z(self) -> float:
        """The value in standard errors; a value of exactly 0 is 0 even if it has no error."""
        if self.error == 0:
            return math.copysign(math.inf, self.value) if self.value else 0.0
        return self.value / self.error

    @property
    def p(self) -> float:
        """Two-sided p-value of the hypothesis that the quantity is 0."""
        return float(2 * norm.sf(abs(self.z)))


@dataclass(frozen=True, eq=False)
class CorrelatedAurocs:
    """AUROCs of M models on the same images, with what their covariance is made of.

    Attributes:
      auroc: f64[M], 0 to 1; NaN where `reason` says why.
      positive, negative: f64[M, P], how far each patient's positive and negative images move the AUROCs.
      scale: corrections for small numbers of patients: of products of positives, of negatives, and of both.
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
        squares = (self.positive @ self.positive.T, self.negative @ self.negative.T, mixed + mixed.T)
        return sum(factor * square for factor, square in zip(self.scale, squares, strict=True))  # pyright: ignore

    def area(self, model: int = 0) -> Estimate:
        """The AUROC of one model."""
        return self.contrast(np.eye(len(self.auroc))[model])

    def difference(self, first: int = 0, second: int = 1) -> Estimate:
        """The AUROC of one model less that of another."""
        return self.contrast(np.eye(len(self.auroc))[first] - np.eye(len(self.auroc))[second])

    def contrast(self, weights: Float64[np.ndarray, " M"]) -> Estimate:
        """A weighted sum of the AUROCs.

        It is made of weighted placements, so that equal models differ by exactly 0 with an error of exactly 0.
        """
        positive, negative = weights @ self.positive, weights @ self.negative
        squares = (positive @ positive, negative @ negative, 2 * positive @ negative)
        variance = sum(factor * square for factor, square in zip(self.scale, squares, strict=True))
        return Estimate(
            float(weights @ self.auroc), math.sqrt(max(float(variance), 0)) if variance == variance else math.nan
        )


def delong(
    scores: Float[np.ndarray, "M N"],
    label: Shaped[np.ndarray, " N"],
    label_mask: Bool[np.ndarray, " N"] | None = None,
    patient: Shaped[np.ndarray, " N"] | None = None,
) -> CorrelatedAurocs:
    """AUROCs of M models for one finding on the same N images.

    Args:
      scores: of each model, any increasing function of the probability, not NaN.
      label: positive where true or 1.
      label_mask: which examples count; None means all.
      patient: whose image each is; None means that all images are independent.

    Returns:
      The areas; without variance where fewer than two patients have positive labels, or negative ones.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    label_mask = np.ones(scores.shape[1], bool) if label_mask is None else np.asarray(label_mask, bool)
    there = np.asarray(label)[label_mask] > 0
    models, nothing = len(scores), np.full((len(scores), 1), np.nan)
    reason = undefined_reason(np.asarray(label), label_mask)
    if reason:
        return CorrelatedAurocs(np.full(models, np.nan), nothing, nothing, (1.0, 1.0, 1.0), reason)
    scores = scores[:, label_mask]
    owner = (
        np.arange(label_mask.sum())
        if patient is None
        else np.unique(np.asarray(patient)[label_mask], return_inverse=True)[1]
    )

    positives, negatives = np.count_nonzero(there), np.count_nonzero(~there)
    ranks = rankdata(scores, axis=1)
    above = (ranks[:, there] - rankdata(scores[:, there], axis=1)) / negatives  # share of negatives below a positive
    below = 1 - (ranks[:, ~there] - rankdata(scores[:, ~there], axis=1)) / positives
    auroc = above.mean(axis=1)

    with_positive, with_negative = len(np.unique(owner[there])), len(np.unique(owner[~there]))
    if min(with_positive, with_negative) < 2:
        few = "positive" if with_positive < 2 else "negative"
        return CorrelatedAurocs(auroc, nothing, nothing, (1.0, 1.0, 1.0), f"only one patient has a {few} example")
    patients = owner.max() + 1
    scale = with_positive / (with_positive - 1), with_negative / (with_negative - 1), patients / (patients - 1)
    positive = _sums((above - auroc[:, None]) / positives, owner[there], patients)
    negative = _sums((below - auroc[:, None]) / negatives, owner[~there], patients)
    return CorrelatedAurocs(auroc, positive, negative, scale)


def _sums(
    values: Float64[np.ndarray, "M n"], owner: Shaped[np.ndarray, " n"], patients: int
) -> Float64[np.ndarray, "M P"]:
    return np.stack([np.bincount(owner, weights=row, minlength=patients) for row in values])
