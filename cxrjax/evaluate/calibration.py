"""Do events happen as often as they are predicted? Reliability diagrams, calibration errors, Brier scores."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import mean_defined
from cxrjax.evaluate.predictions import Predictions
from cxrjax.models.options import one_of, positive

SPACINGS = ("width", "mass")
"""Bins of equal width, or of equal numbers of predictions."""


@dataclass(frozen=True, eq=False)
class Reliability:
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


def reliability(
    probability: Float64[np.ndarray, " N"],
    label: Shaped[np.ndarray, " N"],
    known: Bool[np.ndarray, " N"] | None = None,
    *,
    bins: int = 15,
    spacing: str = "width",
) -> Reliability:
    """Sort one finding's predictions into bins, as scikit-learn's `calibration_curve` does.

    Args:
      probability: 0 to 1.
      label: positive where true or 1.
      known: which examples count; None means all.
      bins: how many.
      spacing: "width", or "mass" for quantiles (equal probabilities stay together, so bins may be uneven or empty).

    Raises:
      CxrError: no such spacing, fewer than one bin, or a probability out of range.
    """
    positive("bins of a reliability diagram", bins)
    one_of("spacing of bins", spacing, SPACINGS)
    known = np.ones(len(probability), bool) if known is None else np.asarray(known, bool)
    p, there = np.asarray(probability, np.float64)[known], np.asarray(label)[known] > 0
    if not ((p >= 0) & (p <= 1)).all():
        raise CxrError(f"calibration: {p[~((p >= 0) & (p <= 1))][0]} is not a probability")
    edges = np.linspace(0, 1, bins + 1)
    if spacing == "mass" and len(p):
        edges = np.percentile(p, 100 * edges)
    which = np.searchsorted(edges[1:-1], p)
    count = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, weights=values, minlength=bins) for values in (p, there)]
    means = [np.divide(total, count, out=np.full(bins, np.nan), where=count > 0) for total in sums]
    return Reliability(edges, count, *means)


@dataclass(frozen=True)
class Brier:
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


def brier(
    probability: Float64[np.ndarray, " N"],
    label: Shaped[np.ndarray, " N"],
    known: Bool[np.ndarray, " N"] | None = None,
    *,
    bins: int = 15,
    spacing: str = "width",
) -> Brier:
    """The Brier score of one finding and its parts, NaN without known labels; arguments as in `reliability`."""
    known = np.ones(len(probability), bool) if known is None else np.asarray(known, bool)
    if not known.any():
        return Brier(math.nan, math.nan, math.nan, math.nan)
    diagram = reliability(probability, label, known, bins=bins, spacing=spacing)
    there = (np.asarray(label)[known] > 0).astype(np.float64)
    score = float(np.mean((np.asarray(probability, np.float64)[known] - there) ** 2))
    gaps = float(np.nansum(diagram.count * (diagram.observed - diagram.predicted) ** 2) / len(there))
    variance = float(there.mean() * (1 - there.mean()))
    return Brier(score, gaps, gaps + variance - score, variance)


def calibration(predictions: Predictions, *, bins: int = 15) -> list[dict[str, Any]]:
    """How well a table is calibrated, finding by finding and on average.

    Returns:
      Flat rows: finding, ece_width and ece_mass (expected calibration errors), brier, brier_reliability,
      brier_resolution, brier_uncertainty (equal width), known (labels counted), reason. The last row, `mean`, is the
      mean over findings that have known labels.
    """
    p, probability, rows = predictions, predictions.probability, []
    for k, finding in enumerate(p.findings):
        cells = (probability[:, k], p.label[:, k], p.known[:, k])
        errors = {f"ece_{spacing}": reliability(*cells, bins=bins, spacing=spacing).error for spacing in SPACINGS}
        parts = brier(*cells, bins=bins)
        known = int(p.known[:, k].sum())
        rows.append(
            {"finding": finding, **errors, "brier": parts.score, "brier_reliability": parts.reliability}
            | {"brier_resolution": parts.resolution, "brier_uncertainty": parts.uncertainty, "known": known}
            | {"reason": "" if known else "no known label"}
        )
    names = [name for name in rows[0] if name not in ("finding", "known", "reason")] if rows else []
    missing = [row["finding"] for row in rows if row["reason"]]
    mean = {name: mean_defined([row[name] for row in rows]) for name in names}
    words = f"left out: {', '.join(missing)} (no known label)" if missing else ""
    return [*rows, {"finding": "mean"} | mean | {"known": int(p.known.sum()), "reason": words}]
