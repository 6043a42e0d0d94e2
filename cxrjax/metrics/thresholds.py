"""Decisions: thresholds chosen on validation, counts and rates, and the confusion matrix of exclusive classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Shaped
from scipy.special import expit

from cxrjax.errors import CxrError, check_choice
from cxrjax.metrics.auc import Ranking, mean_defined, roc_curve
from cxrjax.metrics.predictions import Predictions

RULES = ("youden", "sensitivity", "specificity")
"""Rules for choosing a threshold; see `choose_thresholds`."""

RATES = ("sensitivity", "specificity", "ppv", "npv", "accuracy", "f1")


@dataclass(frozen=True, eq=False)
class ConfusionCounts:
    """Confusion counts of K findings, and the rates computed from them: 0 to 1, NaN where the denominator is 0.

    Attributes:
      tp, fp, fn, tn: int[K], true positives, false positives, false negatives, true negatives.
    """

    tp: Int[np.ndarray, " K"]
    fp: Int[np.ndarray, " K"]
    fn: Int[np.ndarray, " K"]
    tn: Int[np.ndarray, " K"]

    @classmethod
    def from_decisions(
        cls, predicted: Bool[np.ndarray, "N K"], label: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
    ) -> "ConfusionCounts":
        """Count decisions against labels (positive where true or 1) where the mask is true."""
        actual = np.asarray(label) > 0
        cells = (predicted & actual, predicted & ~actual, ~predicted & actual, ~predicted & ~actual)
        return cls(*(np.count_nonzero(cell & label_mask, axis=0) for cell in cells))

    def rates(self) -> dict[str, Float64[np.ndarray, " K"]]:
        """Return the rates by name, as defined by the R package caret, whose report the six-class paper prints."""
        tp, fp, fn, tn = self.tp, self.fp, self.fn, self.tn
        total = tp + fp + fn + tn
        sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
        return {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": _ratio(tp, tp + fp),
            "npv": _ratio(tn, tn + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
            "accuracy": _ratio(tp + tn, total),
            "prevalence": _ratio(tp + fn, total),
            "detection_rate": _ratio(tp, total),
            "detection_prevalence": _ratio(tp + fp, total),
            "balanced_accuracy": (sensitivity + specificity) / 2,
        }


def _ratio(numerator: Int[np.ndarray, " K"], denominator: Int[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    nan = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=nan, where=np.asarray(denominator) > 0)


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """One threshold per finding: an image is positive if its logit is at least the threshold.

    Attributes:
      findings: K names.
      threshold: f64[K], logits; infinite if nothing is positive, NaN if the labels allow no choice.
      reason: K reasons why a threshold is NaN, else empty.
      rule: how they were chosen, for display.
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
        """Return the confusion counts of a table; all 0 for a finding without a threshold."""
        table = predictions.select(self.findings)
        mask = table.label_mask & ~np.isnan(self.threshold)
        return ConfusionCounts.from_decisions(table.logit >= self.threshold, table.label, mask)

    def apply(self, predictions: Predictions) -> list[dict[str, Any]]:
        """Evaluate the thresholds on a table.

        Returns:
          Flat rows: finding, threshold (a probability), sensitivity, specificity, ppv, npv, accuracy, f1, tp, fp, fn,
          tn, reason. NaN where there is no threshold or nothing to count.

        Raises:
          CxrError: the table lacks a finding.
        """
        counts = self.counts(predictions)
        rates = counts.rates()
        return [
            {"finding": finding, "threshold": float(self.probability[k])}
            | {rate: float(rates[rate][k]) for rate in RATES}
            | {cell: int(getattr(counts, cell)[k]) for cell in ("tp", "fp", "fn", "tn")}
            | {"reason": self.reason[k]}
            for k, finding in enumerate(self.findings)
        ]


def choose_thresholds(validation: Predictions, rule: str = "youden", target: float = 0.9) -> OperatingPoints:
    """Choose each finding's threshold on validation. Chosen on test images, its results would be too good.

    Args:
      validation: labelled predictions.
      rule: "youden", the highest sensitivity + specificity - 1 (Youden 1950), the highest threshold among ties;
        "sensitivity", the highest threshold with at least `target` sensitivity; "specificity", the lowest threshold
        with at least `target` specificity.
      target: above 0 to 1, for the last two.

    Raises:
      CxrError: no such rule, or a target out of range.
    """
    check_choice("rule for operating points", rule, RULES)
    if not 0 < target <= 1:
        raise CxrError(f"target={target}: give a fraction above 0 up to 1, such as 0.9")
    p, thresholds, reasons = validation, [], []
    for k in range(len(p.findings)):
        score, label, mask = p.logit[:, k], p.label[:, k], p.label_mask[:, k]
        reasons.append(Ranking.from_scores(score, label, mask).reason)
        if reasons[-1]:
            thresholds.append(math.nan)
        elif rule == "youden":
            curve = roc_curve(score, label, mask)
            thresholds.append(curve.threshold[np.argmax(curve.tpr - curve.fpr)])  # pyright: ignore - it is defined
        elif rule == "sensitivity":
            descending = np.sort(score[mask & (label > 0)])[::-1]
            thresholds.append(descending[_at_least(target, len(descending)) - 1])
        else:
            ascending = np.sort(score[mask & (label <= 0)])
            thresholds.append(np.nextafter(ascending[_at_least(target, len(ascending)) - 1], np.inf))
    description = "youden" if rule == "youden" else f"{rule} >= {target:g}"
    return OperatingPoints(p.findings, np.array(thresholds), tuple(reasons), description)


