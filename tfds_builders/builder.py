"""Base class of the TFDS builders, and how an image file is stored."""

import abc
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.utils.py_utils import classproperty

from cxrjax.data.images import decode, encode, is_plain_grey, pad_to_square, resize
from cxrjax.data.records import Record, Records, records_to_table
from cxrjax.data.splits import OFFICIAL_SPLITS, check_leakage
from cxrjax.errors import CxrError
from tfds_builders.build import build_datasets

_TEXT = ("id", "patient", "study", "view", "sex", "source", "official")


@dataclass
class SizeConfig(tfds.core.BuilderConfig):
    """Builder config of a stored size in px; None stores images at the size of the source."""

    size: int | None = None


def size_configs(*sizes: int | None) -> list[SizeConfig]:
    """Make one config per stored size; the first is the default."""
    return [
        SizeConfig(
            name=str(size or "native"),
            description=f"resized to {size} x {size} pixels" if size else "at the size and aspect of the source",
            size=size,
        )
        for size in sizes
    ]


@dataclass(frozen=True)
class StoredImage:
    """An encoded image for a shard, with the sha256 and the size in px of its source."""

    image: bytes
    sha256: str
    mask: bytes | None = None
    width: int = 0
    height: int = 0


class RadiographBuilder(FileReaderBuilder, skip_registration=True):
    """Base class of the builders.

    A record has the features id, patient, study, view, age, sex, source, official, labels, boxes and image, and mask if
    the data set has masks (bit k is finding k). `records.parquet` beside the shards has all but the images.

    Attributes:
      FINDINGS: names of the labels.
      ENCODING: of resized images: "jpeg" (quality 95) or "png".
      HAS_MASKS: whether records have masks.
      PUBLISHED_COUNTS: numbers of images, patients, and images of each official split in the published data set.
      ALLOW_LEAKAGE: whether to prepare data with a patient in two official splits; the official split is then refused.
    """

    FINDINGS: tuple[str, ...] = ()
    ENCODING = "png"
    HAS_MASKS = False
    PUBLISHED_COUNTS: Mapping[str, int] = MappingProxyType({})
    ALLOW_LEAKAGE = False

    def __init__(self, *, workers: int | None = None, file_format: str = "array_record", **kwargs):
        """Make the builder.

        Args:
          workers: number of threads that make images; None uses one per core.
          file_format: of the shards; `cxrjax` reads only "array_record".
          **kwargs: data_dir, config and version, as for any TFDS builder.
        """
        self.workers = workers or os.cpu_count() or 1
        super().__init__(file_format=file_format, **kwargs)

    @classproperty
    @classmethod
    def code_path(cls) -> epath.Path:
        """Path of the builder's module. TFDS's own lookup needs a package that TFDS does not install."""
        return epath.Path(inspect.getfile(cls))

    @abc.abstractmethod
    def _read_records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        """Read all records in order, without sha256; a builder that downloads makes a manager if it gets None."""

    @abc.abstractmethod
    def make_images(self, record: Record, sizes: Sequence[int | None]) -> list[StoredImage]:
        """Make a record's image at some sizes in px (None: the source's); must be thread-safe."""

    @property
    def options(self) -> dict[str, Any]:
        """Options that determine the content besides the source; stored in the table."""
        return {"masks": self.HAS_MASKS}

    @property
    def size(self) -> int | None:
        """Stored size in px; None for the size of the source."""
        config = self.builder_config
        assert isinstance(config, SizeConfig)
        return config.size

    def shard_length(self, count: int) -> int:
        """Return the number of records per shard for `count` records: about a sixteenth, within bounds.

        The bounds limit the work lost by an interruption and the number of open files. A power of two, so that the
        shards of all sizes start at the same records.
        """
        largest = 1024 if self.size and self.size <= 1024 else 512
        return max(64, min(largest, 1 << (count // 16).bit_length()))

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {name: tfds.features.Text() for name in _TEXT}
        features["age"] = tfds.features.Scalar(np.float32)
        features["labels"] = tfds.features.Tensor(shape=(len(self.FINDINGS),), dtype=np.int8)
        finding = tfds.features.ClassLabel(names=self.FINDINGS)
        features["boxes"] = tfds.features.Sequence({"finding": finding, "bbox": tfds.features.BBoxFeature()})
        shape = (self.size, self.size, 1)
        encoding = self.ENCODING if self.size else "png"
        features["image"] = tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format=encoding)
        if self.HAS_MASKS:
            features["mask"] = tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format="png")
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def download_and_prepare(
        self,
        *,
        download_dir: epath.PathLike | None = None,
        download_config: tfds.download.DownloadConfig | None = None,
        **_: Any,
    ) -> None:
        """Prepare the data set if it is not prepared yet; TFDS's equivalent of `cxrjax prepare`."""
        if not Path(self.data_dir).exists():
            config = download_config or tfds.download.DownloadConfig()
            manager = self._make_download_manager(download_dir=download_dir, download_config=config)
            self._download_and_prepare(manager, config)

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        build_datasets([self], self.records(dl_manager))

    def records(self, dl_manager: tfds.download.DownloadManager | None = None) -> Sequence[Record]:
        """Read and check all records in order; afterwards `make_images` can be called."""
        records = self._read_records(dl_manager)
        check_ids(records)
        if not self.ALLOW_LEAKAGE:
            check_official_splits(records, self.FINDINGS)
        return records

    def copy_source_from(self, other: Self) -> None:
        """Copy what another builder of the same data read in `records`, so that this one can make images too."""

    def with_image_info(self, record: Record, sha256: str, width: int, height: int) -> Record:
        """Return the record as stored, with the sha256 and the size in px of its source image."""
        return replace(record, sha256=sha256, width=width, height=height)

    def source_stamp(self, record: Record) -> str:
        """Return a string that changes with the source image, without reading the image."""
        return ""

    def encode_record(self, record: Record, image: StoredImage) -> dict[str, Any]:
        """Return the record as values of the TFDS features."""
        example: dict[str, Any] = {name: getattr(record, name) for name in (*_TEXT, "age")}
        example["labels"] = np.array(record.labels, np.int8)
        example["boxes"] = [
            {
                "finding": box.finding,
                "bbox": tfds.features.BBox(ymin=box.y, xmin=box.x, ymax=box.y + box.h, xmax=box.x + box.w),
            }
            for box in record.boxes
        ]
        example["image"] = image.image
        return example if image.mask is None else {**example, "mask": image.mask}


def encode_file(path: Path, sizes: Sequence[int | None], encoding: str, aspect: str = "stretch") -> list[StoredImage]:
    """Encode an image file at some sizes, decoding it once.

    At its own size (None), an 8-bit grey file keeps its bytes; all others are encoded as PNG.

    Args:
      path: the file.
      sizes: in px.
      encoding: of resized images, "jpeg" or "png".
      aspect: how an image becomes square: "stretch", or "pad" with black.

    Raises:
      CxrError: the file cannot be read or is not a radiograph; the message names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CxrError(f"{path}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    image = decode(data, str(path))
    height, width = image.shape
    square = pad_to_square(image) if aspect == "pad" and any(sizes) else image

    def encode_at(size: int | None) -> bytes:
        if size is not None:
            return encode(resize(square, size), encoding)
        return data if is_plain_grey(data) else encode(image, "png")

    return [StoredImage(encode_at(size), digest, width=width, height=height) for size in sizes]


def check_ids(records: Sequence[Record]) -> None:
    """Raise a `CxrError` if there are no records or two have the same id."""
    if not records:
        raise CxrError("there is no record to prepare")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise CxrError(f"two records have the id {record.id}; ids must be unique")
        seen.add(record.id)


def check_official_splits(records: Sequence[Record], findings: Sequence[str]) -> None:
    """Raise a `CxrError` that names the patients in two official splits, if there are any."""
    table = Records(None, "source", "table", tuple(findings), "", records_to_table(records, findings))
    check_leakage(
        table, {split: np.flatnonzero(table.official == split) for split in sorted(OFFICIAL_SPLITS, reverse=True)}
    )
