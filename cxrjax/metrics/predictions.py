"""The prediction table that every statistic takes, and the conversions between logits and probabilities.

On disk a table is Parquet (.parquet) or CSV (.csv, .csv.gz) with columns `id`, `patient` and, for each finding F,
`logit_F`, `label_F` (0 or 1) and `known_F`. Tables from elsewhere may name the first two as `tables.ID` and
`tables.PATIENT` allow, give `prob_F` instead of `logit_F`, and omit patients (each image is then its own patient),
labels (then unknown) and `known_F`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float64, Int
from scipy.special import expit, logit, logsumexp

from cxrjax.errors import CxrError
from cxrjax.findings import LabelPolicy, finding_indices, make_targets
from cxrjax.metrics import tables

SCORING_POLICY = LabelPolicy(uncertain="ignore", not_mentioned="unknown")
"""The label policy for scoring: uncertain and missing labels do not count."""

SOFTMAX_LOSSES = ("cross_entropy", "softmax")
"""Losses whose networks give probabilities by a softmax over findings; after all others, by a sigmoid."""

_MAX_LOGIT = 1e300  # stands for an infinite logit: same rank, but sums stay finite


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of one model for N images and K findings, with the labels.

    Attributes:
      id: str[N], unique names of the images.
      patient: str[N], the unit of resampling.
      findings: K names.
      logit: f64[N, K], finite.
      label: f64[N, K], 1 positive, 0 negative; meaningless where `label_mask` is false.
      label_mask: bool[N, K], which labels count.

    Raises:
      CxrError: shapes do not fit, an id is repeated, a score is not finite, a known label is neither 0 nor 1.
    """

    id: np.ndarray
    patient: np.ndarray
    findings: tuple[str, ...]
    logit: Float64[np.ndarray, "N K"]
    label: Float64[np.ndarray, "N K"]
    label_mask: Bool[np.ndarray, "N K"]

    def __post_init__(self):
        """Convert all fields to their types and check them."""
        types = {"id": np.str_, "patient": np.str_, "logit": np.float64, "label": np.float64, "label_mask": np.bool_}
        for name, dtype in types.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        object.__setattr__(self, "findings", tuple(self.findings))
        count, cells = len(self.id), (len(self.id), len(self.findings))
        for name in types:
            shape, expected = getattr(self, name).shape, (count,) if name in ("id", "patient") else cells
            if shape != expected:
                raise CxrError(f"predictions: {name} has shape {shape}, not {expected}")
        if count == 0:
            raise CxrError("predictions: the table has no rows")
        names, first = np.unique(self.id, return_index=True)
        if len(names) < count:
            repeated = np.setdiff1d(np.arange(count), first)[0]
            raise CxrError(
                f"predictions: row {repeated + 1} repeats the id {self.id[repeated]}; keep one row per image"
            )
        self._refuse(~np.isfinite(self.logit), "logit", self.logit, "not a finite number")
        self._refuse(self.label_mask & ~np.isin(self.label, (0, 1)), "label", self.label, "neither 0 nor 1")

    def _refuse(self, wrong: Bool[np.ndarray, "N K"], column: str, values: np.ndarray, problem: str) -> None:
        if wrong.any():
            row, k = np.argwhere(wrong)[0]
            where = f"row {row + 1} (id {self.id[row]})"
            raise CxrError(f"predictions: {where}: the {column} of {self.findings[k]} is {values[row, k]}, {problem}")

    def __len__(self) -> int:
        return len(self.id)

    @property
    def probability(self) -> Float64[np.ndarray, "N K"]:
        """The sigmoid of the logits, 0 to 1."""
        return expit(self.logit)

    def select(self, findings: Sequence[str]) -> "Predictions":
        """Return the table with these findings only, in this order.

        Raises:
          CxrError: a finding is not in the table.
        """
        columns = finding_indices(findings, self.findings)
        cells = {name: getattr(self, name)[:, columns] for name in ("logit", "label", "label_mask")}
        return replace(self, findings=tuple(findings), **cells)

    def take(self, rows: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> "Predictions":
        """Return the table with these rows, by index in this order or by a mask."""
        arrays = ("id", "patient", "logit", "label", "label_mask")
        return replace(self, **{name: getattr(self, name)[rows] for name in arrays})

    def write(self, path: Path) -> None:
        """Write the table atomically, in the format of the suffix. Reading it returns the same numbers.

        Raises:
          CxrError: the suffix is none of .parquet, .csv and .csv.gz.
        """
        columns = {"id": pa.array(self.id), "patient": pa.array(self.patient)}
        label = np.where(self.label_mask, self.label, 0).astype(np.int8)
        for prefix, values in (("logit", self.logit), ("label", label), ("known", self.label_mask)):
            columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(self.findings)}
        tables.write(Path(path), pa.table(columns))

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Read a prediction table (.parquet, .csv or .csv.gz); see this module's docstring for its columns.

        Labels of -1 (uncertain), and -2 or empty (not mentioned), do not count.

        Raises:
          CxrError: the file or a column is missing, or a value is invalid.
        """
        table = tables.read(Path(path))
        ids = table.ids()
        patient_column = table.find_column(tables.PATIENT)
        prefix = "logit" if table.columns_by_finding("logit") else "prob"
        scores = table.columns_by_finding(prefix)
        if not scores:
            raise CxrError(
                f"{table.path}: no column named logit_FINDING or prob_FINDING; columns are {table.column_names}"
            )
        findings = tuple(scores)
        values = np.stack([table.numbers(column) for column in scores.values()], axis=1)
        wrong = np.argwhere(np.isnan(values) if prefix == "logit" else ~((values >= 0) & (values <= 1)))
        if len(wrong):
            row, k = wrong[0]
            problem = "not a number" if np.isnan(values[row, k]) else "not a probability"
            where = f"{table.path}: row {row + 1} (id {ids[row]})"
            raise CxrError(f"{where}: the score of {findings[k]} is {values[row, k]}, {problem}")
        label, label_mask = _read_labels(table, findings)
        return cls(
            id=ids,
            patient=ids if patient_column is None else table.strings(patient_column),
            findings=findings,
            logit=np.clip(values, -_MAX_LOGIT, _MAX_LOGIT) if prefix == "logit" else logits_from_probabilities(values),
            label=label,
            label_mask=label_mask,
        )


def _read_labels(
    table: tables.Table, findings: tuple[str, ...]
) -> tuple[Float64[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """Return a prediction table's labels and their mask; all unknown if it has none."""
    columns = table.columns_by_finding("label")
    if not columns:
        shape = (len(table), len(findings))
        return np.zeros(shape), np.zeros(shape, bool)
    missing = [finding for finding in findings if finding not in columns]
    if missing:
        raise CxrError(
            f"{table.path}: no column label_{missing[0]}, though others have one; columns are {table.column_names}"
        )
    label, label_mask = make_targets(np.stack([table.labels(columns[f]) for f in findings], axis=1), SCORING_POLICY)
    known = table.columns_by_finding("known")
    for k, finding in enumerate(findings):
        if finding in known:
            label_mask[:, k] &= table.numbers(known[finding]) == 1
    return label.astype(np.float64), label_mask


