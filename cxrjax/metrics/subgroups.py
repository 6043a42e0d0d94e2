"""Is a model as good for everybody? AUROC by sex, age band and view, and the gaps between groups."""

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
from cxrjax.metrics.bootstrap import Interval, bootstrap_scores, percentile_interval
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN

UNKNOWN = "unknown"
"""The group of images whose attribute is not recorded; it is in no gap."""

AGES = (18, 40, 60, 80)
"""Where age bands begin, in years, after the first."""

OLDEST = 120
"""Ages above are errors of the records (ChestX-ray14 has some of 400 years) and count as unknown."""


@dataclass(frozen=True)
class Subgroups:
    """The two tables of `subgroups`.

    Attributes:
      groups: flat rows: attribute, group, finding, auroc, low, high, positives, negatives, images, patients, findings
        (1 or 0; for the mean how many entered it), reason.
      gaps: flat rows: attribute, finding, best and worst (groups), gap (difference of their AUROCs), low, high, reason.
    """

    groups: tuple[dict[str, Any], ...]
    gaps: tuple[dict[str, Any], ...]


def subgroup_attributes(records: Records, predictions: Predictions, ages: Sequence[float] = AGES) -> dict[str, np.ndarray]:
    """Sex, age band and view of the predicted images.

    Args:
      records: of the data set that was predicted.
      predictions: of some of its images.
      ages: where bands begin, in years, rising.

    Returns:
      "sex", "age" and "view", each str[N] in the predictions' order.

    Raises:
      CxrError: a predicted image is not in the records.
    """
    found = pc.index_in(pa.array(predictions.id), value_set=pa.array(records.id))  # pyright: ignore
    missing = found.is_null().to_numpy(zero_copy_only=False)
    if missing.any():
        first = predictions.id[missing][0]
        raise CxrError(f"{missing.sum():,} predicted images ({first}, ...) are not records of {records.dataset}")
    rows = found.to_numpy()
    text = {
        name: np.where(values == "", UNKNOWN, values) for name, values in (("sex", records.sex), ("view", records.view))
    }
    return {"sex": text["sex"][rows], "age": age_bands(records.age[rows], ages), "view": text["view"][rows]}


def age_bands(age: Float[np.ndarray, " N"], ages: Sequence[float] = AGES) -> np.ndarray:
    """The band of each age: "0-17", "18-39", ..., "80+", or `UNKNOWN`.

    Args:
      age: years, NaN unknown.
      ages: where bands begin, rising, above 0.

    Raises:
      CxrError: the bands do not rise.
    """
    if not ages or not all(low < high for low, high in zip((0, *ages), ages, strict=False)):
        raise CxrError(f"age bands begin at rising ages above 0, not {tuple(ages)}")
    starts = (0, *ages)
    names = [f"{low:g}-{high - 1:g}" for low, high in zip(starts, ages, strict=False)] + [f"{ages[-1]:g}+"]
    age = np.asarray(age, np.float64)
    usable = (age >= 0) & (age <= OLDEST)
    return np.where(usable, np.array(names)[np.searchsorted(ages, np.where(usable, age, 0), side="right")], UNKNOWN)


