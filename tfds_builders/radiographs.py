"""What the builders share: records in table order, images made in parallel, the table beside the shards, a final check.

Built on `ShardBasedBuilder`, because it streams: the writer of `GeneratorBasedBuilder` would hold a data set in memory
when its order is to be kept, and needs TensorFlow as soon as there is more than 1 GB of it.
"""

import abc
import contextlib
import hashlib
import inspect
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.utils.py_utils import classproperty

from cxrjax import console
from cxrjax.data.images import decode, encode, is_plain, resize
from cxrjax.data.records import Record, Records, as_table, read_directory, write_table
from cxrjax.data.splits import OFFICIAL, check_leakage
from cxrjax.errors import CxrError

Item = TypeVar("Item")
Result = TypeVar("Result")

SPLIT = "records"  # the only TFDS split: what is trained on is decided later, by patient
_SHARD_BYTES = 2**28  # the writer holds one shard in memory
_BYTES_PER_PIXEL = 0.6  # of encoded radiographs


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


class Radiographs(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Base of the builders of radiographs.

    A record has the features id, patient, study, view, age, sex, source, official, labels, boxes and image (and mask,
    where the data set has masks: bit k is finding k). `records.parquet` beside the shards holds all but the images.

    Attributes:
      FINDINGS: names of the labels.
      ENCODING: of resized images: "jpeg" (quality 95) or "png".
      MASKS: whether records have masks.
      LEAKS: whether data with a patient in two official parts are prepared, so that only the official split is refused.
    """

    FINDINGS: tuple[str, ...] = ()
    ENCODING = "png"
    MASKS = False
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
    def _records(self, dl_manager: tfds.download.DownloadManager) -> Sequence[Record]:
        """Every record to be written, in order, without sha256."""

    @abc.abstractmethod
    def _store(self, record: Record) -> Stored:
        """Makes one record's image; called from many threads at once."""

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

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        self._written: list[Record] = []
        with contextlib.ExitStack() as self._closing:  # after an error, the images under way are dropped
            super()._download_and_prepare(dl_manager, download_config)
        directory = Path(self.data_path)
        about = {"dataset": self.name, "config": str(self.builder_config_name), "version": str(self.version)}
        write_table(directory, self._written, self.FINDINGS, options=self.options, **about)
        read_directory(directory).verify()

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        records = check(self._records(dl_manager), self.FINDINGS, self.LEAKS)
        pixels = (self.size or 1024) ** 2
        length = int(max(1, min(10_000, _SHARD_BYTES / (_BYTES_PER_PIXEL * pixels))))
        stream = self._closing.enter_context(contextlib.closing(self._examples(records)))
        return {SPLIT: [partial(itertools.islice, stream, length) for _ in range(0, len(records), length)]}

    def _examples(self, records: Sequence[Record]) -> Generator[tuple[int, dict[str, Any]], None, None]:
        with console.bar(f"{self.name}/{self.builder_config_name}", len(records)) as advance:
            images = in_order(self._store, records, workers=self.workers)
            for row, (record, stored) in enumerate(zip(records, images, strict=True)):
                about = {name: getattr(stored, name) for name in ("sha256", "width", "height")}
                self._written.append(replace(record, **about))
                yield row, self._example(record, stored)
                advance()

    def _example(self, record: Record, stored: Stored) -> dict[str, Any]:
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


def stored_file(path: Path, size: int | None, encoding: str) -> Stored:
    """An image file as it is stored: the same bytes if it is 8-bit grey and keeps its size, else encoded anew.

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
    if size is not None:
        kept = encode(resize(image, size), encoding)
    else:
        kept = data if is_plain(data) else encode(image, "png")
    return Stored(kept, digest, width=width, height=height)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int = 4
) -> Iterator[Result]:
    """Map in threads, in order; at most `ahead` results per worker wait. OpenCV and hashing release the GIL."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
    table = Records(None, "source", "table", tuple(findings), "", as_table(records, findings))
    check_leakage(table, {part: np.flatnonzero(table.official == part) for part in sorted(OFFICIAL, reverse=True)})
