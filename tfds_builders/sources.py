"""Base of the builders of image files: find files, read tables, and match the two."""

import abc
import csv
import io
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import tensorflow_datasets as tfds

from cxrjax.data.images import square_margins
from cxrjax.data.records import Box, Record
from cxrjax.errors import CxrError, list_some
from cxrjax.files import read_text
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN
from tfds_builders.builder import RadiographBuilder, StoredImage, encode_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
"""Suffixes of image files; the format itself is detected from the content."""

ASPECTS = ("stretch", "pad")
"""How an image becomes square: stretched, or padded with black."""

Files = dict[str, Path]
"""Paths by file name or record id."""

_LABELS = {"1": POSITIVE, "0": NEGATIVE, "-1": UNCERTAIN, "": NOT_MENTIONED}


@dataclass(frozen=True)
class Selection:
    """The records to prepare, and the mismatches between table and files.

    Attributes:
      records: rows of the table whose image exists.
      paths: image files, by id.
      missing: ids of rows without an image.
      unlisted: ids of images without a row.
      notes: notes for the user, one line each.
      sizes: width and height of images in px, by id, as far as the source's tables have them.
    """

    records: list[Record]
    paths: Files
    missing: list[str]
    unlisted: list[str]
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_subset(self) -> bool:
        """Whether most images of the table are missing, so that the source is taken for a subset."""
        return len(self.missing) > len(self.records)


def match_images(
    table: Sequence[Record], paths: Files, source: object, allow_missing: bool, notes: Iterable[str] = ()
) -> Selection:
    """Match the records of a table with the image files.

    A source with less than half of the table's images is taken for a subset. Otherwise a missing image is an error
    unless `allow_missing`, and so is, in both cases, an image that the table does not list.

    Raises:
      CxrError: counts and names the mismatches.
    """
    listed = {record.id for record in table}
    selection = Selection(
        [record for record in table if record.id in paths],
        paths,
        [record.id for record in table if record.id not in paths],
        sorted(paths.keys() - listed),
        list(notes),
    )
    missing, unlisted = selection.missing, selection.unlisted
    if not selection.records:
        if not paths:
            raise CxrError(f"none of the {len(table):,} images of the table is below {source}: {list_some(missing)}")
        raise CxrError(f"none of the {len(paths):,} images below {source} is in the label table, such as {min(paths)}")
    fix = "; complete the source, or pass --allow-missing to skip them"
    if missing and not selection.is_subset and not allow_missing:
        raise CxrError(
            f"{len(missing):,} of the table's {len(table):,} images are not below {source}: {list_some(missing)}{fix}"
        )
    if unlisted and not allow_missing:
        raise CxrError(f"{len(unlisted):,} images below {source} are not in the table: {list_some(unlisted)}{fix}")
    return selection


class FileBuilder(RadiographBuilder, skip_registration=True):
    """Base class of the builders whose images are files.

    Attributes:
      source: folder with the files.
      allow_missing: whether to continue if images are missing or not in the table.
      aspect: how images become square, one of `ASPECTS`; images at the size of the source are not changed.
      selection: the result of `select`, once it was called by `records`.
    """

    def __init__(
        self, *, source: Path | str | None = None, allow_missing: bool = False, aspect: str = "stretch", **kwargs: Any
    ):
        """Make the builder; see the attributes, and `RadiographBuilder` for the other arguments."""
        if aspect not in ASPECTS:
            raise CxrError(f"unknown aspect {aspect!r}; choose {' or '.join(ASPECTS)}")
        self.aspect = aspect
        self.source = None if source is None else Path(source)
        self.allow_missing = allow_missing
        self.selection: Selection | None = None
        super().__init__(**kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """Options that determine the content; the aspect only where images are padded."""
        return {**super().options, "aspect": "pad"} if self._pads else super().options

    @property
    def _pads(self) -> bool:
        return self.aspect == "pad" and self.size is not None

    @abc.abstractmethod
    def select(self) -> Selection:
        """Read the source's tables and match them with its images.

        Raises:
          CxrError: the source cannot be used; the message names the file.
        """

    def _read_records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        self.selection = self.select()
        return self.selection.records

    def copy_source_from(self, other: Self) -> None:
        """Copy the other builder's selection."""
        self.selection = other.selection

    def make_images(self, record: Record, sizes: Sequence[int | None]) -> list[StoredImage]:
        """Encode the record's file at some sizes."""
        assert self.selection is not None
        return encode_file(self.selection.paths[record.id], sizes, self.ENCODING, self.aspect)

    def with_image_info(self, record: Record, sha256: str, width: int, height: int) -> Record:
        """Return the record as stored, with its boxes moved by the padding."""
        stored = super().with_image_info(record, sha256, width, height)
        if not self._pads:
            return stored
        return replace(stored, boxes=tuple(_pad_box(box, width, height) for box in stored.boxes))

    def source_stamp(self, record: Record) -> str:
        """Return the size and the modification time of the record's file."""
        assert self.selection is not None
        try:
            status = self.selection.paths[record.id].stat()
        except OSError:  # reading the file reports the error
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"


def _pad_box(box: Box, width: int, height: int) -> Box:
    """Convert a box to fractions of the padded square image."""
    side, top, left = square_margins(height, width)
    x, y = (box.x * width + left) / side, (box.y * height + top) / side
    return replace(box, x=x, y=y, w=box.w * width / side, h=box.h * height / side)


def find_files(source: Path, unique: Collection[str], content: str) -> Files:
    """Find all files below a folder, by file name; follows links.

    Args:
      source: the folder.
      unique: suffixes of names that may occur only once.
      content: what the folder should contain, for the error message.

    Raises:
      CxrError: the folder does not exist, or two images have the same name.
    """
    if not source.is_dir():
        raise CxrError(f"source folder {source} does not exist; give the folder with {content}")
    files: Files = {}
    for path in walk_files(source):
        if path.name in files and path.name.lower().endswith(tuple(unique)):
            raise CxrError(f"image {path.name} exists twice, {files[path.name]} and {path}; keep one")
        files.setdefault(path.name, path)
    return files


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder; follows links."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names)


def read_csv(path: Path, required: Collection[str], fix: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV, plain or compressed (`.gz`), with their line numbers.

    Args:
      path: the table.
      required: columns it must have; other columns are allowed.
      fix: what to do if the table cannot be read, for the error message.

    Raises:
      CxrError: the file cannot be read or lacks a column.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, fix), newline=""), restval="")
    columns = list(reader.fieldnames or ())
    if missing := [name for name in required if name not in columns]:
        raise CxrError(f"{path} lacks the column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}")
    for row in reader:
        yield reader.line_num, row


def read_label(row: dict[str, str], finding: str, where: str) -> int:
    """Parse a label: 1, 0, -1 (uncertain) or empty (not mentioned), also with a decimal as in CheXpert's tables (1.0).

    Raises:
      CxrError: it is something else.
    """
    text = row[finding].strip()
    label = _LABELS.get(text.removesuffix(".0"))
    if label is None:
        raise CxrError(f"{where}: {finding} is {text!r}; a label is 1, 0, -1 (uncertain) or empty (not mentioned)")
    return label
