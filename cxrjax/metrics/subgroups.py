"""Subgroup analysis: AUROC by sex, age band and view, and the gaps between groups."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float64

from cxrjax.data.records import Records
from cxrjax.errors import CxrError
from cxrjax.metrics.auc import Ranking, mean_defined
from cxrjax.metrics.bootstrap import Interval, bootstrap_scores, check_confidence, percentile_interval
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN

UNKNOWN = "unknown"
"""The group of images without a recorded attribute; it enters no gap."""

AGES = (18, 40, 60, 80)
"""The ages, in years, at which bands start, after the first."""

MAX_AGE = 120
"""Higher ages are errors (ChestX-ray14 has some of 400 years) and count as unknown."""


@dataclass(frozen=True)
class Subgroups:
    """The two tables of `score_subgroups`.

    Attributes:
      groups: flat rows: attribute, group, finding, auroc, low, high, positives, negatives, images, patients, findings
        (1 if defined, else 0; for the mean, the number averaged), reason.
      gaps: flat rows: attribute, finding, best and worst (groups), gap (difference of their AUROCs), low, high, reason.
    """

    groups: tuple[dict[str, Any], ...]
    gaps: tuple[dict[str, Any], ...]


def subgroup_attributes(
    records: Records, predictions: Predictions, ages: Sequence[float] = AGES
) -> dict[str, np.ndarray]:
    """Return the sex, age band and view of the predicted images.

    Args:
      records: of the predicted data set.
      predictions: of some of its images.
      ages: where age bands start, in years, ascending.

    Returns:
      "sex", "age" and "view", each str[N] in the order of the predictions.

    Raises:
      CxrError: a predicted image is not in the records.
    """
    indices = pc.index_in(pa.array(predictions.id), value_set=pa.array(records.id))  # pyright: ignore
    missing = indices.is_null().to_numpy(zero_copy_only=False)
    if missing.any():
        first = predictions.id[missing][0]
        raise CxrError(f"{missing.sum():,} predicted images ({first}, ...) are not records of {records.dataset}")
    rows = indices.to_numpy()
    sex, view = (np.where(values == "", UNKNOWN, values)[rows] for values in (records.sex, records.view))
    return {"sex": sex, "age": age_bands(records.age[rows], ages), "view": view}


def age_bands(age: Float[np.ndarray, " N"], ages: Sequence[float] = AGES) -> np.ndarray:
    """Return the band of each age: "0-17", "18-39", ..., "80+", or `UNKNOWN`.

    Args:
      age: years, NaN if unknown.
      ages: where bands start, ascending, above 0.

    Raises:
      CxrError: the bands do not ascend.
    """
    if not ages or not all(low < high for low, high in zip((0, *ages), ages, strict=False)):
        raise CxrError(f"age bands {tuple(ages)} must start at ascending ages above 0")
    starts = (0, *ages)
    names = [f"{low:g}-{high - 1:g}" for low, high in zip(starts, ages, strict=False)] + [f"{ages[-1]:g}+"]
    age = np.asarray(age, np.float64)
    usable = (age >= 0) & (age <= MAX_AGE)
    return np.where(usable, np.array(names)[np.searchsorted(ages, np.where(usable, age, 0), side="right")], UNKNOWN)


def score_subgroups(
    predictions: Predictions,
    attributes: Mapping[str, np.ndarray],
    *,
    min_images: int = 100,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Subgroups:
    """Score every group, and the gaps between groups on the same draws of patients.

    A gap is that between the best and the worst group. These are selected for being different, so with many groups
    there always is some gap, and its interval does not correct for the selection. The gap of the mean is over the
    findings that all compared groups define.

    Args:
      predictions: labelled predictions.
      attributes: name -> str[N], the group of each image.
      min_images: smaller groups are scored but enter no gap.
      resamples: draws of patients; 0 for no intervals.
      seed: of the draws.
      confidence: level of the intervals.

    Raises:
      CxrError: an attribute does not fit the predictions, or a setting is out of range.
    """
    check_confidence(confidence)
    if resamples < 0 or min_images < 1:
        raise CxrError(f"resamples={resamples}, min_images={min_images}: give at least 0 resamples and 1 image")
    rows: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for name, values in attributes.items():
        if np.shape(values) != (len(predictions),):
            raise CxrError(f"attribute {name} has shape {np.shape(values)}; give one group per predicted image")
        groups = [_Group.from_mask(predictions, name, group, values == group) for group in np.unique(values)]
        scores = [group.score(predictions.patient, resamples, seed) for group in groups]
        for group, (auroc, draws) in zip(groups, scores, strict=True):
            rows += group.rows(predictions.findings, auroc, draws, confidence)
        compared = [k for k, group in enumerate(groups) if group.images >= min_images and group.name != UNKNOWN]
        gaps += _gaps(name, predictions.findings, [(groups[k].name, *scores[k]) for k in compared], confidence)
    return Subgroups(tuple(rows), tuple(gaps))


@dataclass(frozen=True, eq=False)
class _Group:
    attribute: str
    name: str
    rankings: tuple[Ranking, ...]
    images: int
    patients: int

    @classmethod
    def from_mask(cls, p: Predictions, attribute: str, name: str, mask: np.ndarray) -> "_Group":
        rankings = tuple(
            Ranking.from_scores(p.logit[:, k], p.label[:, k], p.label_mask[:, k] & mask) for k in range(len(p.findings))
        )
        return cls(attribute, str(name), rankings, int(mask.sum()), len(np.unique(p.patient[mask])))

    def score(
        self, patient: np.ndarray, resamples: int, seed: int
    ) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, "R K"]]:
        """Return the AUROC of each finding, and of each draw from all patients, so that groups' draws are paired."""
        ones = np.ones((len(patient), 1), np.int64)
        auroc = np.array([ranking.measure(ones)[0][0] for ranking in self.rankings])
        if resamples == 0:
            return auroc, np.zeros((0, len(auroc)))
        return auroc, bootstrap_scores(self.rankings, patient, resamples=resamples, seed=seed)[0]

    def rows(
        self,
        findings: Sequence[str],
        auroc: Float64[np.ndarray, " K"],
        draws: Float64[np.ndarray, "R K"],
        confidence: float,
    ) -> list[dict[str, Any]]:
        """Return a flat row per finding, and the mean."""
        head = {"attribute": self.attribute, "group": self.name}
        size = {"images": self.images, "patients": self.patients}
        rows = []
        for k, (finding, ranking) in enumerate(zip(findings, self.rankings, strict=True)):
            positives = len(ranking.positive)
            rows.append(
                head | {"finding": finding, "auroc": float(auroc[k])} | _bounds(draws[:, k], confidence)
                | {"positives": positives, "negatives": len(ranking.order) - positives} | size
                | {"findings": int(not ranking.reason), "reason": ranking.reason}
            )  # fmt: skip
        defined = ~np.isnan(auroc)
        missing = [row["finding"] for row in rows if row["reason"]]
        mean = {"finding": MEAN, "auroc": mean_defined(list(auroc))} | _bounds(_mean(draws[:, defined]), confidence)
        counts = {"positives": None, "negatives": None} | size | {"findings": int(defined.sum())}
        return [*rows, head | mean | counts | {"reason": f"left out: {', '.join(missing)}" if missing else ""}]


