"""Do events happen as often as they are predicted? Reliability diagrams, calibration errors, Brier scores."""

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
"""Bins of equal width, or of equal numbers of predictions."""


@dataclass(frozen=True, eq=False)
class ReliabilityDiagram:
    """Predictions in B bins of probability, and what became of them; the data of a reliability diagram.

    Attributes:
      edges: f64[B + 1], rising from 0 to 1 (equal mass: from the least to the greatest probability). A bin holds
        probabilities above its lower edge up to its upper one; the first holds its lower edge too.
      count: int64[B], predictions in each bin.
      predicted: f64[B], their mean probability; NaN in an empty bin.
      observed: f64[B], the share of them that came true; NaN in an empty bin.
    """

    edges: Float64[np.ndarray, " E"]
    count: Int64[np.ndarray, " B"]
    predicted: Float64[np.ndarray, " B"]
    observed: Float64[np.ndarray, " B"]

    @property
    def error(self) -> float:
        """Expected calibration error, the mean of |observed - predicted| over predictions; 0 to 1, NaN without any."""
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
    """Sort one finding's predictions into bins, as scikit-learn's `calibration_curve` does.

    Args:
      probability: 0 to 1.
      label: positive where true or 1.
      label_mask: which examples count; None means all.
      bins: how many.
      spacing: "width", or "mass" for quantiles (equal probabilities stay together, so bins may be uneven or empty).

    Raises:
      CxrError: no such spacing, fewer than one bin, or a probability out of range.
    """
    check_positive("bins of a reliability diagram", bins)
    check_choice("spacing of bins", spacing, SPACINGS)
    label_mask = np.ones(len(probability), bool) if label_mask is None else np.asarray(label_mask, bool)
    p, there = np.asarray(probability, np.float64)[label_mask], np.asarray(label)[label_mask] > 0
    if not ((p >= 0) & (p <= 1)).all():
        raise CxrError(f"calibration: {p[~((p >= 0) & (p <= 1))][0]} is not a probability")
    edges = np.linspace(0, 1, bins + 1)
    if spacing == "mass" and len(p):
        edges = np.percentile(p, 100 * edges)
    which = np.searchsorted(edges[1:-1], p)
    count = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, weights=values, minlength=bins) for values in (p, there)]
    means = [np.divide(total, count, out=np.full(bins, np.nan), where=count > 0) for total in sums]
    return ReliabilityDiagram(edges, count, *means)


