"""Area under the ROC curve and average precision, exact, with ties, weights and unknown labels.

Everything here counts on a `Ranking`: the examples of one finding in falling order of their score. It is sorted once
and measured under any number of weightings, which makes the bootstrap of `intervals` cheap. A quantity that the labels
do not define is NaN, and `undefined` says why; it never is a number.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num, Shaped
from scipy.special import ndtr

from cxrjax.metrics.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Ranking:
    """The known examples of one finding in falling order of score; equal scores form one tie.

    Attributes:
      order: int[n], positions of the known examples.
      positive: int[P], positions of the positive ones, in the same order.
      before, through: int[P], how many known examples stand before a positive's tie, and up to its end.
      positives_before, positives_through: the same counts of positive examples only.
      reason: why nothing can be measured, empty if it can.
    """

    order: Int[np.ndarray, " n"]
    positive: Int[np.ndarray, " P"]
    before: Int[np.ndarray, " P"]
    through: Int[np.ndarray, " P"]
    positives_before: Int[np.ndarray, " P"]
    positives_through: Int[np.ndarray, " P"]
    reason: str = ""

    @classmethod
    def from_scores(
        cls,
        score: Float[np.ndarray, " N"],
        label: Shaped[np.ndarray, " N"],
        label_mask: Bool[np.ndarray, " N"] | None = None,
    ) -> "Ranking":
        """Rank one finding's examples.

        Args:
          score: higher means more likely positive; any increasing function of the probability.
          label: positive where it is true or 1; ignored where unknown.
          label_mask: which examples count; None means all.
        """
        label_mask = np.ones(len(score), bool) if label_mask is None else np.asarray(label_mask, bool)
        label = np.asarray(label) > 0
        reason = undefined_reason(label, label_mask) or (
            "a score is not a number" if np.isnan(score[label_mask]).any() else ""
        )
        rows = np.flatnonzero(label_mask)
        order = rows[np.argsort(-score[rows], kind="stable")]
        hit = np.flatnonzero(label[order])  # where the positives stand
        counts = np.append(0, np.cumsum(label[order]))
        first, last = _ties(score[order])
        before, through = first[hit], last[hit]
        return cls(order, order[hit], before, through, counts[before], counts[through], reason)

    def measure(self, weight: Num[np.ndarray, "N R"]) -> tuple[Float64[np.ndarray, " R"], Float64[np.ndarray, " R"]]:
        """Measure under R weightings at once.

        Args:
          weight: >= 0, how often each example counts. Integers are summed as integers of their own width.

        Returns:
          AUROC (the probability that a positive outranks a negative, ties counting half) and average precision (sum
          over ties of precision x gain in recall), both NaN where the weighted labels are of one class only.
        """
        if self.reason:
            nothing = np.full(weight.shape[1], np.nan)
            return nothing, nothing
        total, hits = _running(weight[self.order]), _running(weight[self.positive])
        all_before, all_through = total[self.before], total[self.through]
        hits_before, hits_through = hits[self.positives_before], hits[self.positives_through]
        negatives_above = ((all_before - hits_before) + (all_through - hits_through)) * 0.5
        gain = weight[self.positive].astype(np.float64)
        positives, negatives = hits[-1].astype(np.float64), (total[-1] - hits[-1]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc = 1 - (gain * negatives_above).sum(0) / (positives * negatives)
            precision = hits_through / np.maximum(all_through, np.finfo(np.float64).tiny)  # 0/0 has no gain either
            average_precision = (gain * precision).sum(0) / positives
        one_class = (positives <= 0) | (negatives <= 0)
        return np.where(one_class, np.nan, auroc), np.where(one_class, np.nan, average_precision)


class RocCurve(NamedTuple):
    """A receiver operating characteristic from (0, 0) to (1, 1): rates, and the score reached or exceeded there."""

    fpr: Float64[np.ndarray, " n"]
    tpr: Float64[np.ndarray, " n"]
    threshold: Float64[np.ndarray, " n"]


def undefined_reason(label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"]) -> str:
    """Why these labels define no ranking quality: a short reason, or an empty string if they do."""
    positives, count = int(np.count_nonzero(np.asarray(label)[label_mask] > 0)), int(np.count_nonzero(label_mask))
    if count == 0:
        return "no known label"
    if positives == 0:
        return "no positive example"
    return "no negative example" if positives == count else ""


def auroc(
    score: Float[np.ndarray, " N"],
    label: Shaped[np.ndarray, " N"],
    label_mask: Bool[np.ndarray, " N"] | None = None,
    weight: Num[np.ndarray, " N"] | None = None,
) -> float:
    """Area under the ROC curve of one finding: the probability that a positive outranks a negative, ties counting half.

    Args:
      score: any increasing function of the probability.
      label: positive where true or 1.
      label_mask: which examples count; None means all.
      weight: >= 0; None means 1 each.

    Returns:
      0 to 1, or NaN where `undefined` gives a reason.
    """
    return float(Ranking.from_scores(score, label, label_mask).measure(_weights(score, weight))[0][0])


def average_precision(
    score: Float[np.ndarray, " N"],
    label: Shaped[np.ndarray, " N"],
    label_mask: Bool[np.ndarray, " N"] | None = None,
    weight: Num[np.ndarray, " N"] | None = None,
) -> float:
    """Area under the precision-recall steps of one finding, 0 to 1 or NaN; arguments as in `auroc`."""
    return float(Ranking.from_scores(score, label, label_mask).measure(_weights(score, weight))[1][0])


def roc_curve(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> RocCurve | None:
    """The corners of one finding's ROC curve; points on a straight piece are left out. Arguments as in `auroc`.

    Returns:
      The curve, its first threshold infinite; None where `undefined` gives a reason.
    """
    ranking = Ranking.from_scores(score, label, label_mask)
    if ranking.reason:
        return None
    falling = score[ranking.order].astype(np.float64)
    ends = np.unique(_ties(falling)[1])
    hits = np.append(0, np.cumsum(np.asarray(label)[ranking.order] > 0)[ends - 1])
    misses = np.append(0, ends) - hits
    turns = np.diff(hits[1:]) * np.diff(misses[:-1]) != np.diff(hits[:-1]) * np.diff(misses[1:])
    corner = np.concatenate([[True], turns, [True]])
    return RocCurve(misses[corner] / misses[-1], hits[corner] / hits[-1], np.append(np.inf, falling[ends - 1])[corner])


def mean_auroc(
    logits: Float[np.ndarray, "N K"], labels: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
) -> float:
    """Mean AUROC over the findings that the known labels define, NaN if none does: for validation in training."""
    logits, labels, label_mask = np.asarray(logits), np.asarray(labels), np.asarray(label_mask)
    values = [auroc(logits[:, k], labels[:, k], label_mask[:, k]) for k in range(logits.shape[1])]
    return mean_defined(values)


def mean_defined(values: list[float]) -> float:
    """The mean of the values that are numbers; NaN if none is."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _ties(falling: Float[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """For each element of a sorted array, where its run of equal values begins and ends (exclusive)."""
    begins = np.append(True, falling[1:] != falling[:-1])[: len(falling)]
    run = np.cumsum(begins) - 1
    bounds = np.append(np.flatnonzero(begins), len(falling))
    return bounds[run], bounds[run + 1]


def _running(values: Num[np.ndarray, "n R"]) -> Num[np.ndarray, "n+1 R"]:
    """Running sums down the rows, starting at 0."""
    sums = np.zeros((len(values) + 1, values.shape[1]), values.dtype)
    np.cumsum(values, axis=0, dtype=values.dtype, out=sums[1:])
    return sums


def _weights(score: Float[np.ndarray, " N"], weight: Num[np.ndarray, " N"] | None) -> Num[np.ndarray, "N 1"]:
    return np.ones((len(score), 1), np.int64) if weight is None else np.asarray(weight, np.float64)[:, None]


def trapezoid_auc(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Area below the straight lines between the points of the empirical ROC curve; arguments as in `auc.auroc`."""
    curve = roc_curve(score, label, label_mask)
    return float("nan") if curve is None else float(np.trapezoid(curve.tpr, curve.fpr))