def _gaps(
    attribute: str,
    findings: Sequence[str],
    groups: Sequence[tuple[str, Float64[np.ndarray, " K"], Float64[np.ndarray, "R K"]]],
    confidence: float,
) -> list[dict[str, Any]]:
    """Return the best minus the worst group for each finding and for the mean."""
    shared = ~np.isnan([auroc for _, auroc, _ in groups]).any(axis=0) if groups else np.zeros(len(findings), bool)
    columns_of = [(finding, [k]) for k, finding in enumerate(findings)] + [(MEAN, np.flatnonzero(shared).tolist())]
    rows = []
    for finding, columns in columns_of:
        scores = [(float(np.mean(auroc[columns])), name, draws) for name, auroc, draws in groups if columns]
        scores = sorted((score for score in scores if not math.isnan(score[0])), key=lambda score: score[:2])
        row = {"best": "", "worst": "", "gap": math.nan, "low": math.nan, "high": math.nan}
        reason = "fewer than two groups that define it"
        if len(scores) >= 2:
            (low, worst, low_draws), (high, best, high_draws) = scores[0], scores[-1]
            gap_draws = _mean(high_draws[:, columns]) - _mean(low_draws[:, columns])
            row = {"best": best, "worst": worst, "gap": high - low} | _bounds(gap_draws, confidence)
            reason = ""
        rows.append({"attribute": attribute, "finding": finding} | row | {"reason": reason})
    return rows


def _mean(draws: Float64[np.ndarray, "R K"]) -> Float64[np.ndarray, " R"]:
    return draws.mean(axis=1) if draws.shape[1] else np.full(len(draws), np.nan)


def _bounds(draws: Float64[np.ndarray, " R"], confidence: float) -> dict[str, float]:
    interval = percentile_interval(draws, confidence) if len(draws) else Interval(math.nan, math.nan)
    return {"low": interval.low, "high": interval.high}
