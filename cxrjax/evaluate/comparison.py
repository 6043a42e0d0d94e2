"""Do two models differ? On average by paired bootstrap over patients, finding by finding by DeLong's test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import Ranking
from cxrjax.evaluate.delong import delong
from cxrjax.evaluate.ensemble import align
from cxrjax.evaluate.intervals import bootstrap, interval
from cxrjax.evaluate.multiplicity import holm
from cxrjax.evaluate.predictions import Predictions
from cxrjax.findings import positions


@dataclass(frozen=True)
class Difference:
    """Mean AUROC of one model less that of another, its percentile interval, and the findings left out as undefined."""

    value: float
    low: float
    high: float
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        without = f", without {', '.join(self.left_out)} (one class only)" if self.left_out else ""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}){without}"


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
      findings: over which AUROC is averaged; both models must have them. Those that the labels leave undefined are
        left out, and named in the result.
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
    defined = [f for f in findings if not any(_ranking(table, f).reason for table in (*first, *second))]
    left_out = tuple(finding for finding in findings if finding not in defined)
    if not defined:
        return Difference(math.nan, math.nan, math.nan, left_out)
    values, draws = zip(*(_mean_auroc(tables, defined, resamples, seed) for tables in (first, second)), strict=True)
    spread = interval(draws[0] - draws[1], confidence)
    return Difference(float(values[0] - values[1]), spread.low, spread.high, left_out)


def by_finding(first: Predictions, second: Predictions, *, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Test every finding for a difference in AUROC between two models, images of a patient being one unit.

    Args:
      first: predictions of one model.
      second: of the other; the same images and findings in any order.
      confidence: of the intervals, each finding by itself.

    Returns:
      A flat row per finding: finding, first and second (the AUROCs), difference (first less second), low, high, z, p
      (two-sided, see `delong`), p_holm (adjusted for the number of findings that could be tested), reason (why a value
      is NaN, else empty).

    Raises:
      CxrError: the tables differ in images, findings, patients or labels.
    """
    first, second = align([first, second])
    rows: list[dict[str, Any]] = []
    for k, finding in enumerate(first.findings):
        scores = np.stack([first.logit[:, k], second.logit[:, k]])
        areas = delong(scores, first.label[:, k], first.known[:, k], first.patient)
        gap = areas.difference()
        low, high = gap.interval(confidence)
        rows.append(
            {"finding": finding, "first": float(areas.auroc[0]), "second": float(areas.auroc[1])}
            | {"difference": gap.value, "low": low, "high": high, "z": gap.z, "p": gap.p, "reason": areas.reason}
        )
    adjusted = holm(np.array([row["p"] for row in rows]))
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _ranking(table: Predictions, finding: str) -> Ranking:
    [k] = positions([finding], table.findings)
    return Ranking.of(table.logit[:, k], table.label[:, k], table.known[:, k])


def _mean_auroc(
    tables: Sequence[Predictions], findings: Sequence[str], resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """Mean over tables and findings, of the sample and of each draw."""
    values, draws = [], []
    for table in tables:
        rankings = [_ranking(table, finding) for finding in findings]
        every = np.ones((len(table), 1), np.int64)
        values.append([ranking.measure(every)[0][0] for ranking in rankings])
        draws.append(bootstrap(rankings, table.patient, resamples=resamples, seed=seed)[0])
    return float(np.mean(values)), np.mean(draws, axis=(0, 2))
