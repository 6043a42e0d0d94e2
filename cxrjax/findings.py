"""Findings: the vocabularies of the data sets, and what a label that is not a plain yes or no means in training.

A label is one int8 per record and finding: `POSITIVE`, `NEGATIVE`, `UNCERTAIN` (the report hedges) or `NOT_MENTIONED`
(the report is silent). A `LabelPolicy` turns labels into a target value and whether that value is known; an unknown one
is in no loss and in no score. `translate` says one vocabulary's labels in another.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int8

from cxrjax.errors import CxrError

POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED = 1, 0, -1, -2

NIH14 = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
"""ChestX-ray14 (Wang et al., CVPR 2017), in the order that published label lists use."""

CHEXPERT14 = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip
"""The CheXpert and NegBio labellers' findings, in the column order of MIMIC-CXR-JPG's tables."""

SIX_CLASS = ("Covid-19", "Effusions", "Infiltration", "No-Findings", "Pneumonia", "Pneumothorax")
"""Six exclusive classes: the folder names of the COVID-19 and NIH image mixture."""

PHANTOM = ("Cardiomegaly", "Pleural Effusion", "Mass", "Nodule", "Pneumothorax", "Reticulation", "Support Devices")
"""The findings that the phantom draws, from coarse to fine."""


VOCABULARIES = {"chestxray14": NIH14, "mimic_cxr_jpg": CHEXPERT14, "six_class": SIX_CLASS, "cxr_phantom": PHANTOM}
"""Of the data sets that always have the same findings."""

NO_FINDING = "No Finding"

ONES_SMOOTHED, ZEROS_SMOOTHED = (0.55, 0.85), (0.0, 0.3)
"""Intervals of the smoothed U-Ones and U-Zeros (U-Ones+LSR and U-Zeros+LSR of Pham et al., Neurocomputing 2021)."""

_UNCERTAIN = ("zeros", "ones", "ignore", "smooth")
_SAME = {"Effusion": "Pleural Effusion", "Pleural Effusion": "Effusion"}
_WITHIN = {
    "Lung Lesion": ("Mass", "Nodule"),
    "Lung Opacity": ("Infiltration", "Consolidation", "Edema", "Pneumonia", "Atelectasis", "Mass", "Nodule"),
    "Pleural Other": ("Pleural_Thickening",),
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
}  # as CheXpert's findings are ordered (Irvin et al., AAAI 2019, figure 1), with ChestX-ray14's put where they belong
_WHOLE = ("Lung Lesion",)  # its parts above are all there is of it
_NO_DISEASE = (NO_FINDING, "Support Devices")


@dataclass(frozen=True)
class LabelPolicy:
    """What an uncertain or absent label is trained and scored as.

    Attributes:
      uncertain: "zeros" takes an uncertain label as negative, "ones" as positive, "ignore" as unknown (U-Zeros, U-Ones
        and U-Ignore of Irvin et al., AAAI 2019); "smooth" draws its target from `interval`.
      not_mentioned: "negative" takes a finding that the report does not mention as absent, "unknown" as unknown.
      interval: lowest and highest target of "smooth", uniform between; see `ONES_SMOOTHED` and `ZEROS_SMOOTHED`.
      seed: of the drawn targets. Each depends on it, the record's id and the finding alone.
      exceptions: findings that have a policy of their own.
    """

    uncertain: Literal["zeros", "ones", "ignore", "smooth"] = "zeros"
    not_mentioned: Literal["negative", "unknown"] = "negative"
    interval: tuple[float, float] = ONES_SMOOTHED
    seed: int = 0
    exceptions: Mapping[str, "LabelPolicy"] = field(default_factory=dict)

    def __post_init__(self):
        for name, allowed in (("uncertain", _UNCERTAIN), ("not_mentioned", ("negative", "unknown"))):
            if getattr(self, name) not in allowed:
                raise CxrError(f"label policy {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise CxrError(f"label policy interval={self.interval} is not a lowest and a highest target from 0 to 1")
        if any(policy.exceptions for policy in self.exceptions.values()):
            raise CxrError("an exception of a label policy cannot have exceptions of its own")

    @property
    def scored(self) -> "LabelPolicy":
        """The policy for scores: a drawn target is nobody's statement, so it is unknown there."""
        uncertain = "ignore" if self.uncertain == "smooth" else self.uncertain
        exceptions = {finding: policy.scored for finding, policy in self.exceptions.items()}
        return replace(self, uncertain=uncertain, exceptions=exceptions)


