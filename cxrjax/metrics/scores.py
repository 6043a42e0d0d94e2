"""How good a table of predictions is: AUROC and average precision per finding and on average, with intervals."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import Interval, BootstrapResult, percentile_interval
from cxrjax.metrics.predictions import Predictions

MEAN = "mean"
"""The `finding` of the row that holds the mean over findings."""


@dataclass(frozen=True)
class Score:
    """One row: a finding, or the mean over those findings whose value is defined.

    Attributes:
      finding: its name, or `MEAN`.
      auroc, average_precision: 0 to 1; NaN where undefined.
      auroc_interval, average_precision_interval: None where none was asked for or the value is undefined.
      positives, negatives: how many known labels are so; None for the mean.
      findings: how many findings the row speaks for: 1 or 0, and for the mean how many entered it.
      reason: why a value is NaN or is not of all test parts, or which findings the mean leaves out; else empty.
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
        """The score as one flat row; NaN where there is no value."""
        row: dict[str, Any] = {"finding": self.finding}
        for name, spread in (("auroc", self.auroc_interval), ("average_precision", self.average_precision_interval)):
            row[name] = getattr(self, name)
            row[f"{name}_low"] = math.nan if spread is None else spread.low
            row[f"{name}_high"] = math.nan if spread is None else spread.high
        spread = self.auroc_interval  # average precision is undefined in the same draws
        return row | {
            "positives": self.positives,
            "negatives": self.negatives,
            "findings": self.findings,
            "undefined_resamples": 0 if spread is None else spread.undefined,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Scores:
    """The rows of all findings, their mean, and what the intervals were made of.

    Attributes:
      findings: one score each, in the order of the predictions.
      mean: the mean over the findings that are defined; its intervals come from the means of the draws.
      images, patients: how many there are in all tables. As many patients as images means that each image was drawn
        by itself.
      resamples, seed, confidence: of the bootstrap; resamples 0 means no intervals.
    """

    findings: tuple[Score, ...]
    mean: Score
    images: int
    patients: int
    resamples: int
    seed: int
    confidence: float

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows, the findings' and then the mean's; NaN where there is no value."""
        return [score.row() for score in (*self.findings, self.mean)]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: NaN becomes None."""
        head = {name: getattr(self, name) for name in ("images", "patients", "resamples", "seed", "confidence")}
        return head | {"scores": [{key: _nullable(value) for key, value in row.items()} for row in self.rows()]}


def score(predictions: Predictions, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95) -> Scores:
    """Score a table of predictions, each finding on the images whose label is known.

    Args:
      predictions: any model's, or an ensemble's.
      resamples: draws of patients for the intervals; 0 for none.
      seed: of the draws; tables of the same patients are drawn alike.
      confidence: share of the draws that an interval holds.

    Raises:
      CxrError: a negative number of resamples or seed, or a confidence that is not between 0 and 1.
    """
    percentile_interval(np.zeros(1), confidence)  # a bad confidence is refused before the work, not after
    return scores_from_bootstrap(BootstrapResult.from_tables([predictions], resamples=resamples, seed=seed), confidence=confidence)


def scores_from_bootstrap(sample: BootstrapResult, *, confidence: float = 0.95) -> Scores:
    """Score a model that was measured on one table or on several: values are means over the tables that define them.

    Args:
      sample: the model's tables, measured; without draws there are no intervals.
      confidence: share of the draws that an interval holds.

    Raises:
      CxrError: the confidence is not between 0 and 1.
    """
    defined = sample.defined
    some: np.ndarray = np.any(defined, axis=0)
    value = np.array([[mean_defined(of_finding) for of_finding in of.T.tolist()] for of in sample.value])
    spreads: list[list[Interval | None]] = [[None, None] for _ in some]
    mean_spread: list[Interval | None] = [None, None]
    if sample.resamples:
        for i, of in enumerate(sample.draws):
            drawn = [of[defined[:, k], :, k].mean(axis=0) for k in np.flatnonzero(some)]
            for k, values in zip(np.flatnonzero(some), drawn, strict=True):
                spreads[k][i] = percentile_interval(values, confidence)
            if drawn:  # the same findings in each draw
                mean_spread[i] = percentile_interval(np.mean(drawn, axis=0), confidence)

    positives, negatives = _counts(sample)
    findings = tuple(
        Score(
            finding, float(value[0, k]), float(value[1, k]), *spreads[k], positives=int(positives[k]),
            negatives=int(negatives[k]), findings=int(some[k]), reason=_reason([row[k] for row in sample.reasons]),
        )
        for k, finding in enumerate(sample.findings)
    )  # fmt: skip
    left_out = [f"{s.finding} ({s.reason})" for s in findings if not s.findings]
    mean = Score(
        MEAN, mean_defined(value[0].tolist()), mean_defined(value[1].tolist()), *mean_spread, positives=None,
        negatives=None, findings=int(some.sum()), reason=f"left out: {', '.join(left_out)}" if left_out else "",
    )  # fmt: skip
    images, patients = sum(map(len, sample.distinct)), sum(len(np.unique(table.patient)) for table in sample.distinct)
    return Scores(findings, mean, images, patients, sample.resamples, sample.seed, confidence)


def _counts(sample: BootstrapResult) -> tuple[np.ndarray, np.ndarray]:
    """Known positive and negative labels of each finding, every image once."""
    positives = sum((table.label_mask & (table.label > 0)).sum(0) for table in sample.distinct)
    label_mask = sum(table.label_mask.sum(0) for table in sample.distinct)
    return np.asarray(positives), np.asarray(label_mask) - np.asarray(positives)


def _reason(reasons: list[str]) -> str:
    """Why a finding has no value, or has one of some tables only."""
    why = [reason for reason in reasons if reason]
    if not why or len(why) == len(reasons):
        return why[0] if why else ""
    return f"{why[0]} in {len(why)} of {len(reasons)} test parts"


def _nullable(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
