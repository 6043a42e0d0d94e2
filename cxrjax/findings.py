"""Findings: the vocabularies of the data sets, and how uncertain and missing labels are trained.

A label is one int8 per record and finding: `POSITIVE`, `NEGATIVE`, `UNCERTAIN` (the report hedges) or `NOT_MENTIONED`
(the report is silent). A `LabelPolicy` turns labels into targets and a mask; masked labels are in no loss and no score.
`translate` converts labels from one vocabulary to another.
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
"""The findings of the CheXpert and NegBio labellers, in the column order of MIMIC-CXR-JPG's tables."""

SIX_CLASS = ("Covid-19", "Effusions", "Infiltration", "No-Findings", "Pneumonia", "Pneumothorax")
"""Six exclusive classes: the folder names of the COVID-19 and NIH image mixture."""

PHANTOM = ("Cardiomegaly", "Pleural Effusion", "Mass", "Nodule", "Pneumothorax", "Reticulation", "Support Devices")
"""The findings that the phantom draws, from coarse to fine."""

VOCABULARIES = {"chestxray14": NIH14, "mimic_cxr_jpg": CHEXPERT14, "six_class": SIX_CLASS, "cxr_phantom": PHANTOM}
"""Findings of the data sets that always have the same ones."""

NO_FINDING = "No Finding"

ONES_SMOOTHED, ZEROS_SMOOTHED = (0.55, 0.85), (0.0, 0.3)
"""Ranges of the smoothed U-Ones and U-Zeros (U-Ones+LSR and U-Zeros+LSR of Pham et al., Neurocomputing 2021)."""

_UNCERTAIN = ("zeros", "ones", "ignore", "smooth")
_SAME = {"Effusion": "Pleural Effusion", "Pleural Effusion": "Effusion"}
_WITHIN = {
    "Lung Lesion": ("Mass", "Nodule"),
    "Lung Opacity": ("Infiltration", "Consolidation", "Edema", "Pneumonia", "Atelectasis", "Mass", "Nodule"),
    "Pleural Other": ("Pleural_Thickening",),
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
}  # CheXpert's hierarchy (Irvin et al., AAAI 2019, figure 1), with the findings of ChestX-ray14 added
_WHOLE = ("Lung Lesion",)  # the findings it includes are exhaustive
_NO_DISEASE = (NO_FINDING, "Support Devices")


