"""Score anybody's predictions against anybody's labels: two files that share nothing but the images' names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int8

from cxrjax.errors import CxrError
from cxrjax.findings import NIH14, LabelPolicy, targets
from cxrjax.metrics import tables
from cxrjax.metrics.predictions import SCORING_POLICY, Predictions
from cxrjax.metrics.scores import Scores, score

NO_FINDING = "No Finding"


@dataclass(frozen=True, eq=False)
class LabelTable:
    """What is true of N images.

    Attributes:
      path: where it was read.
      id: str[N], unique.
      patient: str[N], or None where the file does not say.
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
    """Score a file of predictions.

    Args:
      predictions: as `Predictions.read` takes it.
      labels: as `read_labels` takes it; None where the predictions hold labels themselves.
      findings: which to score; None for all those predicted.
      policy: what uncertain and absent labels count as; by default neither counts.
      resamples: as in `score`.
      seed: as in `score`.
      confidence: as in `score`.

    Raises:
      CxrError: a file is broken, predicted images or findings have no labels, or there are no labels at all.
    """
    table = Predictions.read(predictions, policy)
    if findings is not None:
        table = table.select([match_finding(finding, table.findings, predictions) for finding in findings])
    if labels is not None:
        table = with_labels(table, read_labels(labels, table.findings), policy)
    elif not table.label_mask.any():
        raise CxrError(f"{predictions} holds no labels: name the file that does with --labels")
    return score(table, resamples=resamples, seed=seed, confidence=confidence)


def read_labels(path: Path, findings: Sequence[str]) -> LabelTable:
    """Read the labels of these findings.

    Args:
      path: .parquet, .csv or .csv.gz with a column of `tables.ID`, perhaps one of `tables.PATIENT`, and either NIH's
        `Finding Labels` ("Effusion|Mass") or a column `label_F` or `F` per finding F: 1, 0, -1, -2 or empty.
      findings: names; case, spaces and underscores do not matter.

    Raises:
      CxrError: a column is missing, an image has two rows, or a value is no label.
    """
    table = tables.read(Path(path))
    ids = table.ids()
    patient = table.find(tables.PATIENT)
    listed = table.find(["Finding Labels"])
    label = _from_columns(table, findings) if listed is None else _from_list(table, listed, findings)
    return LabelTable(Path(path), ids, None if patient is None else table.strings(patient), tuple(findings), label)


def with_labels(predictions: Predictions, labels: LabelTable, policy: LabelPolicy = SCORING_POLICY) -> Predictions:
    """The predictions with these labels, and these patients where the labels' file names them.

    Raises:
      CxrError: predicted images have no labels; the message counts and names them.
    """
    found = pc.index_in(pa.array(predictions.id), value_set=pa.array(labels.id))  # pyright: ignore
    missing = found.is_null().to_numpy(zero_copy_only=False)
    if missing.any():
        few = ", ".join(predictions.id[missing][:3])
        raise CxrError(
            f"{labels.path}: no labels for {missing.sum():,} of {len(missing):,} predicted images ({few}"
            f"{', ...' if missing.sum() > 3 else ''}); check that both files name images alike"
        )
    rows = found.to_numpy()
    label, label_mask = targets(labels.label[rows], policy)
    patient = predictions.patient if labels.patient is None else labels.patient[rows]
    return replace(predictions, patient=patient, label=label, label_mask=label_mask)


def match_finding(finding: str, available: Sequence[str], path: Path) -> str:
    """The available finding of this name, up to case, spaces and underscores.

    Raises:
      CxrError: there is none.
    """
    for name in available:
        if tables.normalize_name(name) == tables.normalize_name(finding):
            return name
    raise CxrError(f"{path}: no finding named {finding!r}; found {', '.join(available)}")


def _from_list(table: tables.Table, column: str, findings: Sequence[str]) -> Int8[np.ndarray, "N K"]:
    """NIH's way: each image lists its findings; what is not listed is absent."""
    vocabulary = (*NIH14, NO_FINDING)
    wanted = [vocabulary.index(match_finding(finding, vocabulary, table.path)) for finding in findings]
    lists = table.arrow[column].dictionary_encode().combine_chunks()
    label_mask = {tables.normalize_name(name): k for k, name in enumerate(vocabulary)}
    kinds = np.zeros((len(lists.dictionary), len(vocabulary)), np.int8)  # few hundred different lists in 112,120 rows
    for kind, text in enumerate(lists.dictionary.to_pylist()):
        for name in text.split("|"):
            if tables.normalize_name(name) not in label_mask:
                row = lists.indices.to_pylist().index(kind) + 1
                raise CxrError(f"{table.path}: row {row} lists {name!r}, which is none of {', '.join(vocabulary)}")
            kinds[kind, label_mask[tables.normalize_name(name)]] = 1
    return kinds[lists.indices.to_numpy()][:, wanted]


def _from_columns(table: tables.Table, findings: Sequence[str]) -> Int8[np.ndarray, "N K"]:
    """One column per finding, `label_F` or `F`."""
    columns = {finding: table.find([f"label_{finding}", finding]) for finding in findings}
    missing = [finding for finding, column in columns.items() if column is None]
    if missing:
        raise CxrError(
            f"{table.path}: no column of labels for {', '.join(missing)}; found {table.listing}; "
            "choose the findings to score if these are not wanted"
        )
    return np.stack([table.labels(column) for column in columns.values() if column], axis=1)
