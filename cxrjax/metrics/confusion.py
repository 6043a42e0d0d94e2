"""Confusion matrices of exclusive classes, and the report of each class against the rest."""

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

_SYNONYMS = {"precision": "ppv", "recall": "sensitivity"}


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """How often each class was predicted as each class.

    Attributes:
      classes: K names.
      matrix: int64[K, K], rows are actual and columns predicted classes.
    """

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
        """Return the matrix with "actual" or "predicted" classes as rows; the six-class paper prints the latter.

        Raises:
          CxrError: neither of the two.
        """
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