def binormal_auc(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Area under the ROC curve of two normal distributions with the scores' own means and standard deviations.

    Phi((mean_1 - mean_0) / sqrt(var_1 + var_0)), Phi being the normal distribution function (Pepe 2003, section 4.4.3).
    Unlike the others it depends on the scores' scale: give logits, which are nearer to normal than probabilities.

    Args:
      score: finite.
      label: positive where true or 1.
      label_mask: which examples count; None means all.

    Returns:
      0 to 1; NaN where a class has fewer than two examples or neither class varies.
    """
    label_mask = np.ones(len(score), bool) if label_mask is None else np.asarray(label_mask, bool)
    there = np.asarray(label) > 0
    groups = [score[label_mask & there].astype(np.float64), score[label_mask & ~there].astype(np.float64)]
    if min(map(len, groups)) < 2:
        return float("nan")
    largest = max(np.abs(group).max() for group in groups)
    if largest > 1e100:  # squares must not overflow; the area does not depend on the unit
        groups = [group / largest for group in groups]
    spread = np.sqrt(sum(group.var(ddof=1) for group in groups))
    return float(ndtr((groups[0].mean() - groups[1].mean()) / spread)) if spread > 0 else float("nan")


AUC_ESTIMATORS = {"trapezoid": trapezoid_auc, "mann_whitney": auroc, "binormal": binormal_auc}


def auc_report(predictions: Predictions) -> list[dict[str, Any]]:
    """All three for every finding and on average.

    Returns:
      Flat rows: finding, trapezoid, mann_whitney, binormal, reason (why the labels define none, else empty). The last
      row is the mean over the defined values; its `reason` counts the undefined ones.
    """
    p = predictions
    rows: list[dict[str, Any]] = [
        {"finding": finding}
        | {name: f(p.logit[:, k], p.label[:, k], p.label_mask[:, k]) for name, f in AUC_ESTIMATORS.items()}
        | {"reason": undefined_reason(p.label[:, k], p.label_mask[:, k])}
        for k, finding in enumerate(p.findings)
    ]
    missing = {name: sum(np.isnan(row[name]) for row in rows) for name in AUC_ESTIMATORS}
    words = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
    means = {name: mean_defined([row[name] for row in rows]) for name in AUC_ESTIMATORS}
    return [*rows, {"finding": "mean"} | means | {"reason": f"undefined: {words}" if words else ""}]