def logits_from_probabilities(probability: Float[np.ndarray, "N K"]) -> Float64[np.ndarray, "N K"]:
    """Return log(p / (1 - p)) of each column, finite and in exactly the order of the probabilities.

    Rounding would tie different probabilities (near 0, logits are coarser than probabilities), and 0 and 1 have no
    finite logit. So 0 and 1 become -746 and 37.5, beyond every other double's logit and with a sigmoid of exactly 0 and
    1, and equal logits of different probabilities are moved apart by the smallest step.
    """
    return np.stack([_ordered_logits(column) for column in np.asarray(probability, np.float64).T], axis=1)


def _ordered_logits(probability: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    ascending, inverse = np.unique(probability, return_inverse=True)
    values = np.clip(logit(ascending), -746.0, 37.5)
    # Doubles of one sign sort like their bits. As integers, each must exceed the one before it by at least 1.
    bits = values.view(np.int64)
    steps = np.where(bits < 0, np.int64(np.iinfo(np.int64).min) - bits, bits)
    index = np.arange(len(steps))
    steps = np.maximum.accumulate(steps - index) + index
    bits = np.where(steps < 0, np.int64(np.iinfo(np.int64).min) - steps, steps)
    return bits.view(np.float64)[inverse]


def log_odds(logits: Float[np.ndarray, "N K"], loss: str) -> Float64[np.ndarray, "N K"]:
    """Return the log-odds of a network's probabilities: its logits, or log p / (1 - p) of their softmax.

    The name of the loss that the network was trained with defines its probabilities.
    """
    logits = np.asarray(logits, np.float64)
    return softmax_log_odds(logits) if loss in SOFTMAX_LOSSES else logits


def probabilities(logits: Float[np.ndarray, "N K"], loss: str) -> Float64[np.ndarray, "N K"]:
    """Return a network's probabilities, 0 to 1. Arguments as in `log_odds`."""
    return expit(log_odds(logits, loss))


def softmax_log_odds(logits: Float[np.ndarray, "N K"]) -> Float64[np.ndarray, "N K"]:
    """Return log(p / (1 - p)) of the softmax p of each row."""
    logits = np.asarray(logits, np.float64)
    others: list[Any] = [logsumexp(np.delete(logits, k, axis=1), axis=1) for k in range(logits.shape[1])]
    return logits - np.stack(others, axis=1)
