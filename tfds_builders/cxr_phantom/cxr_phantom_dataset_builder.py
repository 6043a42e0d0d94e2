"""The phantom: procedural radiographs whose findings and masks are known exactly."""

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import tensorflow_datasets as tfds

from cxrjax.data import phantom
from cxrjax.data.images import encode
from cxrjax.data.records import Record
from cxrjax.findings import PHANTOM
from tfds_builders.builder import Radiographs, Stored, sizes

SOURCE = "phantom"
PATIENTS = 2600  # about 4,200 images
_TEST_SHARE = 0.2


class Builder(Radiographs):
    """Drawn radiographs of a seeded population, with a mask of every finding.

    Stored as lossless PNG at every size: the finest findings are textures of one or two pixels.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - as TFDS wants it
    BUILDER_CONFIGS = sizes(256, 32, 64, 128, 512, 1024, 2048)
    FINDINGS = PHANTOM
    MASKS = True

    def __init__(self, *, patients: int = PATIENTS, seed: int = 0, **kwargs: Any):
        """Makes the builder.

        Args:
          patients: how many; about 1.6 images each.
          seed: of the population; a larger one of the same seed begins with the smaller one.
          **kwargs: workers, data_dir, config, version.
        """
        self.patients, self.seed = patients, seed
        super().__init__(**kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """What the content depends on."""
        return {**super().options, "patients": self.patients, "seed": self.seed}

    def _records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        population = phantom.population(self.seed, self.patients)
        self._radiographs = {radiograph.id: radiograph for radiograph in population}
        return [
            Record(
                id=radiograph.id,
                patient=radiograph.patient,
                study=radiograph.study,
                view=radiograph.view,
                age=float(radiograph.age),
                sex=radiograph.sex,
                source=SOURCE,
                labels=radiograph.labels,
                official=_official(self.seed, radiograph.patient),
            )
            for radiograph in population
        ]

    def adopt(self, other: Self) -> None:
        """Take over the other's population."""
        self._radiographs = other._radiographs

    def store(self, record: Record, sides: Sequence[int | None]) -> list[Stored]:
        """The radiograph drawn at some sizes, with its masks."""
        radiograph = self._radiographs[record.id]
        return [_draw(radiograph, side) for side in sides if side is not None]


def _draw(radiograph: phantom.Radiograph, side: int) -> Stored:
    image = phantom.render(radiograph, side)
    bits = np.zeros_like(image)
    for finding, mask in phantom.masks(radiograph, side).items():
        bits |= mask.astype(np.uint8) << PHANTOM.index(finding)
    digest = hashlib.sha256(image.tobytes() + bits.tobytes()).hexdigest()
    return Stored(encode(image, "png"), digest, encode(bits, "png"))


def _official(seed: int, patient: str) -> str:
    """A fifth of the patients are the test part, whatever the size of the population."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{patient}".encode()).digest()[:8], "big") / 2**64
    return "test" if draw < _TEST_SHARE else "train_val"