def score_subgroups(
    predictions: Predictions,
    attributes: Mapping[str, np.ndarray],
    *,
    least: int = 100,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Subgroups:
    """Score every group by itself, and its distance from the others on the same draws of patients.

    A gap lies between the best and the worst group, which are picked because they differ: with many groups some gap is
    always there, and its interval does not allow for the picking. The gap of the mean is over the findings that all
    compared groups define.

    Args:
      predictions: labelled predictions.
      attributes: name -> str[N], the group of each image.
      least: groups with fewer images are shown but are in no gap.
      resamples: draws of patients; 0 for no intervals.
      seed: of the draws.
      confidence: of the intervals.

    Raises:
      CxrError: an attribute does not fit the predictions, or a setting is out of range.
    """
    percentile_interval(np.zeros(1), confidence)
    if resamples < 0 or least < 1:
        raise CxrError(
            f"resamples={resamples}, least={least}: give at least 0 resamples and groups of at least 1 image"
        )
    rows: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for name, values in attributes.items():
        if np.shape(values) != (len(predictions),):
            raise CxrError(f"attribute {name} has shape {np.shape(values)}; give one group per predicted image")
        groups = [_Group.of(predictions, name, group, values == group) for group in np.unique(values)]
        measured = [group.measured(predictions.patient, resamples, seed) for group in groups]
        for group, (auroc, draws) in zip(groups, measured, strict=True):
            rows += group.rows(predictions.findings, auroc, draws, confidence)
        compared = [k for k, group in enumerate(groups) if group.images >= least and group.name != UNKNOWN]
        gaps += _gaps(name, predictions.findings, [(groups[k].name, *measured[k]) for k in compared], confidence)
    return Subgroups(tuple(rows), tuple(gaps))


@dataclass(frozen=True, eq=False)
class _Group:
    attribute: str
    name: str
    rankings: tuple[Ranking, ...]
    images: int
    patients: int

    @classmethod
    def of(cls, p: Predictions, attribute: str, name: str, inside: np.ndarray) -> "_Group":
        rankings = (
            Ranking.from_scores(p.logit[:, k], p.label[:, k], p.label_mask[:, k] & inside) for k in range(len(p.findings))
        )
        return cls(attribute, str(name), tuple(rankings), int(inside.sum()), len(np.unique(p.patient[inside])))

    def measured(
        self, patient: np.ndarray, resamples: int, seed: int
    ) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, "R K"]]:
        """AUROC of each finding, and of each draw of all patients, so that draws of all groups are paired."""
        every = np.ones((len(patient), 1), np.int64)
        auroc = np.array([ranking.measure(every)[0][0] for ranking in self.rankings])
        if resamples == 0:
            return auroc, np.zeros((0, len(auroc)))
        return auroc, bootstrap_scores(self.rankings, patient, resamples=resamples, seed=seed)[0]

    def rows(
        self, findings: Sequence[str], auroc: Float64[np.ndarray, " K"], draws: Float64[np.ndarray, "R K"], level: float
    ) -> list[dict[str, Any]]:
        head = {"attribute": self.attribute, "group": self.name}
        size = {"images": self.images, "patients": self.patients}
        rows = []
        for k, (finding, ranking) in enumerate(zip(findings, self.rankings, strict=True)):
            positives = len(ranking.positive)
            rows.append(
                head | {"finding": finding, "auroc": float(auroc[k])} | _bounds(draws[:, k], level)
                | {"positives": positives, "negatives": len(ranking.order) - positives} | size
                | {"findings": int(not ranking.reason), "reason": ranking.reason}
            )  # fmt: skip
        defined = ~np.isnan(auroc)
        missing = [row["finding"] for row in rows if row["reason"]]
        mean = {"finding": MEAN, "auroc": mean_defined(list(auroc))} | _bounds(_mean(draws[:, defined]), level)
        counts = {"positives": None, "negatives": None} | size | {"findings": int(defined.sum())}
        return [*rows, head | mean | counts | {"reason": f"left out: {', '.join(missing)}" if missing else ""}]


def _gaps(
    attribute: str,
    findings: Sequence[str],
    groups: Sequence[tuple[str, Float64[np.ndarray, " K"], Float64[np.ndarray, "R K"]]],
    level: float,
) -> list[dict[str, Any]]:
    """The best less the worst of some groups, for each finding and for the mean."""
    shared = ~np.isnan([auroc for _, auroc, _ in groups]).any(axis=0) if groups else np.zeros(len(findings), bool)
    columns = [(finding, [k]) for k, finding in enumerate(findings)] + [(MEAN, np.flatnonzero(shared).tolist())]
    rows = []
    for finding, wanted in columns:
        values = [(float(np.mean(auroc[wanted])), name, draws) for name, auroc, draws in groups if wanted]
        values = sorted((value for value in values if not math.isnan(value[0])), key=lambda value: value[:2])
        if len(values) < 2:
            empty = {"best": "", "worst": "", "gap": math.nan, "low": math.nan, "high": math.nan}
            reason = "fewer than two groups that define it"
            rows.append({"attribute": attribute, "finding": finding} | empty | {"reason": reason})
            continue
        (low, worst, low_draws), (high, best, high_draws) = values[0], values[-1]
        between = _mean(high_draws[:, wanted]) - _mean(low_draws[:, wanted])
        found = {"best": best, "worst": worst, "gap": high - low} | _bounds(between, level)
        rows.append({"attribute": attribute, "finding": finding} | found | {"reason": ""})
    return rows


def _mean(draws: Float64[np.ndarray, "R K"]) -> Float64[np.ndarray, " R"]:
    return draws.mean(axis=1) if draws.shape[1] else np.full(len(draws), np.nan)


def _bounds(draws: Float64[np.ndarray, " R"], level: float) -> dict[str, float]:
    spread = percentile_interval(draws, level) if len(draws) else Interval(math.nan, math.nan)
    return {"low": spread.low, "high": spread.high}
