"""Calibration: reliability diagrams, expected calibration error, Brier score, temperature scaling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Shaped
from scipy.optimize import root_scalar
from scipy.special import expit, log_expit, softmax

from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.metrics.auc import mean_defined, undefined_reason
from cxrjax.metrics.predictions import Predictions, log_odds

SPACINGS = ("width", "mass")
"""Bins of equal width, or with equal numbers of predictions."""

MAX_TEMPERATURE = 100.0
"""The largest temperature; the smallest is 1 / MAX_TEMPERATURE."""

_MIN_LOG_P = -1e6  # stands for the logarithm of a probability of 0


@dataclass(frozen=True, eq=False)
class ReliabilityDiagram:
    """Predictions in B bins of probability, with the observed frequency of each bin.

    Attributes:
      edges: f64[B + 1], ascending from 0 to 1 (equal mass: from the smallest to the largest probability). A bin holds
        probabilities above its lower edge up to its upper one; the first bin includes its lower edge.
      count: int64[B], predictions in each bin.
      predicted: f64[B], their mean probability; NaN in an empty bin.
      observed: f64[B], the fraction that is positive; NaN in an empty bin.
    """

    edges: Float64[np.ndarray, " E"]
    count: Int64[np.ndarray, " B"]
    predicted: Float64[np.ndarray, " B"]
    observed: Float64[np.ndarray, " B"]

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean of |observed - predicted|, 0 to 1; NaN without predictions."""
        gaps = np.abs(self.observed - self.predicted)
        return float(np.nansum(gaps * self.count) / self.count.sum()) if self.count.any() else math.nan


def reliability_diagram(
    probability: Float64[np.ndarray, " N"],
    label: Shaped[np.ndarray, " N"],
    label_mask: Bool[np.ndarray, " N"] | None = None,
    *,
    bins: int = 15,
    spacing: str = "width",
) -> ReliabilityDiagram:
    """Bin the predictions of one finding, as scikit-learn's `calibration_curve` does.

    Args:
      probability: 0 to 1.
      label: positive where true or 1.
      label_mask: which examples count; None means all.
      bins: the number of bins.
      spacing: "width", or "mass" for quantiles (equal probabilities stay together, so bins may be uneven or empty).

    Raises:
      CxrError: no such spacing, fewer than one bin, or a probability out of range.
    """
    check_positive("bins of a reliability diagram", bins)
    check_choice("spacing of bins", spacing, SPACINGS)
    label_mask = np.ones(len(probability), bool) if label_mask is None else np.asarray(label_mask, bool)
    p, positive = np.asarray(probability, np.float64)[label_mask], np.asarray(label)[label_mask] > 0
    if not ((p >= 0) & (p <= 1)).all():
        raise CxrError(f"calibration: {p[~((p >= 0) & (p <= 1))][0]} is not a probability")
    edges = np.linspace(0, 1, bins + 1)
    if spacing == "mass" and len(p):
        edges = np.percentile(p, 100 * edges)
    index = np.searchsorted(edges[1:-1], p)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (p, positive)]
    means = [np.divide(total, count, out=np.full(bins, np.nan), where=count > 0) for total in sums]
    return ReliabilityDiagram(edges, count, *means)


