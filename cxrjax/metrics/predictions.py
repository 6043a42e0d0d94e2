"""The predictions table: what a model said of each image, and what is true; every statistic is made of such tables.

On disk: Parquet (.parquet) or CSV (.csv, .csv.gz) with the columns `id`, `patient`, and per finding F `logit_F`,
`label_F` (0 or 1) and `known_F`. A peer's table may call the first two as `tables.ID` and `tables.PATIENT` allow, give
`prob_F` for `logit_F`, and leave out patients (each image is then a patient of its own), labels (then unknown) and
`known_F`.
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
from cxrjax.findings import LabelPolicy, positions, targets
from cxrjax.metrics import tables

SCORING_POLICY = LabelPolicy(uncertain="ignore", not_mentioned="unknown")
"""Scores count only what somebody said plainly: an uncertain or empty label is unknown."""

_MOST = 1e300  # stands for an infinite logit: it ranks alike, and sums of it stay finite


SOFTMAX_LOSSES = ("cross_entropy", "softmax")
"""Those after which the probabilities of an image are the softmax of its logits; else each is a logistic function."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of N images and K findings.

    Attributes:
      id: str[N], unique names of the images.
      patient: str[N], whose they are: the unit of resampling.
      findings: K names.
      logit: f64[N, K], finite.
      label: f64[N, K], 1 positive, 0 negative; meaningless where unknown.
      label_mask: bool[N, K], which labels count.

    Raises:
      CxrError: shapes do not fit, an id comes twice, a score is not a finite number, a known label is not 0 or 1.
    """

    id: np.ndarray
    patient: np.ndarray
    findings: tuple[str, ...]
    logit: Float64[np.ndarray, "N K"]
    label: Float64[np.ndarray, "N K"]
    label_mask: Bool[np.ndarray, "N K"]

    def __post_init__(self):
        """Bring all to their types and refuse what no statistic could be made of."""
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
            again = np.setdiff1d(np.arange(count), first)[0]
            raise CxrError(f"predictions: row {again + 1} repeats the id {self.id[again]}; keep one row per image")
        self._refuse(~np.isfinite(self.logit), "the logit", self.logit, "not a finite number")
        self._refuse(self.label_mask & ~np.isin(self.label, (0, 1)), "the label", self.label, "neither 0 nor 1")

    def _refuse(self, wrong: Bool[np.ndarray, "N K"], what: str, values: np.ndarray, fault: str) -> None:
        if wrong.any():
            row, k = np.argwhere(wrong)[0]
            where = f"row {row + 1} (id {self.id[row]})"
            raise CxrError(f"predictions: {where}: {what} of {self.findings[k]} is {values[row, k]}, {fault}")

    def __len__(self) -> int:
        return len(self.id)

    @property
    def probability(self) -> Float64[np.ndarray, "N K"]:
        """The logistic function of the logits, 0 to 1."""
        return expit(self.logit)

    def select(self, findings: Sequence[str]) -> "Predictions":
        """The same table with these findings only, in this order.

        Raises:
          CxrError: one of them is not in the table.
        """
        columns = positions(findings, self.findings)
        cells = {name: getattr(self, name)[:, columns] for name in ("logit", "label", "label_mask")}
        return replace(self, findings=tuple(findings), **cells)

    def take(self, rows: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> "Predictions":
        """These rows, by number in this order or by a mask."""
        arrays = ("id", "patient", "logit", "label", "label_mask")
        return replace(self, **{name: getattr(self, name)[rows] for name in arrays})

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all, as the name's ending says; reading it gives the same numbers.

        Raises:
          CxrError: the ending is none of .parquet, .csv and .csv.gz.
        """
        columns = {"id": pa.array(self.id), "patient": pa.array(self.patient)}
        label = np.where(self.label_mask, self.label, 0).astype(np.int8)
        for prefix, values in (("logit", self.logit), ("label", label), ("known", self.label_mask)):
            columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(self.findings)}
        tables.write(Path(path), pa.table(columns))

    @classmethod
    def read(cls, path: Path, policy: LabelPolicy = SCORING_POLICY) -> "Predictions":
        """Read a table of ours or of a peer; see the head of this file for the columns.

        Args:
          path: .parquet, .csv or .csv.gz.
          policy: what labels of -1 (uncertain) and of -2 or nothing (not mentioned) count as.

        Raises:
          CxrError: a file or column is missing, or a value is not what it should be; the message names it.
        """
        table = tables.read(Path(path))
        ids = table.ids()
        patient_column = table.find(tables.PATIENT)
        kind = "logit" if table.with_prefix("logit") else "prob"
        scores = table.with_prefix(kind)
        if not scores:
            raise CxrError(f"{table.path}: no column named logit_FINDING or prob_FINDING; found {table.listing}")
        findings = tuple(scores)
        values = np.stack([table.numbers(column) for column in scores.values()], axis=1)
        wrong = np.argwhere(np.isnan(values) if kind == "logit" else ~((values >= 0) & (values <= 1)))
        if len(wrong):
            row, k = wrong[0]
            fault = "not a number" if np.isnan(values[row, k]) else "not a probability"
            raise CxrError(
                f"{table.path}: row {row + 1} (id {ids[row]}): the score of {findings[k]} is {values[row, k]}, {fault}"
            )
        label, label_mask = _labels(table, findings, policy)
        return cls(
            id=ids,
            patient=ids if patient_column is None else table.strings(patient_column),
            findings=findings,
            logit=np.clip(values, -_MOST, _MOST) if kind == "logit" else logits_from_probabilities(values),
            label=label,
            label_mask=label_mask,
        )


