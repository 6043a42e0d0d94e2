"""Radiographs in folders named by part and class: train/CLASS/, validation/CLASS/, test/CLASS/."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.data.splits import SPLIT_ALIASES
from cxrjax.errors import CxrError
from tfds_builders.sources import SUFFIXES, Selection, match, read_rows, walk
from tfds_builders.user_dataset import Own, blank, details, folder_name, with_drawn_validation

METADATA = "metadata.csv"
"""A table beside the folders that says more of the images, found by their file names."""

_PATIENT = ("patient", "patientid")


class Builder(Own):
    """Radiographs of exclusive classes, one folder each."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - as TFDS wants it
    EXCLUSIVE = True

    def __init__(self, *, source: Path | str | None = None, **kwargs: Any):
        """Makes the builder.

        Args:
          source: the folder that holds the folders.
          **kwargs: name, allow_missing, workers, data_dir, config, version.

        Raises:
          CxrError: there is no source, or its folders are not classes, or parts of classes.
        """
        if source is None:
            raise CxrError("--source is missing: the folder that holds train, validation and test, or one per class")
        self.folders = list(self.find(Path(source)))
        self.FINDINGS = self.classes()
        super().__init__(source=source, **kwargs)

    def find(self, source: Path) -> Iterator[tuple[str, str, Path]]:
        """The part, the class and the path of each folder of images; the part is "" where there are classes only."""
        if not source.is_dir():
            raise CxrError(f"source folder {source} does not exist")
        parts = {folder: SPLIT_ALIASES.get(folder.name.lower()) for folder in _folders(source)}
        if not any(parts.values()):
            yield from (("", self.named(folder), folder) for folder in parts)
            return
        owner: dict[str, Path] = {}
        for folder, part in parts.items():
            if part is None:
                raise CxrError(f"{folder} is none of train, validation and test, which are beside it; move it away")
            if owner.setdefault(part, folder) != folder:
                raise CxrError(f"{owner[part]} and {folder} are both the {part} part; keep one")
            yield from ((part, self.named(inner), inner) for inner in _folders(folder))

    def named(self, folder: Path) -> str:
        """The class of a folder."""
        return folder.name

    def classes(self) -> tuple[str, ...]:
        """The classes, in the order of the labels."""
        found = tuple(sorted({name for _, name, _ in self.folders}))
        if len(found) < 2:
            raise CxrError(
                f"{len(found)} classes ({', '.join(found) or 'none'}); --source is a folder of train, validation and "
                "test, each with one folder per class, or of one folder per class"
            )
        return found

    def described(self, record: Record, path: Path) -> Record:
        """The record with what the file's name says."""
        return record

    def select(self) -> Selection:
        """The images of every class folder, in the order of their paths."""
        assert self.source is not None
        known = _metadata(self.source)
        records, paths, others = [], {}, []
        for part, name, folder in self.folders:
            labels = tuple(int(name == finding) for finding in self.FINDINGS)
            for path in sorted(walk(folder)):
                if not path.name.lower().endswith(SUFFIXES):
                    others += [] if path.name.startswith(".") else [path]
                    continue
                id = path.relative_to(self.source).as_posix()
                where, row = known.get(path.name, ("", {}))
                patient = next((row[column].strip() for column in _PATIENT if row.get(column)), "")
                record = self.described(blank(id, patient, folder_name(self.source), labels), path)
                record = details(record, row, where)
                records.append(replace(record, official=part) if part else record)
                paths[id] = path
        if not records:
            raise CxrError(f"no image in the class folders of {self.source}; images end in {', '.join(SUFFIXES)}")
        stray = {p.relative_to(self.source).as_posix(): p for p in walk(self.source) if p.suffix.lower() in SUFFIXES}
        notes = self.notes(records)
        if others:
            notes.append(f"{len(others):,} files are left out, their names are no image's: such as {others[0]}")
        records = with_drawn_validation(records)
        return match(records, stray | paths, self.source, self.allow_missing, notes)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _metadata(source: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Each image's row of the table, by file name, and where it stands; none without the table."""
    path = source / METADATA
    if not path.is_file():
        return {}
    known: dict[str, tuple[str, dict[str, str]]] = {}
    for line, row in read_rows(path, ("filename",), "it is optional: delete it if it is not a table of the images"):
        name = row["filename"].strip()
        if name in known:
            raise CxrError(f"{path}, line {line}: {name} has a second row; keep one")
        known[name] = f"{path}, line {line}", row
    return known
