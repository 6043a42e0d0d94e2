"""Patients, their studies and what each image truly shows, drawn independently of how it was taken."""

from dataclasses import dataclass, replace

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, PHANTOM, POSITIVE, UNCERTAIN, positions

PREVALENCE = {finding: 0.30 if finding == "Cardiomegaly" else 0.25 for finding in PHANTOM}
"""Share of studies in which each finding is present."""
UNCERTAIN_PRESENT, UNCERTAIN_ABSENT, UNMENTIONED_ABSENT = 0.05, 0.02, 0.25
"""How reports hide the truth: a present finding may be called uncertain, an absent one also not be mentioned."""


@dataclass(frozen=True, slots=True)
class Radiograph:
    """The description of one image; `render` and `masks` turn it into pixels of any size.

    Attributes:
      id: unique key, such as `p00012_s1_0` (patient, study, image).
      patient: key of the patient.
      study: key of the study; its images show the same findings.
      view: "PA" or "AP".
      age: years.
      sex: "F" or "M".
      labels: per finding of `PHANTOM` 1, 0, -1 (uncertain) or -2 (not mentioned), as a report would have it.
      present: per finding of `PHANTOM` whether the image truly shows it.
      body: seed of the patient's anatomy.
      disease: seed of the findings' place, size and strength.
      exposure: seed of pose, exposure, noise, electrodes and markers.
    """

    id: str
    patient: str
    study: str
    view: str
    age: int
    sex: str
    labels: tuple[int, ...]
    present: tuple[bool, ...]
    body: int
    disease: int
    exposure: int

    def shows(self, finding: str) -> bool:
        """Whether the finding of `PHANTOM` is truly present."""
        return self.present[PHANTOM.index(finding)]


def population(seed: int, patients: int) -> list[Radiograph]:
    """Describe a population: about 1.6 images per patient, in the order of patients, studies and images.

    Three in ten patients come back once or twice; one study in seven has a second image. Findings are drawn per
    study, independently of each other, of the patient and of the view. A longer population begins with the
    shorter one of the same seed.

    Args:
      seed: any non-negative integer.
      patients: how many patients.

    Raises:
      CxrError: if `seed` or `patients` is negative.
    """
    if seed < 0 or patients < 0:
        raise CxrError(f"population: seed and patients must not be negative, got {seed} and {patients}")
    prevalence = np.array(list(PREVALENCE.values()))
    radiographs = []
    for number in range(patients):
        rng = np.random.default_rng([seed, number])
        patient = f"p{number:05d}"
        age, sex, body = int(rng.integers(18, 91)), "FM"[rng.integers(2)], int(rng.integers(2**62))
        for study_number in range(1, 1 + int(np.searchsorted([0.7, 0.9], rng.random(), side="right")) + 1):
            study = f"{patient}_s{study_number}"
            present = rng.random(len(PHANTOM)) < prevalence
            labels = _reported(present, rng.random(len(PHANTOM)))
            disease = int(rng.integers(2**62))
            for image in range(1 + int(rng.random() < 1 / 7)):
                radiographs.append(
                    Radiograph(
                        id=f"{study}_{image}", patient=patient, study=study,
                        view="AP" if rng.random() < 0.4 else "PA", age=age, sex=sex,
                        labels=tuple(labels.tolist()), present=tuple(present.tolist()),
                        body=body, disease=disease, exposure=int(rng.integers(2**62)),
                    )
                )  # fmt: skip
    return radiographs


def _reported(present: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The labels a report gives: the truth, except for what is called uncertain or left out."""
    labels = np.where(present, POSITIVE, NEGATIVE)
    unclear = chance < np.where(present, UNCERTAIN_PRESENT, UNCERTAIN_ABSENT)
    unsaid = ~present & (chance > 1 - UNMENTIONED_ABSENT)
    return np.where(unclear, UNCERTAIN, np.where(unsaid, NOT_MENTIONED, labels)).astype(np.int8)


def with_findings(radiograph: Radiograph, *findings: str) -> Radiograph:
    """The same patient, pose and exposure with exactly these findings present, and labelled so.

    Raises:
      CxrError: on a finding that is not one of `PHANTOM`.
    """
    wanted = set(positions(findings, PHANTOM))
    present = tuple(k in wanted for k in range(len(PHANTOM)))
    return replace(radiograph, present=present, labels=tuple(POSITIVE if p else NEGATIVE for p in present))