def accuracy_at_half(predictions: Predictions) -> float:
    """Return the accuracy over all known labels of all findings at a probability of 0.5; 0 to 1, or NaN."""
    correct = (predictions.logit >= 0) == (predictions.label > 0)
    return float(correct[predictions.label_mask].mean()) if predictions.label_mask.any() else math.nan


def _at_least(fraction: float, count: int) -> int:
    """Return the smallest part of `count` that is at least `fraction` of it, tolerating rounding of the product."""
    return max(1, math.ceil(fraction * count - 1e-9))


REPORT_COLUMNS = (
    "sensitivity", "specificity", "ppv", "npv", "precision", "recall", "f1", "prevalence", "detection_rate",
    "detection_prevalence", "balanced_accuracy",
)  # fmt: skip
"""The columns of the per-class report, in the order of the six-class paper."""

_SYNONYMS = {"precision": "ppv", "recall": "sensitivity"}


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """How often each class was predicted as each class: rows are actual, columns predicted classes."""

    classes: tuple[str, ...]
    matrix: Int64[np.ndarray, "K K"]

    @classmethod
    def from_classes(
        cls, actual: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], classes: Sequence[str]
    ) -> "ConfusionMatrix":
        """Count pairs of class indices, each 0 to K - 1.

        Raises:
          CxrError: an index is out of range.
        """
        actual, predicted, count = np.asarray(actual), np.asarray(predicted), len(classes)
        for name, indices in (("actual", actual), ("predicted", predicted)):
            if len(indices) and not (indices.min() >= 0 and indices.max() < count):
                raise CxrError(
                    f"confusion: {name} classes go from 0 to {count - 1}, not {indices.min()} to {indices.max()}"
                )
        cells = np.bincount(actual * count + predicted, minlength=count * count)
        return cls(tuple(classes), cells.reshape(count, count).astype(np.int64))

    @classmethod
    def from_predictions(cls, predictions: Predictions) -> "ConfusionMatrix":
        """Take the class with the highest logit as predicted. Images without known labels are skipped.

        Raises:
          CxrError: an image has no class or several, or only some of its labels are known.
        """
        p, positive = predictions, (predictions.label > 0) & predictions.label_mask
        rows = p.label_mask.any(axis=1)
        wrong = np.flatnonzero(rows & ~(p.label_mask.all(axis=1) & (positive.sum(axis=1) == 1)))
        if len(wrong):
            names = [p.findings[k] for k in np.flatnonzero(positive[wrong[0]])]
            raise CxrError(
                f"confusion: row {wrong[0] + 1} (id {p.id[wrong[0]]}) is labelled {' and '.join(names) or 'nothing'}; "
                "exclusive classes need exactly one, and all labels known"
            )
        return cls.from_classes(p.label[rows].argmax(axis=1), p.logit[rows].argmax(axis=1), p.findings)

    def oriented(self, rows: str = "actual") -> Int64[np.ndarray, "K K"]:
        """Return the matrix with "actual" or "predicted" classes as rows; the six-class paper prints the latter."""
        check_choice("rows of a confusion matrix", rows, ("actual", "predicted"))
        return self.matrix if rows == "actual" else self.matrix.T

    @property
    def counts(self) -> ConfusionCounts:
        """The counts of each class against the rest."""
        tp, predicted, actual = np.diag(self.matrix), self.matrix.sum(axis=0), self.matrix.sum(axis=1)
        tn = self.matrix.sum() - predicted - actual + tp
        return ConfusionCounts(tp=tp, fp=predicted - tp, fn=actual - tp, tn=tn)

    @property
    def accuracy(self) -> float:
        """The fraction of images in the right class, 0 to 1; NaN without images."""
        total = self.matrix.sum()
        return float(np.trace(self.matrix) / total) if total else float("nan")

    @property
    def balanced_accuracy(self) -> float:
        """The mean over classes of the balanced accuracy of each against the rest; undefined ones are left out."""
        return mean_defined(list(self.counts.rates()["balanced_accuracy"]))

    def report(self) -> list[dict[str, Any]]:
        """Return a flat row per class: class, the columns of `REPORT_COLUMNS` (0 to 1 or NaN), support."""
        counts = self.counts
        rates = counts.rates()
        columns = {name: rates[_SYNONYMS.get(name, name)] for name in REPORT_COLUMNS}
        return [
            {"class": name}
            | {column: float(values[k]) for column, values in columns.items()}
            | {"support": int((counts.tp + counts.fn)[k])}
            for k, name in enumerate(self.classes)
        ]
