"""TFDS builder of the phantom: synthetic radiographs with exact findings and masks."""

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import tensorflow_datasets as tfds

from cxrjax.data import phantom
from cxrjax.data.images import encode
from cxrjax.data.records import Record
from cxrjax.findings import PHANTOM
from tfds_builders.builder import RadiographBuilder, StoredImage, size_configs

SOURCE = "phantom"
PATIENTS = 2600  # about 4,200 images
_TEST_FRACTION = 0.2


class Builder(RadiographBuilder):
    """Synthetic radiographs of a seeded population, with a mask for every finding.

    Stored as lossless PNG at every size, since the finest findings are textures of one or two pixels.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - required by TFDS
    BUILDER_CONFIGS = size_configs(256, 32, 64, 128, 512, 1024, 2048)
    FINDINGS = PHANTOM
    HAS_MASKS = True

    def __init__(self, *, patients: int = PATIENTS, seed: int = 0, **kwargs: Any):
        """Make the builder.

        Args:
          patients: number of patients, with about 1.6 images each.
          seed: of the population; a larger population starts with the smaller one of the same seed.
          **kwargs: workers, data_dir, config, version.
        """
        self.patients, self.seed = patients, seed
        super().__init__(**kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """Options that determine the content."""
        return {**super().options, "patients": self.patients, "seed": self.seed}

    def _read_records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        population = phantom.sample_population(self.seed, self.patients)
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
                official=_draw_official_split(self.seed, radiograph.patient),
            )
            for radiograph in population
        ]

    def copy_source_from(self, other: Self) -> None:
        """Copy the other builder's population."""
        self._radiographs = other._radiographs

    def make_images(self, record: Record, sizes: Sequence[int | None]) -> list[StoredImage]:
        """Draw the radiograph and its masks at some sizes."""
        radiograph = self._radiographs[record.id]
        return [_draw(radiograph, size) for size in sizes if size is not None]


def _draw(radiograph: phantom.Radiograph, size: int) -> StoredImage:
    image = phantom.render(radiograph, size)
    bits = np.zeros_like(image)
    for finding, mask in phantom.render_masks(radiograph, size).items():
        bits |= mask.astype(np.uint8) << PHANTOM.index(finding)
    digest = hashlib.sha256(image.tobytes() + bits.tobytes()).hexdigest()
    return StoredImage(encode(image, "png"), digest, encode(bits, "png"))


def _draw_official_split(seed: int, patient: str) -> str:
    """Assign a fifth of the patients to the test split, independent of the size of the population."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{patient}".encode()).digest()[:8], "big") / 2**64
    return "test" if draw < _TEST_FRACTION else "train_val"
