"""ROC AUC and average precision: exact, with ties, weights and unknown labels.

Everything here works on a `Ranking`: the examples of one finding in descending order of score. It is sorted once and
evaluated under any number of weightings, which makes the bootstrap cheap. A value that the labels do not define is NaN,
and `undefined_reason` says why.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num, Shaped
from scipy.special import ndtr

from cxrjax.metrics.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Ranking:
    """The labelled examples of one finding in descending order of score. Equal scores form a tie.

    Attributes:
      order: int[n], indices of the labelled examples.
      positive: int[P], indices of the positive ones, in the same order.
      before, through: int[P], the number of examples ranked before a positive's tie, and up to its end.
      positives_before, positives_through: the same counts over positive examples only.
      reason: why nothing can be computed, else empty.
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
        """Rank the examples of one finding. Arguments as in `auroc`; labels are ignored where `label_mask` is false."""
        label_mask = np.ones(len(score), bool) if label_mask is None else np.asarray(label_mask, bool)
        label = np.asarray(label) > 0
        reason = undefined_reason(label, label_mask) or (
            "a score is not a number" if np.isnan(score[label_mask]).any() else ""
        )
        rows = np.flatnonzero(label_mask)
        order = rows[np.argsort(-score[rows], kind="stable")]
        ranks = np.flatnonzero(label[order])  # of the positives
        counts = np.append(0, np.cumsum(label[order]))
        first, last = _tie_bounds(score[order])
        before, through = first[ranks], last[ranks]
        return cls(order, order[ranks], before, through, counts[before], counts[through], reason)

    def measure(self, weight: Num[np.ndarray, "N R"]) -> tuple[Float64[np.ndarray, " R"], Float64[np.ndarray, " R"]]:
        """Return AUROC and average precision under R weightings at once; NaN where the weighted labels have one class.

        AUROC is the probability that a positive outranks a negative; ties count half. Average precision is the sum over
        ties of precision times gain in recall. A weight, >= 0, is how often an example counts; integers are summed as
        integers of their own width.
        """
        if self.reason:
            nan = np.full(weight.shape[1], np.nan)
            return nan, nan
        total, positive = _prefix_sums(weight[self.order]), _prefix_sums(weight[self.positive])
        all_before, all_through = total[self.before], total[self.through]
        positive_before, positive_through = positive[self.positives_before], positive[self.positives_through]
        negatives_above = ((all_before - positive_before) + (all_through - positive_through)) * 0.5
        gain = weight[self.positive].astype(np.float64)
        positives, negatives = positive[-1].astype(np.float64), (total[-1] - positive[-1]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc = 1 - (gain * negatives_above).sum(0) / (positives * negatives)
            precision = positive_through / np.maximum(all_through, np.finfo(np.float64).tiny)  # 0/0 has zero gain
            average_precision = (gain * precision).sum(0) / positives
        one_class = (positives <= 0) | (negatives <= 0)
        return np.where(one_class, np.nan, auroc), np.where(one_class, np.nan, average_precision)


class RocCurve(NamedTuple):
    """An ROC curve from (0, 0) to (1, 1), and the score threshold of each point."""

    fpr: Float64[np.ndarray, " n"]
    tpr: Float64[np.ndarray, " n"]
    threshold: Float64[np.ndarray, " n"]


def undefined_reason(label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"]) -> str:
    """Return why these labels define no AUROC, or an empty string if they do."""
    positives, count = int(np.count_nonzero(np.asarray(label)[label_mask] > 0)), int(np.count_nonzero(label_mask))
    if count == 0:
        return "no known label"
    if positives == 0:
        return "no positive example"
    return "no negative example" if positives == count else ""


def auroc(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Return the area under the ROC curve: the probability that a positive outranks a negative; ties count half.

    Args:
      score: any increasing function of the probability.
      label: positive where true or 1.
      label_mask: which examples count; None means all.

    Returns:
      0 to 1, or NaN where `undefined_reason` gives a reason.
    """
    ranking = Ranking.from_scores(score, label, label_mask)
    return float(ranking.measure(np.ones((len(score), 1), np.int64))[0][0])


def roc_curve(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> RocCurve | None:
    """Return the ROC curve without collinear points, or None if it is undefined. Arguments as in `auroc`.

    The first threshold is infinite.
    """
    ranking = Ranking.from_scores(score, label, label_mask)
    if ranking.reason:
        return None
    descending = score[ranking.order].astype(np.float64)
    ends = np.unique(_tie_bounds(descending)[1])
    tp = np.append(0, np.cumsum(np.asarray(label)[ranking.order] > 0)[ends - 1])
    fp = np.append(0, ends) - tp
    turns = np.diff(tp[1:]) * np.diff(fp[:-1]) != np.diff(tp[:-1]) * np.diff(fp[1:])
    corner = np.concatenate([[True], turns, [True]])
    return RocCurve(fp[corner] / fp[-1], tp[corner] / tp[-1], np.append(np.inf, descending[ends - 1])[corner])


def mean_auroc(
    logits: Float[np.ndarray, "N K"], labels: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
) -> float:
    """Return the mean AUROC over the findings whose labels define it; NaN if none does."""
    logits, labels, label_mask = np.asarray(logits), np.asarray(labels), np.asarray(label_mask)
    return mean_defined([auroc(logits[:, k], labels[:, k], label_mask[:, k]) for k in range(logits.shape[1])])


def mean_defined(values: list[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _tie_bounds(ordered: Float[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return where each element's run of equal values starts and ends (exclusive) in a sorted array."""
    starts = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
    run = np.cumsum(starts) - 1
    bounds = np.append(np.flatnonzero(starts), len(ordered))
    return bounds[run], bounds[run + 1]


def _prefix_sums(values: Num[np.ndarray, "n R"]) -> Num[np.ndarray, "n+1 R"]:
    """Return cumulative sums down the rows, starting at 0."""
    sums = np.zeros((len(values) + 1, values.shape[1]), values.dtype)
    np.cumsum(values, axis=0, dtype=values.dtype, out=sums[1:])
    return sums


def trapezoid_auc(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Return the area under the empirical ROC curve by the trapezoidal rule. Arguments as in `auroc`."""
    curve = roc_curve(score, label, label_mask)
    return float("nan") if curve is None else float(np.trapezoid(curve.tpr, curve.fpr))


def binormal_auc(
    score: Float[np.ndarray, " N"], label: Shaped[np.ndarray, " N"], label_mask: Bool[np.ndarray, " N"] | None = None
) -> float:
    """Return the area under the binormal ROC curve fitted to the scores' means and variances.

    Phi((mean_1 - mean_0) / sqrt(var_1 + var_0)), Phi being the normal distribution function (Pepe 2003, section 4.4.3).
    Unlike the other estimators it depends on the scale of the scores: give logits, which are closer to normal than
    probabilities. Arguments as in `auroc`; scores must be finite.

    Returns:
      0 to 1; NaN where a class has fewer than two examples or neither class varies.
    """
    label_mask = np.ones(len(score), bool) if label_mask is None else np.asarray(label_mask, bool)
    positive = np.asarray(label) > 0
    groups = [score[label_mask & positive].astype(np.float64), score[label_mask & ~positive].astype(np.float64)]
    if min(map(len, groups)) < 2:
        return float("nan")
    largest = max(np.abs(group).max() for group in groups)
    if largest > 1e100:  # squares would overflow, and the area does not depend on the unit
        groups = [group / largest for group in groups]
    spread = np.sqrt(sum(group.var(ddof=1) for group in groups))
    return float(ndtr((groups[0].mean() - groups[1].mean()) / spread)) if spread > 0 else float("nan")


AUC_ESTIMATORS = {"trapezoid": trapezoid_auc, "mann_whitney": auroc, "binormal": binormal_auc}


def auc_report(predictions: Predictions) -> list[dict[str, Any]]:
    """Return the AUC of every finding by each of `AUC_ESTIMATORS`.

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
    reason = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
    means = {name: mean_defined([row[name] for row in rows]) for name in AUC_ESTIMATORS}
    return [*rows, {"finding": "mean"} | means | {"reason": f"undefined: {reason}" if reason else ""}]
