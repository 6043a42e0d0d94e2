"""Scores of a prediction table: AUROC and average precision per finding and on average, with intervals."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import BootstrapResult, Interval, check_confidence, percentile_interval
from cxrjax.metrics.predictions import Predictions

MEAN = "mean"
"""The `finding` of the row with the mean over findings."""


@dataclass(frozen=True)
class Score:
    """The scores of one finding, or their mean over the findings that define them.

    Attributes:
      finding: its name, or `MEAN`.
      auroc, average_precision: 0 to 1; NaN where undefined.
      auroc_interval, average_precision_interval: None if not requested or if the value is undefined.
      positives, negatives: the number of known labels of each class; None for the mean.
      findings: 1 if defined, else 0; for the mean, the number of findings averaged.
      reason: why a value is NaN or leaves out some tables, or which findings the mean leaves out; else empty.
    """

    finding: str
    auroc: float
    average_precision: float
    auroc_interval: Interval | None
    average_precision_interval: Interval | None
    positives: int | None
    negatives: int | None
    findings: int
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """Return the scores as one flat row; NaN where there is no value."""
        row: dict[str, Any] = {"finding": self.finding}
        for name, interval in (("auroc", self.auroc_interval), ("average_precision", self.average_precision_interval)):
            row[name] = getattr(self, name)
            row[f"{name}_low"] = math.nan if interval is None else interval.low
            row[f"{name}_high"] = math.nan if interval is None else interval.high
        interval = self.auroc_interval  # average precision is undefined in the same draws
        return row | {
            "positives": self.positives,
            "negatives": self.negatives,
            "findings": self.findings,
            "undefined_resamples": 0 if interval is None else interval.undefined,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Scores:
    """The scores of all findings, their mean, and the settings of the intervals.

    Attributes:
      findings: one score each, in the order of the predictions.
      mean: the mean over the defined findings; its intervals come from the means of the draws.
      images, patients: their number in all tables. If equal, each image was resampled by itself.
      resamples, seed, confidence: of the bootstrap; 0 resamples means no intervals.
    """

    findings: tuple[Score, ...]
    mean: Score
    images: int
    patients: int
    resamples: int
    seed: int
    confidence: float

    def rows(self) -> list[dict[str, Any]]:
        """Return flat rows, the mean last; NaN where there is no value."""
        return [score.row() for score in (*self.findings, self.mean)]

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON: NaN becomes None."""
        head = {name: getattr(self, name) for name in ("images", "patients", "resamples", "seed", "confidence")}
        return head | {"scores": [{key: _nullable(value) for key, value in row.items()} for row in self.rows()]}


def score(predictions: Predictions, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95) -> Scores:
    """Score a prediction table, each finding on the images whose label is known.

    Args:
      predictions: of a model or an ensemble.
      resamples: draws of patients for the intervals; 0 for none.
      seed: of the draws; tables of the same patients get the same draws.
      confidence: level of the intervals.

    Raises:
      CxrError: a negative number of resamples or seed, or a confidence that is not between 0 and 1.
    """
    check_confidence(confidence)  # before the bootstrap
    result = BootstrapResult.from_tables([predictions], resamples=resamples, seed=seed)
    return scores_from_bootstrap(result, confidence=confidence)


def scores_from_bootstrap(result: BootstrapResult, *, confidence: float = 0.95) -> Scores:
    """Return a model's scores; with several tables, the means over the tables that define them.

    Args:
      result: without draws there are no intervals.
      confidence: level of the intervals.

    Raises:
      CxrError: the confidence is not between 0 and 1.
    """
    defined: np.ndarray = np.any(result.defined, axis=0)
    value = np.array([[mean_defined(column) for column in metric.T.tolist()] for metric in result.value])
    intervals: list[list[Interval | None]] = [[None, None] for _ in defined]
    mean_interval: list[Interval | None] = [None, None]
    if result.resamples:
        for i, draws in enumerate(result.draws):
            by_finding = [draws[result.defined[:, k], :, k].mean(axis=0) for k in np.flatnonzero(defined)]
            for k, values in zip(np.flatnonzero(defined), by_finding, strict=True):
                intervals[k][i] = percentile_interval(values, confidence)
            if by_finding:  # every draw has the same findings
                mean_interval[i] = percentile_interval(np.mean(by_finding, axis=0), confidence)

    positives, negatives = _label_counts(result)
    findings = tuple(
        Score(
            finding, float(value[0, k]), float(value[1, k]), *intervals[k], positives=int(positives[k]),
            negatives=int(negatives[k]), findings=int(defined[k]), reason=_reason([row[k] for row in result.reasons]),
        )
        for k, finding in enumerate(result.findings)
    )  # fmt: skip
    left_out = [f"{s.finding} ({s.reason})" for s in findings if not s.findings]
    mean = Score(
        MEAN, mean_defined(value[0].tolist()), mean_defined(value[1].tolist()), *mean_interval, positives=None,
        negatives=None, findings=int(defined.sum()), reason=f"left out: {', '.join(left_out)}" if left_out else "",
    )  # fmt: skip
    tables = result.unique_tables
    images, patients = sum(map(len, tables)), sum(len(np.unique(table.patient)) for table in tables)
    return Scores(findings, mean, images, patients, result.resamples, result.seed, confidence)


def _label_counts(result: BootstrapResult) -> tuple[np.ndarray, np.ndarray]:
    """Return each finding's numbers of positive and negative labels, counting every image once."""
    positives = np.asarray(sum((table.label_mask & (table.label > 0)).sum(0) for table in result.unique_tables))
    return positives, np.asarray(sum(table.label_mask.sum(0) for table in result.unique_tables)) - positives


def _reason(reasons: list[str]) -> str:
    """Return why a finding is undefined, or defined by some tables only."""
    undefined = [reason for reason in reasons if reason]
    if not undefined or len(undefined) == len(reasons):
        return undefined[0] if undefined else ""
    return f"{undefined[0]} in {len(undefined)} of {len(reasons)} test sets"


def _nullable(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