def targets(
    labels: Int8[np.ndarray, "N K"],
    policy: LabelPolicy,
    *,
    findings: Sequence[str] | None = None,
    ids: Sequence[str] | np.ndarray | None = None,
) -> tuple[Float32[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """Turn labels into what a loss or a score takes.

    Args:
      labels: 1 positive, 0 negative, -1 uncertain, -2 not mentioned.
      policy: what the last two count as.
      findings: names of the K columns; a policy with exceptions or "smooth" needs them.
      ids: of the N records; "smooth" needs them.

    Returns:
      The target values, 0 or 1 or where smoothed between (0 where unknown), and whether each is known.

    Raises:
      CxrError: a label is none of the four values (the message names its row and column), an exception is for an
        unknown finding, names or ids are needed and absent.
    """
    wrong = np.argwhere((labels < NOT_MENTIONED) | (labels > POSITIVE))
    if len(wrong):
        row, column = wrong[0]
        raise CxrError(f"label {labels[row, column]} in row {row}, column {column}: a label is 1, 0, -1 or -2")
    smooth = any(rule.uncertain == "smooth" for rule in (policy, *policy.exceptions.values()))
    if (smooth or policy.exceptions) and findings is None:
        raise CxrError("smoothed targets and exceptions of a label policy need the names of the findings")
    if smooth and ids is None:
        raise CxrError("smoothed targets need the ids of the records")
    names = ("",) * labels.shape[1] if findings is None else tuple(findings)
    positions(list(policy.exceptions), names)
    value, known = (labels == POSITIVE).astype(np.float32), np.ones(labels.shape, bool)
    for column, name in enumerate(names):
        rule = policy.exceptions.get(name, policy)
        uncertain = labels[:, column] == UNCERTAIN
        if rule.uncertain == "ones":
            value[uncertain, column] = 1
        elif rule.uncertain == "ignore":
            known[uncertain, column] = False
        elif rule.uncertain == "smooth":
            value[uncertain, column] = _draws(rule, name, np.asarray(ids)[uncertain])
        if rule.not_mentioned == "unknown":
            known[labels[:, column] == NOT_MENTIONED, column] = False
    return value, known


def _draws(policy: LabelPolicy, finding: str, ids: Iterable[str]) -> list[float]:
    """One uniform draw per record that no other record, and no order of them, has a part in."""
    low, high = policy.interval
    digests = (hashlib.sha256(f"{policy.seed}/{finding}/{id}".encode()).digest() for id in ids)
    return [low + (high - low) * int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]


def no_finding(labels: Int8[np.ndarray, "N K"], findings: Sequence[str]) -> Int8[np.ndarray, " N"]:
    """Derive `No Finding` from the other labels, as the CheXpert labeller does (Irvin et al., AAAI 2019).

    Returns:
      1 where no disease is positive or uncertain, 0 where one is positive, else -1. Support devices are no disease.
    """
    diseases = labels[:, [finding not in _NO_DISEASE for finding in findings]]
    positive, uncertain = (diseases == POSITIVE).any(1), (diseases == UNCERTAIN).any(1)
    return np.where(positive, NEGATIVE, np.where(uncertain, UNCERTAIN, POSITIVE)).astype(np.int8)


def translate(
    labels: Int8[np.ndarray, "N K"], available: Sequence[str], wanted: Sequence[str]
) -> Int8[np.ndarray, "N W"]:
    """Say labels of one vocabulary in another, such as ChestX-ray14's in CheXpert's or the other way.

    A finding of the same name or meaning (Effusion and Pleural Effusion) is copied, `No Finding` derived. A wider
    finding (Lung Lesion) is positive or uncertain where one within it (Mass, Nodule) is, and negative where all are and
    there is nothing else to it. A narrower finding is negative where the wider one is, and uncertain where that is
    positive: it may be another. What the labels cannot tell is not mentioned: train and score such findings with
    `not_mentioned="unknown"`.

    Args:
      labels: of the `available` findings.
      available: names of the K columns.
      wanted: names of the W columns to make.
    """
    column = {finding: labels[:, k] for k, finding in enumerate(available)}
    return np.stack([_translated(finding, column, labels, available) for finding in wanted], axis=1)


def _translated(
    finding: str, column: Mapping[str, np.ndarray], labels: np.ndarray, available: Sequence[str]
) -> Int8[np.ndarray, " N"]:
    same = name_in(available, finding)
    if same is not None:
        return column[same]
    if finding == NO_FINDING:
        return no_finding(labels, available)
    result = np.full(len(labels), NOT_MENTIONED, np.int8)
    within = [column[name] for name in _WITHIN.get(finding, ()) if name in column]
    if within:
        parts = np.stack(within)
        if finding in _WHOLE and len(parts) == len(_WITHIN[finding]):
            result[(parts == NEGATIVE).all(0)] = NEGATIVE
        result[(parts == UNCERTAIN).any(0)] = UNCERTAIN
        result[(parts == POSITIVE).any(0)] = POSITIVE
        return result
    for wider in (column[name] for name, parts in _WITHIN.items() if finding in parts and name in column):
        result[((wider == POSITIVE) | (wider == UNCERTAIN)) & (result != NEGATIVE)] = UNCERTAIN
        result[wider == NEGATIVE] = NEGATIVE
    return result


def name_in(available: Sequence[str], finding: str) -> str | None:
    """What a vocabulary calls a finding, which may have another name of the same meaning there; None without it."""
    return next((name for name in (finding, _SAME.get(finding)) if name in available), None)


def positions(wanted: Sequence[str], available: Sequence[str]) -> list[int]:
    """Say where each wanted finding stands in the available ones.

    Raises:
      CxrError: a finding is unknown (the message names the nearest right ones) or wanted twice.
    """
    index = {finding: k for k, finding in enumerate(available)}
    for finding in wanted:
        if finding not in index:
            raise CxrError(f"unknown finding {finding!r}: {_nearest(finding, available)}")
    if len(set(wanted)) < len(wanted):
        raise CxrError(f"finding {next(f for f in wanted if list(wanted).count(f) > 1)!r} is listed twice")
    return [index[finding] for finding in wanted]


def _nearest(finding: str, available: Sequence[str]) -> str:
    """A hint: the findings whose names are most like this one, or all of them."""
    folded = {name.casefold().replace("_", " "): name for name in available}
    asked = finding.casefold().replace("_", " ")
    near = [folded[key] for key in difflib.get_close_matches(asked, folded, n=3)]
    near += [name for key, name in folded.items() if name not in near and (asked in key or key in asked)]
    return f"did you mean {' or '.join(near)}?" if near else f"the findings are {', '.join(available)}"
