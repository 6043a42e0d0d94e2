"""What the builders share: records in table order, their features, and how an image file is stored."""

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
from tfds_builders import shards


@dataclass
class SizeConfig(tfds.core.BuilderConfig):
    """A stored size: the side in pixels, or None for images as their source has them."""

    size: int | None = None


def sizes(*sides: int | None) -> list[SizeConfig]:
    """One config per stored size; the first is the default."""
    return [
        SizeConfig(
            name=str(side or "native"),
            description=f"resized to {side} x {side} pixels" if side else "at the size and aspect of the source",
            size=side,
        )
        for side in sides
    ]


@dataclass(frozen=True)
class Stored:
    """One image on its way into a shard: encoded, with the digest and the size in px of what it was made from."""

    image: bytes
    sha256: str
    mask: bytes | None = None
    width: int = 0
    height: int = 0


class Radiographs(FileReaderBuilder, skip_registration=True):
    """Base of the builders of radiographs.

    A record has the features id, patient, study, view, age, sex, source, official, labels, boxes and image (and mask,
    where the data set has masks: bit k is finding k). `records.parquet` beside the shards holds all but the images.

    Attributes:
      FINDINGS: names of the labels.
      ENCODING: of resized images: "jpeg" (quality 95) or "png".
      MASKS: whether records have masks.
      PUBLISHED: how many images, patients, and images of each official part the whole data set has.
      LEAKS: whether data with a patient in two official parts are prepared, so that only the official split is refused.
    """

    FINDINGS: tuple[str, ...] = ()
    ENCODING = "png"
    MASKS = False
    PUBLISHED: Mapping[str, int] = MappingProxyType({})
    LEAKS = False

    def __init__(self, *, workers: int | None = None, file_format: str = "array_record", **kwargs):
        """Makes the builder.

        Args:
          workers: threads that make images; None takes one per core.
          file_format: of the shards; only "array_record" is read again by `cxrjax`.
          **kwargs: data_dir, config and version, as of any TFDS builder.
        """
        self.workers = workers or os.cpu_count() or 1
        super().__init__(file_format=file_format, **kwargs)

    @classproperty
    @classmethod
    def code_path(cls) -> epath.Path:
        """The builder's file. TFDS's own way to find it needs a package that TFDS does not install."""
        return epath.Path(inspect.getfile(cls))

    @abc.abstractmethod
    def _records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        """Every record to be written, in order, without sha256; without a manager, what downloads makes its own."""

    @abc.abstractmethod
    def store(self, record: Record, sides: Sequence[int | None]) -> list[Stored]:
        """Makes one record's image at some sizes, None its own; called from many threads at once."""

    @property
    def options(self) -> dict[str, Any]:
        """What the content depends on beside the source; the table keeps it."""
        return {"masks": self.MASKS}

    @property
    def size(self) -> int | None:
        """Side of the stored images in pixels; None keeps the source's."""
        config = self.builder_config
        assert isinstance(config, SizeConfig)
        return config.size

    def shard_length(self, count: int) -> int:
        """How many of `count` records a shard holds: a sixteenth, unless that is very many or few.

        That is no more work than one likes to lose, and few enough files to hold them all open. A power of two, so that
        the shards of all sizes begin with the same records.
        """
        most = 1024 if self.size and self.size <= 1024 else 512
        return max(64, min(most, 1 << (count // 16).bit_length()))

    def _info(self) -> tfds.core.DatasetInfo:
        text = ("id", "patient", "study", "view", "sex", "source", "official")
        features: dict[str, Any] = {name: tfds.features.Text() for name in text}
        features["age"] = tfds.features.Scalar(np.float32)
        features["labels"] = tfds.features.Tensor(shape=(len(self.FINDINGS),), dtype=np.int8)
        finding = tfds.features.ClassLabel(names=self.FINDINGS)
        features["boxes"] = tfds.features.Sequence({"finding": finding, "bbox": tfds.features.BBoxFeature()})
        shape = (self.size, self.size, 1)
        encoding = self.ENCODING if self.size else "png"
        features["image"] = tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format=encoding)
        if self.MASKS:
            features["mask"] = tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format="png")
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def download_and_prepare(
        self,
        *,
        download_dir: epath.PathLike | None = None,
        download_config: tfds.download.DownloadConfig | None = None,
        **_: Any,
    ) -> None:
        """Prepare what is not there yet; TFDS's entrance to what `cxrjax prepare` does."""
        if not Path(self.data_dir).exists():
            config = download_config or tfds.download.DownloadConfig()
            manager = self._make_download_manager(download_dir=download_dir, download_config=config)
            self._download_and_prepare(manager, config)

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        shards.make([self], self.records(dl_manager))

    def records(self, dl_manager: tfds.download.DownloadManager | None = None) -> Sequence[Record]:
        """Every record to be written, in order, checked; afterwards `store` can make their images."""
        return check(self._records(dl_manager), self.FINDINGS, self.LEAKS)

    def adopt(self, other: Self) -> None:
        """Take over what another builder of the same data found in `records`, to make images of it too."""

    def as_stored(self, record: Record, sha256: str, width: int, height: int) -> Record:
        """The record of an image that is stored, with its digest and the size of what it was made from."""
        return replace(record, sha256=sha256, width=width, height=height)

    def stamp(self, record: Record) -> str:
        """Says, without reading it, whether a record's image has changed."""
        return ""

    def example(self, record: Record, stored: Stored) -> dict[str, Any]:
        """The record as TFDS's features take it."""
        names = ("id", "patient", "study", "view", "sex", "source", "official", "age")
        example: dict[str, Any] = {name: getattr(record, name) for name in names}
        example["labels"] = np.array(record.labels, np.int8)
        example["boxes"] = [
            {
                "finding": box.finding,
                "bbox": tfds.features.BBox(ymin=box.y, xmin=box.x, ymax=box.y + box.h, xmax=box.x + box.w),
            }
            for box in record.boxes
        ]
        example["image"] = stored.image
        return example if stored.mask is None else {**example, "mask": stored.mask}


def stored_file(path: Path, sides: Sequence[int | None], encoding: str, aspect: str = "stretch") -> list[Stored]:
    """An image file as it is stored at some sizes, read and decoded once.

    At its own size (None) it keeps its bytes if it is 8-bit grey; else it is encoded anew.

    Args:
      path: the file.
      sides: in px.
      encoding: of resized images, "jpeg" or "png".
      aspect: how an image becomes a square: "stretch", or "pad" with black first.

    Raises:
      CxrError: the file cannot be read, or is no radiograph; the message names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CxrError(f"{path}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    image = decode(data, str(path))
    height, width = image.shape
    whole = pad_to_square(image) if aspect == "pad" and any(sides) else image

    def kept(side: int | None) -> bytes:
        if side is not None:
            return encode(resize(whole, side), encoding)
        return data if is_plain_grey(data) else encode(image, "png")

    return [Stored(kept(side), digest, width=width, height=height) for side in sides]


def check(records: Sequence[Record], findings: Sequence[str], leaks: bool = False) -> Sequence[Record]:
    """Check that ids are unique, and, unless `leaks` are for the split to refuse, no patient in two official parts.

    Raises:
      CxrError: names the ids or the patients; also if there are no records.
    """
    if not records:
        raise CxrError("there is no record to prepare")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise CxrError(f"two records have the id {record.id}; ids must be unique")
        seen.add(record.id)
    if not leaks:
        check_parts(records, findings)
    return records


def check_parts(records: Sequence[Record], findings: Sequence[str]) -> None:
    """Check that no patient is in two official parts.

    Raises:
      CxrError: names the patients that are.
    """
    table = Records(None, "source", "table", tuple(findings), "", records_to_table(records, findings))
    check_leakage(table, {part: np.flatnonzero(table.official == part) for part in sorted(OFFICIAL_SPLITS, reverse=True)})
