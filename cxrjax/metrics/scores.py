"""Scores of prediction tables and files: AUROC and average precision per finding and on average, with intervals.

A prediction file can be scored against a label file that shares only the names of the images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8

from cxrjax.errors import CxrError
from cxrjax.findings import NIH14, NO_FINDING, make_targets
from cxrjax.metrics import tables
from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import BootstrapResult, Interval, check_confidence, percentile_interval
from cxrjax.metrics.predictions import SCORING_POLICY, Predictions

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
      images, patients: their number in all tables. If equal, each image was resampled separately.
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

    Without draws there are no intervals. The confidence is a fraction between 0 and 1, else a `CxrError` is raised.
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
    unique = result.unique_tables
    images, patients = sum(map(len, unique)), sum(len(np.unique(table.patient)) for table in unique)
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


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Labels of N images and K findings.

    Attributes:
      path: the file they were read from.
      id: str[N], unique.
      patient: str[N], or None if the file has no patients.
      findings: K names.
      label: int8[N, K], 1 positive, 0 negative, -1 uncertain, -2 not mentioned.
    """

    path: Path
    id: np.ndarray
    patient: np.ndarray | None
    findings: tuple[str, ...]
    label: Int8[np.ndarray, "N K"]


def score_files(predictions: Path, labels: Path | None = None, *, resamples: int = 1000, seed: int = 0) -> Scores:
    """Score a prediction file, as `score` does.

    Args:
      predictions: a file that `Predictions.read` accepts.
      labels: a file that `read_labels` accepts; None if the predictions contain labels.
      resamples: draws of patients for the intervals; 0 for none.
      seed: of the draws.

    Raises:
      CxrError: a file is invalid, predicted images or findings have no labels, or there are no labels at all.
    """
    table = Predictions.read(predictions)
    if labels is not None:
        table = with_labels(table, read_labels(labels, table.findings))
    elif not table.label_mask.any():
        raise CxrError(f"{predictions} has no labels: give a file that does with --labels")
    return score(table, resamples=resamples, seed=seed)


def read_labels(path: Path, findings: Sequence[str]) -> LabelTable:
    """Read the labels of these findings.

    Args:
      path: .parquet, .csv or .csv.gz with a column of `tables.ID`, optionally one of `tables.PATIENT`, and either NIH's
        `Finding Labels` ("Effusion|Mass") or a column `label_F` or `F` per finding F: 1, 0, -1, -2 or empty.
      findings: names; case, spaces and underscores do not matter.

    Raises:
      CxrError: a column is missing, an image has two rows, or a value is not a label.
    """
    table = tables.read(Path(path))
    ids = table.ids()
    patient = table.find_column(tables.PATIENT)
    lists = table.find_column([tables.FINDING_LIST])
    label = _labels_from_columns(table, findings) if lists is None else _labels_from_lists(table, lists, findings)
    return LabelTable(Path(path), ids, None if patient is None else table.strings(patient), tuple(findings), label)


def with_labels(predictions: Predictions, labels: LabelTable) -> Predictions:
    """Return the predictions with these labels, and with the label file's patients if it has some.

    Raises:
      CxrError: predicted images have no labels.
    """
    rows, missing = tables.find_rows(predictions.id, labels.id)
    if len(missing):
        examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CxrError(
            f"{labels.path}: no labels for {len(missing):,} of {len(predictions):,} predicted images ({examples}); "
            "check that both files name images alike"
        )
    label, label_mask = make_targets(labels.label[rows], SCORING_POLICY)
    patient = predictions.patient if labels.patient is None else labels.patient[rows]
    return replace(predictions, patient=patient, label=label, label_mask=label_mask)


def _labels_from_lists(table: tables.Table, column: str, findings: Sequence[str]) -> Int8[np.ndarray, "N K"]:
    """Read NIH's format: each image lists its findings, and all others are absent."""
    vocabulary = (*NIH14, NO_FINDING)
    index = {tables.normalize_name(name): k for k, name in enumerate(vocabulary)}
    for finding in findings:
        if tables.normalize_name(finding) not in index:
            raise CxrError(f"{table.path}: no finding named {finding!r}; choose from {', '.join(vocabulary)}")
    lists = table.arrow[column].dictionary_encode().combine_chunks()
    unique = np.zeros((len(lists.dictionary), len(vocabulary)), np.int8)  # a few hundred lists in 112,120 rows
    for number, text in enumerate(lists.dictionary.to_pylist()):
        for name in text.split("|"):
            if tables.normalize_name(name) not in index:
                row = lists.indices.to_pylist().index(number) + 1
                raise CxrError(f"{table.path}: row {row} lists {name!r}, which is none of {', '.join(vocabulary)}")
            unique[number, index[tables.normalize_name(name)]] = 1
    return unique[lists.indices.to_numpy()][:, [index[tables.normalize_name(finding)] for finding in findings]]


def _labels_from_columns(table: tables.Table, findings: Sequence[str]) -> Int8[np.ndarray, "N K"]:
    """Read one column per finding, `label_F` or `F`."""
    columns = {finding: table.find_column([f"label_{finding}", finding]) for finding in findings}
    missing = [finding for finding, column in columns.items() if column is None]
    if missing:
        raise CxrError(
            f"{table.path}: no label column for {', '.join(missing)}; columns are {table.column_names}; "
            "add a column, or leave this finding out of the predictions"
        )
    return np.stack([table.labels(column) for column in columns.values() if column], axis=1)
