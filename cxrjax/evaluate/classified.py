"""What a network says of images: as arrays, as a table, and for JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64
from scipy.special import expit

from cxrjax.evaluate import tables


@dataclass(frozen=True, eq=False)
class Classified:
    """N images, K findings.

    Attributes:
      id: unique names of the images.
      file: where each came from.
      findings: K names.
      logit: f64[N, K], log p / (1 - p).
      calibrated: f64[N, K], the probabilities at the temperatures fitted on validation; None without these.
      called: bool[N, K], whether a finding's probability is at least its threshold; the likeliest of exclusive classes.
      uncertainty: f64[N, K], of each finding, or f64[N, 1] over exclusive classes; see `measure`.
      measure: what uncertainty is, in words.
      threshold: the uncertainty of an image above which it is flagged; None where none is known.
      failed: files that could not be used, each with the reason.
      notes: what the user should know of the above, a line each.
    """

    id: tuple[str, ...]
    file: tuple[Path, ...]
    findings: tuple[str, ...]
    logit: Float64[np.ndarray, "N K"]
    calibrated: Float64[np.ndarray, "N K"] | None
    called: Bool[np.ndarray, "N K"]
    uncertainty: Float64[np.ndarray, "N k"]
    measure: str
    threshold: float | None
    failed: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def probability(self) -> Float64[np.ndarray, "N K"]:
        """The logistic function of the logits, 0 to 1."""
        return expit(self.logit)

    @property
    def of_image(self) -> Float64[np.ndarray, " N"]:
        """The uncertainty of each image: the mean over its findings."""
        return self.uncertainty.mean(1)

    @property
    def flag(self) -> Bool[np.ndarray, " N"] | None:
        """Which images are too uncertain to be trusted; None without a threshold."""
        return None if self.threshold is None else self.of_image > self.threshold

    def write(self, path: Path) -> None:
        """A table that `cxrjax score` reads.

        Columns: `id`, `file`; per finding F `prob_F`, `logit_F`, `calibrated_F` (where fitted) and `uncertainty_F` (but
        over exclusive classes); `uncertainty` of the image and, where a threshold is known, `flag`.
        """
        columns = {"id": pa.array(self.id, pa.string()), "file": pa.array(map(str, self.file), pa.string())}
        for prefix, values in self._by_finding().items():
            columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(self.findings)}
        columns["uncertainty"] = pa.array(self.of_image)
        if self.flag is not None:
            columns["flag"] = pa.array(self.flag)
        tables.write(path, pa.table(columns))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an entry per image, and what all have in common."""
        named = {"prob": "probability", "calibrated": "calibrated", "uncertainty": "uncertainty_by_finding"}
        by_finding = {named[name]: values for name, values in self._by_finding().items() if name in named}
        images = []
        for n, name in enumerate(self.id):
            image: dict[str, Any] = {"id": name, "file": str(self.file[n])}
            for key, values in by_finding.items():
                image[key] = dict(zip(self.findings, values[n].tolist(), strict=True))
            image["uncertainty"] = float(self.of_image[n])
            if self.flag is not None:
                image["flag"] = bool(self.flag[n])
            images.append(image)
        about = {"uncertainty": self.measure, "threshold": self.threshold, "notes": list(self.notes)}
        return {"images": images, "failed": self.failed, **about}

    def _by_finding(self) -> dict[str, Float64[np.ndarray, "N K"]]:
        values = {"prob": self.probability, "logit": self.logit}
        if self.calibrated is not None:
            values["calibrated"] = self.calibrated
        if self.uncertainty.shape[1] == len(self.findings):
            values["uncertainty"] = self.uncertainty
        return values
