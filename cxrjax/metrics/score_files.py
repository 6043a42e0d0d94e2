"""Scoring of prediction files against label files that share only the names of the images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int8

from cxrjax.errors import CxrError
from cxrjax.findings import NIH14, NO_FINDING, LabelPolicy, targets
from cxrjax.metrics import tables
from cxrjax.metrics.predictions import SCORING_POLICY, Predictions
from cxrjax.metrics.scores import Scores, score


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


def score_files(
    predictions: Path,
    labels: Path | None = None,
    *,
    findings: Sequence[str] | None = None,
    policy: LabelPolicy = SCORING_POLICY,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Scores:
    """Score a prediction file.

    Args:
      predictions: a file that `Predictions.read` accepts.
      labels: a file that `read_labels` accepts; None if the predictions contain labels.
      findings: which to score; None for all predicted ones.
      policy: how to treat uncertain and missing labels; by default they do not count.
      resamples: as in `score`.
      seed: as in `score`.
      confidence: as in `score`.

    Raises:
      CxrError: a file is invalid, predicted images or findings have no labels, or there are no labels at all.
    """
    table = Predictions.read(predictions, policy)
    if findings is not None:
        table = table.select([match_finding(finding, table.findings, predictions) for finding in findings])
    if labels is not None:
        table = with_labels(table, read_labels(labels, table.findings), policy)
    elif not table.label_mask.any():
        raise CxrError(f"{predictions} has no labels: give a file that does with --labels")
    return score(table, resamples=resamples, seed=seed, confidence=confidence)


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


def with_labels(predictions: Predictions, labels: LabelTable, policy: LabelPolicy = SCORING_POLICY) -> Predictions:
    """Return the predictions with these labels, and with the label file's patients if it has some.

    Raises:
      CxrError: predicted images have no labels.
    """
    indices = pc.index_in(pa.array(predictions.id), value_set=pa.array(labels.id))  # pyright: ignore
    missing = indices.is_null().to_numpy(zero_copy_only=False)
    if missing.any():
        examples = ", ".join(predictions.id[missing][:3])
        raise CxrError(
            f"{labels.path}: no labels for {missing.sum():,} of {len(missing):,} predicted images ({examples}"
            f"{', ...' if missing.sum() > 3 else ''}); check that both files name images alike"
        )
    rows = indices.to_numpy()
    label, label_mask = targets(labels.label[rows], policy)
    patient = predictions.patient if labels.patient is None else labels.patient[rows]
    return replace(predictions, patient=patient, label=label, label_mask=label_mask)


def match_finding(finding: str, available: Sequence[str], path: Path) -> str:
    """Return the available finding of this name, up to case, spaces and underscores.

    Raises:
      CxrError: there is none.
    """
    for name in available:
        if tables.normalize_name(name) == tables.normalize_name(finding):
            return name
    raise CxrError(f"{path}: no finding named {finding!r}; choose from {', '.join(available)}")


def _labels_from_lists(table: tables.Table, column: str, findings: Sequence[str]) -> Int8[np.ndarray, "N K"]:
    """Read NIH's format: each image lists its findings, and all others are absent."""
    vocabulary = (*NIH14, NO_FINDING)
    columns = [vocabulary.index(match_finding(finding, vocabulary, table.path)) for finding in findings]
    lists = table.arrow[column].dictionary_encode().combine_chunks()
    index = {tables.normalize_name(name): k for k, name in enumerate(vocabulary)}
    unique = np.zeros((len(lists.dictionary), len(vocabulary)), np.int8)  # a few hundred lists in 112,120 rows
    for number, text in enumerate(lists.dictionary.to_pylist()):
        for name in text.split("|"):
            if tables.normalize_name(name) not in index:
                row = lists.indices.to_pylist().index(number) + 1
                raise CxrError(f"{table.path}: row {row} lists {name!r}, which is none of {', '.join(vocabulary)}")
            unique[number, index[tables.normalize_name(name)]] = 1
    return unique[lists.indices.to_numpy()][:, columns]


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
