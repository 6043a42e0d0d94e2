"""Three estimators of the area under the ROC curve: trapezoid, Mann-Whitney and binormal."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.special import ndtr

from cxrjax.evaluate.auc import auroc, mean_defined, roc_curve, undefined
from cxrjax.evaluate.predictions import Predictions


def trapezoid(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], known: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Area below the straight lines between the points of the empirical ROC curve; arguments as in `auc.auroc`."""
    curve = roc_curve(score, label, known)
    return float("nan") if curve is None else float(np.trapezoid(curve.tpr, curve.fpr))


def binormal(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], known: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Area under the ROC curve of two normal distributions with the scores' own means and standard deviations.

    Phi((mean_1 - mean_0) / sqrt(var_1 + var_0)), Phi being the normal distribution function (Pepe 2003, section 4.4.3).
    Unlike the others it depends on the scores' scale: give logits, which are nearer to normal than probabilities.

    Args:
      score: finite.
      label: positive where true or 1.
      known: which examples count; None means all.

    Returns:
      0 to 1; NaN where a class has fewer than two examples or neither class varies.
    """
    known = np.ones(len(score), bool) if known is None else np.asarray(known, bool)
    there = np.asarray(label) > 0
    groups = [score[known & there].astype(np.float64), score[known & ~there].astype(np.float64)]
    if min(map(len, groups)) < 2:
        return float("nan")
    largest = max(np.abs(group).max() for group in groups)
    if largest > 1e100:  # squares must not overflow; the area does not depend on the unit
        groups = [group / largest for group in groups]
    spread = np.sqrt(sum(group.var(ddof=1) for group in groups))
    return float(ndtr((groups[0].mean() - groups[1].mean()) / spread)) if spread > 0 else float("nan")


ESTIMATORS = {"trapezoid": trapezoid, "mann_whitney": auroc, "binormal": binormal}


def estimate(predictions: Predictions) -> list[dict[str, Any]]:
    """All three for every finding and on average.

    Returns:
      Flat rows: finding, trapezoid, mann_whitney, binormal, reason (why the labels define none, else empty). The last
      row is the mean over the defined values; its `reason` counts the undefined ones.
    """
    p = predictions
    rows: list[dict[str, Any]] = [
        {"finding": finding}
        | {name: f(p.logit[:, k], p.label[:, k], p.known[:, k]) for name, f in ESTIMATORS.items()}
        | {"reason": undefined(p.label[:, k], p.known[:, k])}
        for k, finding in enumerate(p.findings)
    ]
    missing = {name: sum(np.isnan(row[name]) for row in rows) for name in ESTIMATORS}
    words = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
    means = {name: mean_defined([row[name] for row in rows]) for name in ESTIMATORS}
    return [*rows, {"finding": "mean"} | means | {"reason": f"undefined: {words}" if words else ""}]
