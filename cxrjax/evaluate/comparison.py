"""Do two models differ? Paired bootstrap over patients: both are measured on the same draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import Ranking
from cxrjax.evaluate.intervals import bootstrap, interval
from cxrjax.evaluate.predictions import Predictions
from cxrjax.findings import positions


@dataclass(frozen=True)
class Difference:
    """Mean AUROC of one model less that of another, and its percentile interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def difference(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    findings: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Mean AUROC of `first` less that of `second` over some findings, on the same patients.

    Args:
      first: tables of one model, one a training seed; their AUROCs are averaged.
      second: tables of the other, of the same images and patients.
      findings: over which AUROC is averaged; both models must have them.
      resamples: draws of patients.
      seed: of the draws.
      confidence: share of the draws that the interval holds.

    Raises:
      CxrError: the tables are of different images, or a finding is missing.
    """
    everyone = first[0].patient
    for table in (*first, *second):
        if not (np.array_equal(table.id, first[0].id) and np.array_equal(table.patient, everyone)):
            raise CxrError("models can only be compared on the same images in the same order: predict the same part")
    values, draws = zip(*(_mean_auroc(tables, findings, resamples, seed) for tables in (first, second)), strict=True)
    spread = interval(draws[0] - draws[1], confidence)
    return Difference(float(values[0] - values[1]), spread.low, spread.high)


def _mean_auroc(
    tables: Sequence[Predictions], findings: Sequence[str], resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """Mean over tables and findings, of the sample and of each draw."""
    values, draws = [], []
    for table in tables:
        columns = positions(findings, table.findings)
        rankings = [Ranking.of(table.logit[:, k], table.label[:, k], table.known[:, k]) for k in columns]
        every = np.ones((len(table), 1), np.int64)
        values.append([ranking.measure(every)[0][0] for ranking in rankings])
        draws.append(bootstrap(rankings, table.patient, resamples=resamples, seed=seed)[0])
    return float(np.mean(values)), np.mean(draws, axis=(0, 2))
