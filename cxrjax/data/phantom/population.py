"""Population of patients and studies with the true findings of each image, independent of its exposure."""

from dataclasses import dataclass, replace

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, PHANTOM, POSITIVE, UNCERTAIN, finding_indices

PREVALENCE = {finding: 0.30 if finding == "Cardiomegaly" else 0.25 for finding in PHANTOM}
"""Fraction of studies with each finding."""
UNCERTAIN_PRESENT, UNCERTAIN_ABSENT, UNMENTIONED_ABSENT = 0.05, 0.02, 0.25
"""Label noise of reports: a present finding may be uncertain, an absent one uncertain or not mentioned."""


@dataclass(frozen=True, slots=True)
class Radiograph:
    """Description of one image, which `render` and `render_masks` draw at any size.

    Attributes:
      id: unique, such as `p00012_s1_0` (patient, study, image).
      patient: the patient's id.
      study: the study's id; its images show the same findings.
      view: "PA" or "AP".
      age: in years.
      sex: "F" or "M".
      labels: reported label of each finding of `PHANTOM`, encoded as in `Record`.
      present: whether each finding of `PHANTOM` is truly present.
      body: seed of the patient's anatomy.
      disease: seed of the findings' position, size and contrast.
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
        """Return whether a finding of `PHANTOM` is truly present."""
        return self.present[PHANTOM.index(finding)]


def sample_population(seed: int, patients: int) -> list[Radiograph]:
    """Sample a population with about 1.6 images per patient, ordered by patient, study and image.

    Three in ten patients return once or twice, and one study in seven has a second image. Findings are sampled per
    study, independently of each other, the patient and the view. A larger population starts with the smaller one of
    the same seed.

    Raises:
      CxrError: `seed` or `patients` is negative.
    """
    if seed < 0 or patients < 0:
        raise CxrError(f"phantom: seed and patients must not be negative, got {seed} and {patients}")
    prevalence = np.array(list(PREVALENCE.values()))
    radiographs = []
    for number in range(patients):
        rng = np.random.default_rng([seed, number])
        patient = f"p{number:05d}"
        age, sex, body = int(rng.integers(18, 91)), "FM"[rng.integers(2)], int(rng.integers(2**62))
        for study_number in range(1, 1 + int(np.searchsorted([0.7, 0.9], rng.random(), side="right")) + 1):
            study = f"{patient}_s{study_number}"
            present = rng.random(len(PHANTOM)) < prevalence
            labels = _report(present, rng.random(len(PHANTOM)))
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


def _report(present: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Return the reported labels: the truth, except for uncertain and omitted findings."""
    labels = np.where(present, POSITIVE, NEGATIVE)
    uncertain = chance < np.where(present, UNCERTAIN_PRESENT, UNCERTAIN_ABSENT)
    omitted = ~present & (chance > 1 - UNMENTIONED_ABSENT)
    return np.where(uncertain, UNCERTAIN, np.where(omitted, NOT_MENTIONED, labels)).astype(np.int8)


def with_findings(radiograph: Radiograph, *findings: str) -> Radiograph:
    """Return the same patient, pose and exposure with exactly these findings present and labelled.

    Raises:
      CxrError: a finding is not in `PHANTOM`.
    """
    selected = set(finding_indices(findings, PHANTOM))
    present = tuple(k in selected for k in range(len(PHANTOM)))
    return replace(radiograph, present=present, labels=tuple(POSITIVE if p else NEGATIVE for p in present))