@dataclass(frozen=True)
class BrierScore:
    """The mean squared error of probabilities, decomposed: score = reliability - resolution + uncertainty.

    Attributes:
      score: 0 (certain and right) to 1.
      reliability: the squared gap between observed and predicted frequencies, over bins; 0 is best.
      resolution: how far observed frequencies differ between bins; more is better. It includes the variation inside
        bins (Stephenson et al., Weather and Forecasting 2008), so that the sum is exact.
      uncertainty: the variance of the labels, which does not depend on the model.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float


def brier_score(
    probability: Float64[np.ndarray, " N"],
    label: Shaped[np.ndarray, " N"],
    label_mask: Bool[np.ndarray, " N"] | None = None,
    *,
    bins: int = 15,
    spacing: str = "width",
) -> BrierScore:
    """Return the decomposed Brier score of one finding; NaN without labels. Arguments as in `reliability_diagram`."""
    label_mask = np.ones(len(probability), bool) if label_mask is None else np.asarray(label_mask, bool)
    if not label_mask.any():
        return BrierScore(math.nan, math.nan, math.nan, math.nan)
    diagram = reliability_diagram(probability, label, label_mask, bins=bins, spacing=spacing)
    positive = (np.asarray(label)[label_mask] > 0).astype(np.float64)
    score = float(np.mean((np.asarray(probability, np.float64)[label_mask] - positive) ** 2))
    gaps = float(np.nansum(diagram.count * (diagram.observed - diagram.predicted) ** 2) / len(positive))
    variance = float(positive.mean() * (1 - positive.mean()))
    return BrierScore(score, gaps, gaps + variance - score, variance)


def calibration_report(predictions: Predictions) -> list[dict[str, Any]]:
    """Return the calibration errors of every finding and their mean.

    Returns:
      Flat rows: finding, ece_width and ece_mass (expected calibration errors), brier, brier_reliability,
      brier_resolution, brier_uncertainty (equal width), known (number of labels), reason. The last row, `mean`, is the
      mean over findings that have labels.
    """
    p, probability, rows = predictions, predictions.probability, []
    for k, finding in enumerate(p.findings):
        cells = (probability[:, k], p.label[:, k], p.label_mask[:, k])
        errors = {f"ece_{s}": reliability_diagram(*cells, spacing=s).ece for s in SPACINGS}
        brier = brier_score(*cells)
        known = int(p.label_mask[:, k].sum())
        rows.append(
            {"finding": finding, **errors, "brier": brier.score, "brier_reliability": brier.reliability}
            | {"brier_resolution": brier.resolution, "brier_uncertainty": brier.uncertainty, "known": known}
            | {"reason": "" if known else "no known label"}
        )
    columns = [name for name in rows[0] if name not in ("finding", "known", "reason")] if rows else []
    missing = [row["finding"] for row in rows if row["reason"]]
    mean = {name: mean_defined([row[name] for row in rows]) for name in columns}
    reason = f"left out: {', '.join(missing)} (no known label)" if missing else ""
    return [*rows, {"finding": "mean"} | mean | {"known": int(p.label_mask.sum()), "reason": reason}]


@dataclass(frozen=True)
class Temperatures:
    """Temperatures that divide each finding's logits, or log probabilities if the classes are exclusive.

    Attributes:
      findings: K names.
      values: 1 / MAX_TEMPERATURE to MAX_TEMPERATURE; above 1 for an overconfident network; 1 if the labels define none.
      reasons: K reasons why a value was not fitted, or is at its limit; else empty.
      exclusive: whether each image has exactly one of the findings. All values are then equal, and the probabilities of
        an image still sum to 1.
    """

    findings: tuple[str, ...]
    values: tuple[float, ...]
    reasons: tuple[str, ...]
    exclusive: bool = False

    def apply(self, predictions: Predictions) -> Predictions:
        """Return the table with scaled logits; errors as in `scale`."""
        return replace(predictions, logit=self.scale(predictions.logit, predictions.findings))

    def scale(self, logit: Float64[np.ndarray, "N K"], findings: Sequence[str]) -> Float64[np.ndarray, "N K"]:
        """Return the log-odds of these findings, scaled by their temperatures.

        Raises:
          CxrError: a finding has no temperature, or an exclusive class is left out.
        """
        missing = [finding for finding in findings if finding not in self.findings]
        if missing:
            raise CxrError(f"no temperature for {', '.join(missing)}; fitted for {', '.join(self.findings)}")
        values = dict(zip(self.findings, self.values, strict=True))
        divisors = np.array([values[finding] for finding in findings])
        if self.exclusive:
            if len(findings) < len(self.findings):
                raise CxrError(f"the temperature of exclusive classes needs all of them: {', '.join(self.findings)}")
            return log_odds(log_expit(logit) / divisors, "cross_entropy")
        return np.clip(logit / divisors, -1e300, 1e300)


def fit_temperatures(validation: Predictions, *, exclusive: bool = False) -> Temperatures:
    """Fit each finding's temperature on validation (Guo et al., ICML 2017, one finding at a time).

    Minimises the mean binary cross-entropy of sigmoid(logit / T), or for exclusive classes the categorical one of
    softmax(log p / T). Both are convex in 1 / T. Never fit on the images that are scored: their calibration would look
    better than it is.

    Args:
      validation: labelled predictions of images used neither for training nor for testing.
      exclusive: whether the findings are exclusive classes, and the logits log p / (1 - p) of their softmax.
    """
    p, values, reasons = validation, [], []
    if exclusive:
        rows = p.label_mask.all(1)
        log_p = np.maximum(log_expit(p.logit[rows]), _MIN_LOG_P)
        inverse = _inverse_categorical(log_p, p.label[rows].argmax(1)) if rows.any() else 1.0
        reason = _limit_reason(inverse) if rows.any() else "no known label"
        count = len(p.findings)
        return Temperatures(p.findings, (1 / inverse,) * count, (reason,) * count, exclusive=True)
    for k in range(len(p.findings)):
        mask = p.label_mask[:, k]
        reason = undefined_reason(p.label[:, k], mask)
        inverse = 1.0 if reason else _inverse_binary(p.logit[mask, k], p.label[mask, k] > 0)
        values.append(1 / inverse)
        reasons.append(reason or _limit_reason(inverse))
    return Temperatures(p.findings, tuple(values), tuple(reasons))


def _limit_reason(inverse: float) -> str:
    """Return why a temperature is at its limit; empty where it is not."""
    if inverse not in (1 / MAX_TEMPERATURE, MAX_TEMPERATURE):
        return ""
    why = "the logits are uninformative or inverted" if inverse < 1 else "the logits separate the labels"
    return f"at the limit of {1 / inverse:g}: {why}"


def _inverse_binary(logit: Float64[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> float:
    """Return 1 / T at the minimum of the binary cross-entropy, within the limits."""
    unit = max(float(np.abs(logit).max()), 1.0)  # infinite logits are stored as 1e300: avoid overflow of sums

    def slope(inverse: float) -> float:
        return float(np.mean((expit(inverse * logit) - label) * (logit / unit)))

    return _root(slope)


def _inverse_categorical(log_p: Float64[np.ndarray, "N K"], label: Int[np.ndarray, " N"]) -> float:
    """Return 1 / T at the minimum of the categorical cross-entropy of softmax(log_p / T)."""
    true_class = np.take_along_axis(log_p, label[:, None], axis=1)[:, 0]

    def slope(inverse: float) -> float:
        return float(np.mean((softmax(inverse * log_p, axis=1) * log_p).sum(1) - true_class))

    return _root(slope)


def _root(slope: Callable[[float], float]) -> float:
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    if slope(low) >= 0:
        return low
    return high if slope(high) <= 0 else root_scalar(slope, bracket=(low, high), xtol=1e-12, rtol=1e-12).root
