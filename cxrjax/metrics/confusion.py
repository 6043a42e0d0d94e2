"""Exclusive classes: which was taken for which, and the report of each class against the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from cxrjax.errors import CxrError, check_choice
from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.thresholds import ConfusionCounts

REPORT_COLUMNS = (
    "sensitivity", "specificity", "ppv", "npv", "precision", "recall", "f1", "prevalence", "detection_rate",
    "detection_prevalence", "balanced_accuracy",
)  # fmt: skip
"""The columns of the per-class report, in the order of the six-class paper."""

_SAME = {"precision": "ppv", "recall": "sensitivity"}


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """How often each class was predicted as each.

    Attributes:
      classes: K names.
      matrix: int64[K, K], rows actual and columns predicted classes.
    """

    classes: tuple[str, ...]
    matrix: Int64[np.ndarray, "K K"]

    @classmethod
    def from_classes(cls, actual: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], classes: Sequence[str]) -> "ConfusionMatrix":
        """Count pairs of class numbers, each 0 to K - 1.

        Raises:
          CxrError: a number is of no class.
        """
        actual, predicted, count = np.asarray(actual), np.asarray(predicted), len(classes)
        for what, numbers in (("actual", actual), ("predicted", predicted)):
            if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
                raise CxrError(
                    f"confusion: {what} classes go from 0 to {count - 1}, not {numbers.min()} to {numbers.max()}"
                )
        cells = np.bincount(actual * count + predicted, minlength=count * count)
        return cls(tuple(classes), cells.reshape(count, count).astype(np.int64))

    @classmethod
    def from_predictions(cls, predictions: Predictions) -> "ConfusionMatrix":
        """Take the class with the highest logit as predicted; images without known labels are left out.

        Raises:
          CxrError: an image is known to be of no class or of several, or of only some classes.
        """
        p = predictions
        rows = p.label_mask.any(axis=1)
        wrong = np.flatnonzero(rows & ~(p.label_mask.all(axis=1) & ((p.label > 0).sum(axis=1) == 1)))
        if len(wrong):
            names = [
                f
                for f, there in zip(p.findings, (p.label > 0)[wrong[0]] & p.label_mask[wrong[0]], strict=True)
                if there
            ]
            raise CxrError(
                f"confusion: row {wrong[0] + 1} (id {p.id[wrong[0]]}) is labelled {' and '.join(names) or 'nothing'}; "
                "exclusive classes need exactly one, and all labels known"
            )
        return cls.from_classes(p.label[rows].argmax(axis=1), p.logit[rows].argmax(axis=1), p.findings)

    def oriented(self, rows: str = "actual") -> Int64[np.ndarray, "K K"]:
        """The matrix with "actual" classes as rows, or with "predicted" ones, as the six-class paper prints it.

        Raises:
          CxrError: neither of the two.
        """
        return (
            self.matrix
            if check_choice("rows of a confusion matrix", rows, ("actual", "predicted")) == "actual"
            else self.matrix.T
        )

    @property
    def counts(self) -> ConfusionCounts:
        """Each class against the rest."""
        tp, called, there = np.diag(self.matrix), self.matrix.sum(axis=0), self.matrix.sum(axis=1)
        return ConfusionCounts(tp=tp, fp=called - tp, fn=there - tp, tn=self.matrix.sum() - called - there + tp)

    @property
    def accuracy(self) -> float:
        """How many images were put into their class, 0 to 1; NaN without images."""
        total = self.matrix.sum()
        return float(np.trace(self.matrix) / total) if total else float("nan")

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes of the balanced accuracy of each against the rest; undefined ones are left out."""
        return mean_defined(list(self.counts.balanced_accuracy))

    def report(self) -> list[dict[str, Any]]:
        """A flat row per class: class, the columns of `REPORT` (0 to 1 or NaN), support."""
        counts = self.counts
        columns = {name: getattr(counts, _SAME.get(name, name)) for name in REPORT_COLUMNS}
        return [
            {"class": name}
            | {column: float(values[k]) for column, values in columns.items()}
            | {"support": int((counts.tp + counts.fn)[k])}
            for k, name in enumerate(self.classes)
        ]
