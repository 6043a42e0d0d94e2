"""Do two models differ? On average by paired bootstrap over patients, finding by finding by DeLong's test.

A model may come as several tables, one a fold or a training seed: its AUROC is then the mean over them (see `sample`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.evaluate.delong import Estimate, delong
from cxrjax.evaluate.ensemble import align
from cxrjax.evaluate.intervals import interval
from cxrjax.evaluate.multiplicity import holm
from cxrjax.evaluate.predictions import Predictions
from cxrjax.evaluate.sample import Sample, same_images, strata
from cxrjax.findings import positions


@dataclass(frozen=True)
class Difference:
    """Mean AUROC of one model less that of another.

    Attributes:
      value: the difference.
      low, high: its percentile interval.
      left_out: findings that some table's labels leave undefined.
      each: the difference in each table (fold or seed) by itself.
    """

    value: float
    low: float
    high: float
    left_out: tuple[str, ...] = ()
    each: tuple[float, ...] = ()

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
      first: tables of one model, one a fold or a training seed; their AUROCs are averaged.
      second: tables of the other, each of the same images and patients as that of `first`.
      findings: over which AUROC is averaged; both models must have them. Those that the labels leave undefined are
        left out, and named in the result.
      resamples: draws of patients.
      seed: of the draws.
      confidence: share of the draws that the interval holds.

    Raises:
      CxrError: the tables are of different images, or a finding is missing.
    """
    one, other = (
        Sample.of([table.select(findings) for table in tables], resamples=resamples, seed=seed)
        for tables in (first, second)
    )
    return sampled_difference(one, other, findings, confidence=confidence)


def sampled_difference(
    first: Sample, second: Sample, findings: Sequence[str], *, confidence: float = 0.95
) -> Difference:
    """`difference` of models that were measured before, on the same draws.

    Raises:
      CxrError: the samples are of different images or draws, or a finding is missing.
    """
    alike = (first.resamples, first.seed, len(first.tables)) == (second.resamples, second.seed, len(second.tables))
    if not (alike and all(map(same_images, first.tables, second.tables))):
        raise CxrError("models can only be compared on the same images in the same order: predict the same part")
    places = [np.array(positions(findings, sample.findings)) for sample in (first, second)]
    defined: np.ndarray = np.all(first.defined[:, places[0]] & second.defined[:, places[1]], axis=0)
    left_out = tuple(finding for finding, there in zip(findings, defined, strict=True) if not there)
    if not defined.any():
        return Difference(math.nan, math.nan, math.nan, left_out)
    columns = [of[defined] for of in places]
    gaps = first.value[0][:, columns[0]].mean(1) - second.value[0][:, columns[1]].mean(1)
    draws = [sample.draws[0][:, :, of].mean((0, 2)) for sample, of in zip((first, second), columns, strict=True)]
    spread = interval(draws[0] - draws[1], confidence)
    return Difference(float(gaps.mean()), spread.low, spread.high, left_out, tuple(map(float, gaps)))


def by_finding(
    first: Predictions | Sequence[Predictions],
    second: Predictions | Sequence[Predictions],
    *,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Test every finding for a difference in AUROC between two models, images of a patient being one unit.

    Args:
      first: predictions of one model, or several tables as in `difference`: folds are then independent of each other,
        and training seeds share their patients.
      second: of the other; each table of the same images and findings as that of `first`, in any order.
      confidence: of the intervals, each finding by itself.

    Returns:
      A flat row per finding: finding, first and second (the AUROCs), difference (first less second), low, high, z, p
      (two-sided, see `delong`), p_holm (adjusted for the number of findings that could be tested), reason (why a value
      is NaN, else empty).

    Raises:
      CxrError: the tables differ in images, findings, patients or labels.
    """
    firsts, seconds = ([tables] if isinstance(tables, Predictions) else list(tables) for tables in (first, second))
    if len(firsts) != len(seconds) or not firsts:
        raise CxrError(f"models with {len(firsts)} and {len(seconds)} tables of predictions cannot be compared")
    pairs = [align([one, other]) for one, other in zip(firsts, seconds, strict=True)]
    findings = pairs[0][0].findings
    pairs = [[table.select(findings) for table in pair] for pair in pairs]
    stratum = strata([pair[0] for pair in pairs])
    groups = [[pair for pair, of in zip(pairs, stratum, strict=True) if of == number] for number in set(stratum)]
    rows: list[dict[str, Any]] = []
    for k, finding in enumerate(findings):
        parts = [_contrast(group, k, len(pairs)) for group in groups]
        reason = next((reason for *_, reason in parts if reason), "")
        gap = Estimate(sum(part[0].value for part in parts), math.sqrt(sum(part[0].error ** 2 for part in parts)))
        low, high = gap.interval(confidence)
        rows.append(
            {"finding": finding, "first": sum(part[1] for part in parts), "second": sum(part[2] for part in parts)}
            | {"difference": gap.value, "low": low, "high": high, "z": gap.z, "p": gap.p, "reason": reason}
        )
    adjusted = holm(np.array([row["p"] for row in rows]))
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _contrast(pairs: Sequence[Sequence[Predictions]], k: int, tables: int) -> tuple[Estimate, float, float, str]:
    """What tables of the same images add to means over all `tables`: the difference, both AUROCs, why they are NaN."""
    one = pairs[0][0]
    scores = np.stack([table.logit[:, k] for pair in pairs for table in pair])
    areas = delong(scores, one.label[:, k], one.known[:, k], one.patient)
    weights = np.tile([1.0, -1.0], len(pairs)) / tables
    first, second = areas.auroc[::2].sum() / tables, areas.auroc[1::2].sum() / tables
    return areas.contrast(weights), float(first), float(second), areas.reason
