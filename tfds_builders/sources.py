"""Builders of images that lie as files below a folder: finding them, reading their tables, matching the two."""

import abc
import csv
import gzip
import io
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import tensorflow_datasets as tfds

from cxrjax.data.images import square_margins
from cxrjax.data.records import Box, Record
from cxrjax.errors import CxrError
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN
from tfds_builders.builder import Radiographs, Stored, stored_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
"""Of files that are taken for images; what they are, their content decides."""

ASPECTS = ("stretch", "pad")
"""How an image becomes a square: stretched, or in the middle of a black one."""

Files = dict[str, Path]

_LABELS = {"1": POSITIVE, "0": NEGATIVE, "-1": UNCERTAIN, "": NOT_MENTIONED}


@dataclass(frozen=True)
class Selection:
    """Which records are prepared, and what does not match.

    Attributes:
      records: rows of the table whose image is there.
      paths: their images, by id.
      missing: ids of rows without an image.
      unlisted: images without a row.
      notes: one line each, what a user should know of them.
      sizes: width and height of images in px, by id, where the source's tables tell.
    """

    records: list[Record]
    paths: Files
    missing: list[str]
    unlisted: list[str]
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def subset(self) -> bool:
        """Whether most of the table's images are absent, so that the source must be meant as a subset."""
        return len(self.missing) > len(self.records)


def match(
    table: Sequence[Record], paths: Files, source: object, allow_missing: bool, notes: Iterable[str] = ()
) -> Selection:
    """Match the label table with the images that are there.

    A source with less than half of the table's images is taken for what it is, a subset. With half of them or more it
    is meant to be the archive, and an image that is missing is an error, unless `allow_missing`; so is always an image
    that the table does not list.

    Raises:
      CxrError: counts and names what does not match.
    """
    listed = {record.id for record in table}
    found = Selection(
        [record for record in table if record.id in paths],
        paths,
        [record.id for record in table if record.id not in paths],
        sorted(paths.keys() - listed),
        list(notes),
    )
    if not found.records:
        if not paths:
            raise CxrError(f"none of the {len(table):,} images of the table is below {source}: {some(found.missing)}")
        raise CxrError(f"none of the {len(paths):,} images below {source} is in the label table, such as {min(paths)}")
    mend = "; complete the source, or pass --allow-missing to go on without"
    if found.missing and not found.subset and not allow_missing:
        raise CxrError(
            f"{len(found.missing):,} of the table's {len(table):,} images are not below {source}: "
            f"{some(found.missing)}{mend}"
        )
    if found.unlisted and not allow_missing:
        raise CxrError(
            f"{len(found.unlisted):,} images below {source} are not in the table: {some(found.unlisted)}{mend}"
        )
    return found


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


class FromFiles(Radiographs, skip_registration=True):
    """Base of the builders whose images are files.

    Attributes:
      source: folder with the files.
      allow_missing: whether to go on if images of the table are missing, or images are not in the table.
      aspect: how images become squares, one of `ASPECTS`; images of their own size stay as they are.
      selection: after `select`, what is prepared and what does not match.
    """

    def __init__(
        self, *, source: Path | str | None = None, allow_missing: bool = False, aspect: str = "stretch", **kwargs: Any
    ):
        """Makes the builder; see the attributes, and `Radiographs` for the rest."""
        if aspect not in ASPECTS:
            raise CxrError(f"unknown aspect {aspect!r}; choose {' or '.join(ASPECTS)}")
        self.aspect = aspect
        self.source = None if source is None else Path(source)
        self.allow_missing = allow_missing
        self.selection: Selection | None = None
        super().__init__(**kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """What the content depends on; the aspect only where it is another than all data had that know of none."""
        return {**super().options, "aspect": "pad"} if self._pads else super().options

    @property
    def _pads(self) -> bool:
        return self.aspect == "pad" and self.size is not None

    @abc.abstractmethod
    def select(self) -> Selection:
        """What would be prepared from the source folder.

        Raises:
          CxrError: it cannot be used; the message says what is wrong with which file.
        """

    def _records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        self.selection = self.select()
        return self.selection.records

    def adopt(self, other: Self) -> None:
        """Take over the other's selection."""
        self.selection = other.selection

    def store(self, record: Record, sides: Sequence[int | None]) -> list[Stored]:
        """The record's file at some sizes."""
        assert self.selection is not None
        return stored_file(self.selection.paths[record.id], sides, self.ENCODING, self.aspect)

    def as_stored(self, record: Record, sha256: str, width: int, height: int) -> Record:
        """The record with its boxes where the stored image has them."""
        stored = super().as_stored(record, sha256, width, height)
        if not self._pads:
            return stored
        return replace(stored, boxes=tuple(_on_square(box, width, height) for box in stored.boxes))

    def stamp(self, record: Record) -> str:
        """Size and time of the record's file."""
        assert self.selection is not None
        try:
            found = self.selection.paths[record.id].stat()
        except OSError:  # reading it says so by its name
            return ""
        return f"{found.st_size} {found.st_mtime_ns}"


def _on_square(box: Box, width: int, height: int) -> Box:
    """A box of an image that was padded to a square."""
    side, top, left = square_margins(height, width)
    x, y = (box.x * width + left) / side, (box.y * height + top) / side
    return replace(box, x=x, y=y, w=box.w * width / side, h=box.h * height / side)


def find_files(source: Path, unique: Collection[str], what: str) -> Files:
    """Find every file anywhere below a folder, by its name; links are followed.

    Args:
      source: the folder.
      unique: endings of names that may be there once only.
      what: that the folder should hold, for the error message.

    Raises:
      CxrError: the folder does not exist, or two images have the same name.
    """
    if not source.is_dir():
        raise CxrError(f"source folder {source} does not exist; give the folder with {what}")
    files: Files = {}
    for path in walk(source):
        if path.name in files and path.name.lower().endswith(tuple(unique)):
            raise CxrError(f"image {path.name} is there twice, {files[path.name]} and {path}; keep one")
        files.setdefault(path.name, path)
    return files


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder; links are followed."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names)


def read_rows(path: Path, needed: Collection[str], mend: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV, plain or compressed (`.gz`), with their line numbers.

    Args:
      path: the table.
      needed: columns it must have; others may be there.
      mend: what to do about a table that cannot be read.

    Raises:
      CxrError: the file cannot be read, or lacks a column.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, mend), newline=""), restval="")
    columns = list(reader.fieldnames or ())
    if missing := [name for name in needed if name not in columns]:
        raise CxrError(f"{path} lacks the column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}")
    for row in reader:
        yield reader.line_num, row


def read_label(row: dict[str, str], finding: str, where: str) -> int:
    """A label as CheXpert's tables have it: 1.0, 0.0, -1.0 (uncertain) or empty (not mentioned), with or without ".0".

    Raises:
      CxrError: it is none of these.
    """
    text = row[finding].strip()
    label = _LABELS.get(text.removesuffix(".0"))
    if label is None:
        raise CxrError(f"{where}: {finding} is {text!r}; a label is 1, 0, -1 (uncertain) or empty (not mentioned)")
    return label


def read_text(path: Path, mend: str) -> str:
    """A text file, plain or compressed (`.gz`).

    Raises:
      CxrError: it cannot be read.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CxrError(f"{path} cannot be read: {error}; {mend}") from error
