"""How good a table of predictions is: AUROC and average precision per finding and on average, with intervals."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxrjax.evaluate.auc import Ranking, mean_defined
from cxrjax.evaluate.intervals import Interval, bootstrap, interval
from cxrjax.evaluate.predictions import Predictions

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
      reason: why a value is NaN, or which findings the mean leaves out; else empty.
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
      images, patients: how many there are. As many patients as images means that each image was drawn by itself.
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
    interval(np.zeros(1), confidence)  # a bad confidence is refused before the work, not after
    p = predictions
    rankings = [Ranking.of(p.logit[:, k], p.label[:, k], p.known[:, k]) for k in range(len(p.findings))]
    every = np.ones((len(p), 1), np.int64)
    auroc, average_precision = np.array([np.concatenate(ranking.measure(every)) for ranking in rankings]).T
    defined = np.array([not ranking.reason for ranking in rankings])

    spreads: list[list[Interval | None]] = [[None, None] for _ in rankings]
    mean_spread: list[Interval | None] = [None, None]
    if resamples != 0:
        draws = bootstrap(rankings, p.patient, resamples=resamples, seed=seed)
        for i, values in enumerate(draws):
            for k in np.flatnonzero(defined):
                spreads[k][i] = interval(values[:, k], confidence)
            if defined.any():  # the same findings in each draw
                mean_spread[i] = interval(values[:, defined].mean(axis=1), confidence)

    findings = tuple(
        Score(
            finding, float(auroc[k]), float(average_precision[k]), *spreads[k],
            positives=len(ranking.positive), negatives=len(ranking.order) - len(ranking.positive),
            findings=int(defined[k]), reason=ranking.reason,
        )
        for k, (finding, ranking) in enumerate(zip(p.findings, rankings, strict=True))
    )  # fmt: skip
    left_out = [f"{s.finding} ({s.reason})" for s in findings if s.reason]
    mean = Score(
        MEAN, mean_defined(auroc), mean_defined(average_precision), *mean_spread, positives=None, negatives=None,
        findings=int(defined.sum()), reason=f"left out: {', '.join(left_out)}" if left_out else "",
    )  # fmt: skip
    return Scores(findings, mean, len(p), len(np.unique(p.patient)), resamples, seed, confidence)


def _nullable(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
