"""Yes or no from a score: thresholds chosen on validation, and how they do elsewhere."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Shaped
from scipy.special import expit, logit

from cxrjax.errors import CxrError, check_choice
from cxrjax.metrics.auc import Ranking, roc_curve
from cxrjax.metrics.predictions import Predictions

RULES = ("youden", "sensitivity", "specificity")
"""Ways to choose a threshold; see `choose`."""

RATES = ("sensitivity", "specificity", "ppv", "npv", "accuracy", "f1")


@dataclass(frozen=True, eq=False)
class ConfusionCounts:
    """How often K findings were called and there, called and absent, missed, and rightly not called.

    The rates are fractions from 0 to 1, NaN where nothing was there to count. Their names and definitions are those of
    the R package caret, whose report the six-class paper prints.

    Attributes:
      tp, fp, fn, tn: int[K], true positives, false positives, false negatives, true negatives.
    """

    tp: Int[np.ndarray, " K"]
    fp: Int[np.ndarray, " K"]
    fn: Int[np.ndarray, " K"]
    tn: Int[np.ndarray, " K"]

    @classmethod
    def from_decisions(
        cls, called: Bool[np.ndarray, "N K"], label: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
    ) -> "ConfusionCounts":
        """Count calls against labels (positive where true or 1) over the known ones."""
        there = np.asarray(label) > 0
        kinds = (called & there, called & ~there, ~called & there, ~called & ~there)
        return cls(*(np.count_nonzero(kind & label_mask, axis=0) for kind in kinds))

    @property
    def total(self) -> Int[np.ndarray, " K"]:
        """All that was counted."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def sensitivity(self) -> Float64[np.ndarray, " K"]:
        """Of what is there, how much was called; also known as recall."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Float64[np.ndarray, " K"]:
        """Of what is absent, how much was not called."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def ppv(self) -> Float64[np.ndarray, " K"]:
        """Of what was called, how much is there: positive predictive value, also known as precision."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def npv(self) -> Float64[np.ndarray, " K"]:
        """Of what was not called, how much is absent: negative predictive value."""
        return _ratio(self.tn, self.tn + self.fn)

    @property
    def f1(self) -> Float64[np.ndarray, " K"]:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> Float64[np.ndarray, " K"]:
        """How much was called or not called rightly."""
        return _ratio(self.tp + self.tn, self.total)

    @property
    def prevalence(self) -> Float64[np.ndarray, " K"]:
        """How much is there."""
        return _ratio(self.tp + self.fn, self.total)

    @property
    def detection_rate(self) -> Float64[np.ndarray, " K"]:
        """How much was called and is there, of all."""
        return _ratio(self.tp, self.total)

    @property
    def detection_prevalence(self) -> Float64[np.ndarray, " K"]:
        """How much was called, of all."""
        return _ratio(self.tp + self.fp, self.total)

    @property
    def balanced_accuracy(self) -> Float64[np.ndarray, " K"]:
        """Mean of sensitivity and specificity."""
        return (self.sensitivity + self.specificity) / 2


def _ratio(part: Int[np.ndarray, " K"], whole: Int[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """One threshold per finding: an image is called positive where its logit is at least that.

    Attributes:
      findings: K names.
      threshold: f64[K], logits; infinite where nothing is called, NaN where the labels allowed no choice.
      reason: K words, why a threshold is NaN, else empty.
      rule: what they were chosen by, in words.
    """

    findings: tuple[str, ...]
    threshold: Float64[np.ndarray, " K"]
    reason: tuple[str, ...]
    rule: str

    @property
    def probability(self) -> Float64[np.ndarray, " K"]:
        """The thresholds as probabilities."""
        return expit(self.threshold)

    def counts(self, predictions: Predictions) -> ConfusionCounts:
        """Right and wrong calls of a table; nothing is counted of a finding without a threshold."""
        table = predictions.select(self.findings)
        return ConfusionCounts.from_decisions(table.logit >= self.threshold, table.label, table.label_mask & ~np.isnan(self.threshold))

    def apply(self, predictions: Predictions) -> list[dict[str, Any]]:
        """How these thresholds do on a table, a flat row per finding.

        Returns:
          finding, threshold (a probability), sensitivity, specificity, ppv, npv, accuracy, f1, tp, fp, fn, tn, reason;
          NaN where there is no threshold or nothing to count.

        Raises:
          CxrError: the table lacks a finding.
        """
        counts = self.counts(predictions)
        return [
            {"finding": finding, "threshold": float(self.probability[k])}
            | {rate: float(getattr(counts, rate)[k]) for rate in RATES}
            | {kind: int(getattr(counts, kind)[k]) for kind in ("tp", "fp", "fn", "tn")}
            | {"reason": self.reason[k]}
            for k, finding in enumerate(self.findings)
        ]


def choose_thresholds(validation: Predictions, rule: str = "youden", target: float = 0.9) -> OperatingPoints:
    """Choose each finding's threshold on validation; on test images it would flatter.

    Args:
      validation: labelled predictions.
      rule: "youden", the highest sensitivity + specificity - 1 (Youden 1950), of equals the highest threshold;
        "sensitivity", the highest threshold that finds at least `target` of the positives; "specificity", the lowest
        that leaves at least `target` of the negatives alone.
      target: above 0 to 1, for the last two.

    Raises:
      CxrError: no such rule, or a target out of range.
    """
    check_choice("rule for operating points", rule, RULES)
    if not 0 < target <= 1:
        raise CxrError(f"target={target}: give a fraction above 0 up to 1, such as 0.9")
    p, thresholds, reasons = validation, [], []
    for k in range(len(p.findings)):
        score, label, label_mask = p.logit[:, k], p.label[:, k], p.label_mask[:, k]
        reasons.append(Ranking.from_scores(score, label, label_mask).reason)
        if reasons[-1]:
            thresholds.append(math.nan)
        elif rule == "youden":
            curve = roc_curve(score, label, label_mask)
            thresholds.append(curve.threshold[np.argmax(curve.tpr - curve.fpr)])  # pyright: ignore - it is defined
        elif rule == "sensitivity":
            falling = np.sort(score[label_mask & (label > 0)])[::-1]
            thresholds.append(falling[_at_least(target, len(falling)) - 1])
        else:
            rising = np.sort(score[label_mask & (label <= 0)])
            thresholds.append(np.nextafter(rising[_at_least(target, len(rising)) - 1], np.inf))
    words = "youden" if rule == "youden" else f"{rule} >= {target:g}"
    return OperatingPoints(p.findings, np.array(thresholds), tuple(reasons), words)


def accuracy_at_threshold(predictions: Predictions, threshold: float = 0.5) -> float:
    """How many of all known labels, whatever their finding, a threshold on the probability gets right; 0 to 1, or NaN.

    Raises:
      CxrError: the threshold is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise CxrError(f"threshold={threshold}: give a probability between 0 and 1, such as 0.5")
    right = (predictions.logit >= logit(threshold)) == (predictions.label > 0)
    return float(right[predictions.label_mask].mean()) if predictions.label_mask.any() else math.nan


def _at_least(fraction: float, count: int) -> int:
    """The smallest number of `count` that is at least that fraction, whatever the product is rounded to."""
    return max(1, math.ceil(fraction * count - 1e-9))
