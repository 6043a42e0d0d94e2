"""Subgroups and sources: AUROC by sex, age band and view, gaps between groups, and what the source alone predicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Shaped, UInt8
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxrjax.data.records import Records
from cxrjax.errors import CxrError
from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import BootstrapResult, Interval, check_confidence, percentile_interval
from cxrjax.metrics.predictions import Predictions, logits_from_probabilities
from cxrjax.metrics.scores import MEAN, scores_from_bootstrap
from cxrjax.metrics.tables import find_rows

UNKNOWN = "unknown"
"""The group of images without a recorded attribute; it enters no gap."""

AGES = (18, 40, 60, 80)
"""The ages, in years, at which bands start, after the first at 0."""

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


def subgroup_attributes(records: Records, predictions: Predictions) -> dict[str, np.ndarray]:
    """Return "sex", "age" (band) and "view" of the predicted images, each str[N] in the order of the predictions.

    Raises:
      CxrError: a predicted image is not in the records.
    """
    rows, missing = find_rows(predictions.id, records.id)
    if len(missing):
        raise CxrError(f"{len(missing):,} predicted images ({missing[0]}, ...) are not records of {records.dataset}")
    sex, view = (np.where(values == "", UNKNOWN, values)[rows] for values in (records.sex, records.view))
    return {"sex": sex, "age": age_bands(records.age[rows]), "view": view}


def age_bands(age: Float[np.ndarray, " N"]) -> np.ndarray:
    """Return the band of each age in years: "0-17", "18-39", ..., "80+", or `UNKNOWN` (also for NaN)."""
    names = [f"{low}-{high - 1}" for low, high in pairwise((0, *AGES))] + [f"{AGES[-1]}+"]
    age = np.asarray(age, np.float64)
    usable = (age >= 0) & (age <= MAX_AGE)
    return np.where(usable, np.array(names)[np.searchsorted(AGES, np.where(usable, age, 0), side="right")], UNKNOWN)


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
    for attribute, values in attributes.items():
        if np.shape(values) != (len(predictions),):
            raise CxrError(f"attribute {attribute} has shape {np.shape(values)}; give one group per predicted image")
        compared = []
        for group in np.unique(values):
            mask = values == group
            table = replace(predictions, label_mask=predictions.label_mask & mask[:, None])
            # Patients are drawn from all groups, so that the draws of different groups are paired.
            result = BootstrapResult.from_tables([table], resamples=resamples, seed=seed)
            head = {"attribute": attribute, "group": str(group)}
            size = {"images": int(mask.sum()), "patients": len(np.unique(predictions.patient[mask]))}
            rows += [head | row for row in _group_rows(result, size, confidence)]
            if size["images"] >= min_images and group != UNKNOWN:
                compared.append((str(group), result.value[0, 0], result.draws[0, 0]))
        gaps += [{"attribute": attribute} | row for row in _gaps(predictions.findings, compared, confidence)]
    return Subgroups(tuple(rows), tuple(gaps))


def _group_rows(result: BootstrapResult, size: dict[str, int], confidence: float) -> list[dict[str, Any]]:
    """Return the rows of one group: each finding, and the mean."""
    auroc, draws = result.value[0, 0], result.draws[0, 0]
    rows = [
        {"finding": score.finding, "auroc": score.auroc} | _bounds(draws[:, k], confidence)
        | {"positives": score.positives, "negatives": score.negatives} | size
        | {"findings": score.findings, "reason": score.reason}
        for k, score in enumerate(scores_from_bootstrap(replace(result, resamples=0)).findings)
    ]  # fmt: skip
    defined = ~np.isnan(auroc)
    missing = [finding for finding, reason in zip(result.findings, result.reasons[0], strict=True) if reason]
    mean = {"finding": MEAN, "auroc": mean_defined(list(auroc))} | _bounds(_mean(draws[:, defined]), confidence)
    counts = {"positives": None, "negatives": None} | size | {"findings": int(defined.sum())}
    return [*rows, mean | counts | {"reason": f"left out: {', '.join(missing)}" if missing else ""}]


def _gaps(
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
        rows.append({"finding": finding} | row | {"reason": reason})
    return rows


def _mean(draws: Float64[np.ndarray, "R K"]) -> Float64[np.ndarray, " R"]:
    return draws.mean(axis=1) if draws.shape[1] else np.full(len(draws), np.nan)


def _bounds(draws: Float64[np.ndarray, " R"], confidence: float) -> dict[str, float]:
    interval = percentile_interval(draws, confidence) if len(draws) else Interval(math.nan, math.nan)
    return {"low": interval.low, "high": interval.high}


OTHER_SOURCES = "other sources"
"""The name of the pooled sources that have too few patients."""


def border_pixels(images: UInt8[np.ndarray, "N H W"]) -> Float32[np.ndarray, "N F"]:
    """Return the outer pixels of each image, 0 to 1: those within 5 % of the side from an edge, at least one.

    The border shows hardly any lung, so what can be predicted from it is not a finding.
    """
    height, width = images.shape[1:]
    dy, dx = max(1, round(0.05 * height)), max(1, round(0.05 * width))
    border = np.ones((height, width), bool)
    border[dy : height - dy, dx : width - dx] = False
    return images[:, border].astype(np.float32) / 255


def pool_rare_sources(source: np.ndarray, patient: np.ndarray, min_patients: int = 10) -> np.ndarray:
    """Return str[N] sources, with those of fewer than `min_patients` patients pooled, unless all would be."""
    names = np.asarray(source, np.str_)
    rare = [name for name in np.unique(names) if len(np.unique(patient[names == name])) < min_patients]
    if len(rare) == len(np.unique(names)):
        return names
    return np.where(np.isin(names, rare), OTHER_SOURCES, names)


def predict_source(
    features: Float[np.ndarray, "N F"], source: np.ndarray, *, id: np.ndarray, patient: np.ndarray
) -> Predictions:
    """Predict each image's source from its features, in five-fold cross-validation over patients.

    The model is scikit-learn's logistic regression on standardised features. The AUROC of the result (`scores.score`)
    tells how well the source can be recognised: 0.5 not at all, 1 always.

    Args:
      features: finite.
      source: str[N], at least two sources.
      id: str[N], names of the images.
      patient: str[N]; there are fewer folds if a source has fewer patients.

    Returns:
      A table whose findings are the sources; of two sources, the second only.

    Raises:
      CxrError: there is only one source, or one with a single patient.
    """
    names, number = np.unique(source, return_inverse=True)
    if len(names) < 2:
        raise CxrError(f"images come from {len(names)} source ({', '.join(names)}): at least 2 are needed")
    patients = {str(name): len(np.unique(patient[source == name])) for name in names}
    rarest = min(patients, key=lambda name: patients[name])
    folds = min(5, patients[rarest])
    if folds < 2:
        raise CxrError(f"source {rarest} has a single patient: cross-validation needs at least 2; pool it with others")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    probability = np.full((len(number), len(names)), np.nan)
    for train, test in splitter.split(features, number, patient):
        if len(np.unique(number[train])) < len(names):
            raise CxrError(f"source {rarest} has too few patients to be in every fold: pool it with others")
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        probability[test] = model.fit(features[train], number[train]).predict_proba(features[test])
    first = 1 if len(names) == 2 else 0
    label = number[:, None] == np.arange(first, len(names))
    return Predictions(
        id=id, patient=patient, findings=tuple(map(str, names[first:])),
        logit=logits_from_probabilities(probability[:, first:]),
        label=label.astype(np.float64), label_mask=np.ones(label.shape, bool),
    )  # fmt: skip


def majority_class_accuracy(
    source: np.ndarray, label: Shaped[np.ndarray, " N"], test_source: np.ndarray, test_label: Shaped[np.ndarray, " M"]
) -> float:
    """Return the accuracy, 0 to 1, of predicting the most frequent class of each test image's source.

    Classes are counted on the other images; a source that is not among them gets the most frequent class overall.
    """
    overall = np.bincount(label).argmax()
    majority = {name: np.bincount(label[source == name]).argmax() for name in np.unique(source)}
    return float(np.mean([majority.get(name, overall) for name in test_source] == np.asarray(test_label)))