def logits_from_probabilities(probability: Float[np.ndarray, "N K"]) -> Float64[np.ndarray, "N K"]:
    """log(p / (1 - p)) of each column, finite and in exactly the order of the probabilities.

    Rounding would make ties of probabilities that differ (near 0, logits are coarser than probabilities), and 0 and 1
    have no finite logit. So 0 and 1 become -746 and 37.5, which is beyond every other double's logit and has a logistic
    function of exactly 0 and 1, and equal logits of different probabilities are moved apart by the smallest step.
    """
    return np.stack([_ordered_logits(column) for column in np.asarray(probability, np.float64).T], axis=1)


def _ordered_logits(probability: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    rising, which = np.unique(probability, return_inverse=True)
    values = np.clip(logit(rising), -746.0, 37.5)
    # Doubles of one sign are ordered as their bits are. As integers, each must exceed the one before it by at least 1.
    bits = values.view(np.int64)
    steps = np.where(bits < 0, np.int64(np.iinfo(np.int64).min) - bits, bits)
    place = np.arange(len(steps))
    steps = np.maximum.accumulate(steps - place) + place
    bits = np.where(steps < 0, np.int64(np.iinfo(np.int64).min) - steps, steps)
    return bits.view(np.float64)[which]


def _labels(
    table: tables.Table, findings: tuple[str, ...], policy: LabelPolicy
) -> tuple[Float64[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """Labels of a predictions table and which are known; all unknown where it has none."""
    columns = table.with_prefix("label")
    if not columns:
        shape = (len(table), len(findings))
        return np.zeros(shape), np.zeros(shape, bool)
    missing = [finding for finding in findings if finding not in columns]
    if missing:
        raise CxrError(f"{table.path}: no column label_{missing[0]}, though others have one; found {table.listing}")
    label, label_mask = targets(np.stack([table.labels(columns[f]) for f in findings], axis=1), policy)
    flags = table.with_prefix("known")
    for k, finding in enumerate(findings):
        if finding in flags:
            label_mask[:, k] &= table.numbers(flags[finding]) == 1
    return label.astype(np.float64), label_mask


def log_odds(logits: Float[np.ndarray, "N K"], loss: str) -> Float64[np.ndarray, "N K"]:
    """What the logistic function takes to a network's probabilities: the logits, or log p / (1 - p) of the softmax.

    Args:
      logits: as the network gives them.
      loss: the name of the loss that it was trained with, which says what its probabilities are.
    """
    logits = np.asarray(logits, np.float64)
    return softmax_log_odds(logits) if loss in SOFTMAX_LOSSES else logits


def probabilities(logits: Float[np.ndarray, "N K"], loss: str) -> Float64[np.ndarray, "N K"]:
    """A network's probabilities, 0 to 1; arguments as in `log_odds`."""
    return expit(log_odds(logits, loss))


def softmax_log_odds(logits: Float[np.ndarray, "N K"]) -> Float64[np.ndarray, "N K"]:
    """The logarithm of p / (1 - p), p being the softmax of each row."""
    logits = np.asarray(logits, np.float64)
    others: list[Any] = [logsumexp(np.delete(logits, k, axis=1), axis=1) for k in range(logits.shape[1])]
    return logits - np.stack(others, axis=1)