@dataclass(frozen=True)
class BrierScore:
    """The mean squared error of probabilities, and its parts: score = reliability - resolution + uncertainty.

    Attributes:
      score: 0 (certain and right) to 1.
      reliability: how far what happens is from what was predicted, over bins; 0 is best.
      resolution: how far the predictions tell events apart; more is better. The variation inside bins is counted here
        (Stephenson et al., Weather and Forecasting 2008), so that the sum is exact.
      uncertainty: the variance of the labels, which no model can change.
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
    """The Brier score of one finding and its parts, NaN without known labels; arguments as in `reliability`."""
    label_mask = np.ones(len(probability), bool) if label_mask is None else np.asarray(label_mask, bool)
    if not label_mask.any():
        return BrierScore(math.nan, math.nan, math.nan, math.nan)
    diagram = reliability_diagram(probability, label, label_mask, bins=bins, spacing=spacing)
    there = (np.asarray(label)[label_mask] > 0).astype(np.float64)
    score = float(np.mean((np.asarray(probability, np.float64)[label_mask] - there) ** 2))
    gaps = float(np.nansum(diagram.count * (diagram.observed - diagram.predicted) ** 2) / len(there))
    variance = float(there.mean() * (1 - there.mean()))
    return BrierScore(score, gaps, gaps + variance - score, variance)


def calibration_report(predictions: Predictions, *, bins: int = 15) -> list[dict[str, Any]]:
    """How well a table is calibrated, finding by finding and on average.

    Returns:
      Flat rows: finding, ece_width and ece_mass (expected calibration errors), brier, brier_reliability,
      brier_resolution, brier_uncertainty (equal width), known (labels counted), reason. The last row, `mean`, is the
      mean over findings that have known labels.
    """
    p, probability, rows = predictions, predictions.probability, []
    for k, finding in enumerate(p.findings):
        cells = (probability[:, k], p.label[:, k], p.label_mask[:, k])
        errors = {f"ece_{spacing}": reliability_diagram(*cells, bins=bins, spacing=spacing).error for spacing in SPACINGS}
        parts = brier_score(*cells, bins=bins)
        label_mask = int(p.label_mask[:, k].sum())
        rows.append(
            {"finding": finding, **errors, "brier": parts.score, "brier_reliability": parts.reliability}
            | {"brier_resolution": parts.resolution, "brier_uncertainty": parts.uncertainty, "known": label_mask}
            | {"reason": "" if label_mask else "no known label"}
        )
    names = [name for name in rows[0] if name not in ("finding", "known", "reason")] if rows else []
    missing = [row["finding"] for row in rows if row["reason"]]
    mean = {name: mean_defined([row[name] for row in rows]) for name in names}
    words = f"left out: {', '.join(missing)} (no known label)" if missing else ""
    return [*rows, {"finding": "mean"} | mean | {"known": int(p.label_mask.sum()), "reason": words}]


MAX_TEMPERATURE = 100.0
"""The largest temperature; the smallest is 1 / HOTTEST."""

_LEAST = -1e6  # stands for the logarithm of a probability of 0, far beyond any network's


@dataclass(frozen=True)
class Temperatures:
    """What each finding's logits are divided by; over exclusive classes, the logarithms of their probabilities.

    Attributes:
      findings: K names.
      values: 1 / HOTTEST to HOTTEST; above 1 where the network was too sure; 1 where the labels define none.
      reasons: K words, why a value is not a fitted one, else empty.
      exclusive: whether the findings are classes of which an image has exactly one; the values are then equal, and the
        probabilities of an image still add up to 1.
    """

    findings: tuple[str, ...]
    values: tuple[float, ...]
    reasons: tuple[str, ...]
    exclusive: bool = False

    def apply(self, predictions: Predictions) -> Predictions:
        """The table with its logits at the temperatures of its findings; errors are those of `scale`."""
        return replace(predictions, logit=self.scale(predictions.logit, predictions.findings))

    def scale(self, logit: Float64[np.ndarray, "N K"], findings: Sequence[str]) -> Float64[np.ndarray, "N K"]:
        """Log-odds at the temperatures of these findings.

        Raises:
          CxrError: one of them has none, or one of exclusive classes is left out.
        """
        missing = [finding for finding in findings if finding not in self.findings]
        if missing:
            raise CxrError(f"no temperature for {', '.join(missing)}; fitted were {', '.join(self.findings)}")
        values = dict(zip(self.findings, self.values, strict=True))
        divisors = np.array([values[finding] for finding in findings])
        if self.exclusive:
            if len(findings) < len(self.findings):
                raise CxrError(f"the temperature of exclusive classes is for all of them: {', '.join(self.findings)}")
            return log_odds(log_expit(logit) / divisors, "cross_entropy")
        return np.clip(logit / divisors, -1e300, 1e300)


def fit_temperatures(validation: Predictions, *, exclusive: bool = False) -> Temperatures:
    """Fit each finding's temperature on validation (Guo et al., ICML 2017, one finding at a time).

    It minimises the mean binary cross-entropy of sigmoid(logit / T), or over exclusive classes the categorical one of
    softmax(log p / T); both are convex in 1 / T. Never fit on the images that are scored: calibration would look better
    than it is.

    Args:
      validation: labelled predictions of images that are neither trained nor tested on.
      exclusive: whether the findings are exclusive classes, and the logits log p / (1 - p) of their softmax.
    """
    p, values, reasons = validation, [], []
    if exclusive:
        rows = p.label_mask.all(1)
        log_p = np.maximum(log_expit(p.logit[rows]), _LEAST)
        sharpness = _sharpness_of_classes(log_p, p.label[rows].argmax(1)) if rows.any() else 1.0
        reason = _limit(sharpness) if rows.any() else "no known label"
        count = len(p.findings)
        return Temperatures(p.findings, (1 / sharpness,) * count, (reason,) * count, exclusive=True)
    for k in range(len(p.findings)):
        label_mask = p.label_mask[:, k]
        reasons.append(undefined_reason(p.label[:, k], label_mask))
        sharpness = 1.0 if reasons[-1] else _sharpness(p.logit[label_mask, k], p.label[label_mask, k] > 0)
        values.append(1 / sharpness)
        reasons[-1] = reasons[-1] or _limit(sharpness)
    return Temperatures(p.findings, tuple(values), tuple(reasons))


def _limit(sharpness: float) -> str:
    """Why a temperature is at its limit; empty where it is not."""
    if sharpness not in (1 / MAX_TEMPERATURE, MAX_TEMPERATURE):
        return ""
    why = "the logits say nothing or the opposite" if sharpness < 1 else "the logits separate the labels"
    return f"at the limit of {1 / sharpness:g}: {why}"


def _sharpness(logit: Float64[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> float:
    """1 / T where the slope of the loss is 0; the limit towards which it falls if there is no such place."""
    unit = max(float(np.abs(logit).max()), 1.0)  # infinite logits stand as 1e300: sums of them must not overflow

    def slope(sharpness: float) -> float:
        return float(np.mean((expit(sharpness * logit) - label) * (logit / unit)))

    return _zero(slope)


def _sharpness_of_classes(log_p: Float64[np.ndarray, "N K"], actual: Int[np.ndarray, " N"]) -> float:
    """The same of the categorical cross-entropy of softmax(log_p / T)."""
    own = np.take_along_axis(log_p, actual[:, None], axis=1)[:, 0]

    def slope(sharpness: float) -> float:
        return float(np.mean((softmax(sharpness * log_p, axis=1) * log_p).sum(1) - own))

    return _zero(slope)


def _zero(slope: Callable[[float], float]) -> float:
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    if slope(low) >= 0:
        return low
    return high if slope(high) <= 0 else root_scalar(slope, bracket=(low, high), xtol=1e-12, rtol=1e-12).root