@dataclass(frozen=True)
class LabelPolicy:
    """How uncertain and missing labels are trained and scored.

    Attributes:
      uncertain: "zeros" trains an uncertain label as negative, "ones" as positive, "ignore" masks it (U-Zeros, U-Ones
        and U-Ignore of Irvin et al., AAAI 2019); "smooth" draws its target from `smooth_range`.
      not_mentioned: "negative" trains a finding that the report does not mention as absent, "unknown" masks it.
      smooth_range: lowest and highest target of "smooth", uniform between; see `ONES_SMOOTHED` and `ZEROS_SMOOTHED`.
      seed: seed of the drawn targets. Each target depends only on the seed, the record's id and the finding.
      per_finding: policies of findings that differ from this one.
    """

    uncertain: Literal["zeros", "ones", "ignore", "smooth"] = "zeros"
    not_mentioned: Literal["negative", "unknown"] = "negative"
    smooth_range: tuple[float, float] = ONES_SMOOTHED
    seed: int = 0
    per_finding: Mapping[str, "LabelPolicy"] = field(default_factory=dict)

    def __post_init__(self):
        for name, allowed in (("uncertain", _UNCERTAIN), ("not_mentioned", ("negative", "unknown"))):
            if getattr(self, name) not in allowed:
                raise CxrError(f"label policy {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if len(self.smooth_range) != 2 or not 0 <= self.smooth_range[0] <= self.smooth_range[1] <= 1:
            raise CxrError(
                f"label policy smooth_range={self.smooth_range} is not a lowest and a highest target from 0 to 1"
            )
        if any(policy.per_finding for policy in self.per_finding.values()):
            raise CxrError("a per-finding label policy cannot have per-finding policies itself")

    @property
    def scored(self) -> "LabelPolicy":
        """The policy for scores: drawn targets are masked, because nobody stated them."""
        uncertain = "ignore" if self.uncertain == "smooth" else self.uncertain
        per_finding = {finding: policy.scored for finding, policy in self.per_finding.items()}
        return replace(self, uncertain=uncertain, per_finding=per_finding)


def make_targets(
    labels: Int8[np.ndarray, "N K"],
    policy: LabelPolicy,
    *,
    findings: Sequence[str] | None = None,
    ids: Sequence[str] | np.ndarray | None = None,
) -> tuple[Float32[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """Turn labels into training targets and a mask.

    Args:
      labels: 1 positive, 0 negative, -1 uncertain, -2 not mentioned.
      policy: what the last two count as.
      findings: names of the K columns; required by per-finding policies and "smooth".
      ids: record ids; required by "smooth".

    Returns:
      The targets, 0 to 1 (0 where masked), and the label mask, False where a target is unknown.

    Raises:
      CxrError: a label is none of the four values (the message names its row and column), a per-finding policy names
        an unknown finding, or names or ids are missing.
    """
    wrong = np.argwhere((labels < NOT_MENTIONED) | (labels > POSITIVE))
    if len(wrong):
        row, column = wrong[0]
        raise CxrError(f"label {labels[row, column]} in row {row}, column {column}: a label is 1, 0, -1 or -2")
    smooth = any(rule.uncertain == "smooth" for rule in (policy, *policy.per_finding.values()))
    if (smooth or policy.per_finding) and findings is None:
        raise CxrError("smoothed targets and per-finding label policies need the names of the findings")
    if smooth and ids is None:
        raise CxrError("smoothed targets need the ids of the records")
    names = ("",) * labels.shape[1] if findings is None else tuple(findings)
    finding_indices(list(policy.per_finding), names)
    target, label_mask = (labels == POSITIVE).astype(np.float32), np.ones(labels.shape, bool)
    for column, name in enumerate(names):
        rule = policy.per_finding.get(name, policy)
        uncertain = labels[:, column] == UNCERTAIN
        if rule.uncertain == "ones":
            target[uncertain, column] = 1
        elif rule.uncertain == "ignore":
            label_mask[uncertain, column] = False
        elif rule.uncertain == "smooth":
            target[uncertain, column] = _draws(rule, name, np.asarray(ids)[uncertain])
        if rule.not_mentioned == "unknown":
            label_mask[labels[:, column] == NOT_MENTIONED, column] = False
    return target, label_mask


def _draws(policy: LabelPolicy, finding: str, ids: Iterable[str]) -> list[float]:
    """One uniform draw per record, independent of the other records and of their order."""
    low, high = policy.smooth_range
    digests = (hashlib.sha256(f"{policy.seed}/{finding}/{id}".encode()).digest() for id in ids)
    return [low + (high - low) * int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]


def derive_no_finding(labels: Int8[np.ndarray, "N K"], findings: Sequence[str]) -> Int8[np.ndarray, " N"]:
    """Derive `No Finding` from the other labels, as the CheXpert labeller does (Irvin et al., AAAI 2019).

    It is 1 if no disease is positive or uncertain, 0 if one is positive, else -1. Support devices are not a disease.
    """
    diseases = labels[:, [finding not in _NO_DISEASE for finding in findings]]
    positive, uncertain = (diseases == POSITIVE).any(1), (diseases == UNCERTAIN).any(1)
    return np.where(positive, NEGATIVE, np.where(uncertain, UNCERTAIN, POSITIVE)).astype(np.int8)


def translate_labels(
    labels: Int8[np.ndarray, "N K"], available: Sequence[str], findings: Sequence[str]
) -> Int8[np.ndarray, "N M"]:
    """Convert labels of the `available` findings to others, such as from ChestX-ray14's to CheXpert's or back.

    A finding of the same name or meaning (Effusion and Pleural Effusion) is copied; `No Finding` is derived. A broader
    finding (Lung Lesion) is positive or uncertain if a finding it includes (Mass, Nodule) is, and negative if all of
    them are and they are exhaustive. A narrower finding is negative if the broader one is, and uncertain if that is
    positive or uncertain. All else is "not mentioned": train and score such findings with `not_mentioned="unknown"`.
    """
    column = {finding: labels[:, k] for k, finding in enumerate(available)}
    return np.stack([_translated(finding, column, labels, available) for finding in findings], axis=1)


def _translated(
    finding: str, column: Mapping[str, np.ndarray], labels: np.ndarray, available: Sequence[str]
) -> Int8[np.ndarray, " N"]:
    same = matching_name(available, finding)
    if same is not None:
        return column[same]
    if finding == NO_FINDING:
        return derive_no_finding(labels, available)
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


def matching_name(available: Sequence[str], finding: str) -> str | None:
    """Return the name that a vocabulary has for a finding, which may be a synonym; None if it lacks the finding."""
    return next((name for name in (finding, _SAME.get(finding)) if name in available), None)


def finding_indices(findings: Sequence[str], available: Sequence[str]) -> list[int]:
    """Return the index of each finding among the available ones.

    Raises:
      CxrError: a finding is unknown (the message names the nearest known ones) or listed twice.
    """
    index = {finding: k for k, finding in enumerate(available)}
    for finding in findings:
        if finding not in index:
            raise CxrError(f"unknown finding {finding!r}: {_nearest(finding, available)}")
    if len(set(findings)) < len(findings):
        raise CxrError(f"finding {next(f for f in findings if list(findings).count(f) > 1)!r} is listed twice")
    return [index[finding] for finding in findings]


def _nearest(finding: str, available: Sequence[str]) -> str:
    """A hint: the most similar findings, or all of them."""
    folded = {name.casefold().replace("_", " "): name for name in available}
    name_sought = finding.casefold().replace("_", " ")
    near = [folded[key] for key in difflib.get_close_matches(name_sought, folded, n=3)]
    near += [name for key, name in folded.items() if name not in near and (name_sought in key or key in name_sought)]
    return f"did you mean {' or '.join(near)}?" if near else f"the findings are {', '.join(available)}"
