"""Findings: the vocabularies of the data sets, and what a label that is not a plain yes or no means in training.

A label is one int8 per record and finding: `POSITIVE`, `NEGATIVE`, `UNCERTAIN` (the report hedges) or `NOT_MENTIONED`
(the report is silent). A `LabelPolicy` turns labels into a target value and whether that value is known; an unknown one
is in no loss and in no score.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LabelPolicy:
    """What an uncertain or absent label is trained and scored as.

    Attributes:
      uncertain: "zeros" takes an uncertain label as negative, "ones" as positive, "ignore" as unknown (U-Zeros, U-Ones
        and U-Ignore of Irvin et al., AAAI 2019).
      not_mentioned: "negative" takes a finding that the report does not mention as absent, "unknown" as unknown.
    """

    uncertain: Literal["zeros", "ones", "ignore"] = "zeros"
    not_mentioned: Literal["negative", "unknown"] = "negative"

    def __post_init__(self):
        for field, allowed in (("uncertain", ("zeros", "ones", "ignore")), ("not_mentioned", ("negative", "unknown"))):
            if getattr(self, field) not in allowed:
                raise CxrError(f"label policy {field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")


def targets(
    labels: Int8[np.ndarray, "N K"], policy: LabelPolicy
) -> tuple[Float32[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """Turn labels into what a loss or a score takes.

    Args:
      labels: 1 positive, 0 negative, -1 uncertain, -2 not mentioned.
      policy: what the last two count as.

    Returns:
      The target values, 0 or 1 (0 where unknown), and whether each is known.

    Raises:
      CxrError: a label is none of the four values; the message names its row and column.
    """
    wrong = np.argwhere((labels < NOT_MENTIONED) | (labels > POSITIVE))
    if len(wrong):
        row, column = wrong[0]
        raise CxrError(f"label {labels[row, column]} in row {row}, column {column}: a label is 1, 0, -1 or -2")
    positive = labels == POSITIVE
    if policy.uncertain == "ones":
        positive = positive | (labels == UNCERTAIN)
    known = np.ones(labels.shape, bool)
    if policy.uncertain == "ignore":
        known &= labels != UNCERTAIN
    if policy.not_mentioned == "unknown":
        known &= labels != NOT_MENTIONED
    return positive.astype(np.float32), known


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
