"""TFDS builder of radiographs in folders by split and class: train/CLASS/, validation/CLASS/, test/CLASS/."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.data.splits import SPLIT_ALIASES
from cxrjax.errors import CxrError
from tfds_builders.sources import SUFFIXES, Selection, match_images, read_csv, walk_files
from tfds_builders.user_dataset import (
    UserDatasetBuilder,
    add_metadata,
    folder_name,
    make_record,
    with_drawn_validation,
)

METADATA = "metadata.csv"
"""Optional table beside the folders with metadata of the images, by file name."""

_PATIENT = ("patient", "patientid")


class Builder(UserDatasetBuilder):
    """Radiographs of exclusive classes, one folder each."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - required by TFDS
    EXCLUSIVE = True

    def __init__(self, *, source: Path | str | None = None, **kwargs: Any):
        """Make the builder.

        Args:
          source: the folder with the split or class folders.
          **kwargs: name, allow_missing, workers, data_dir, config, version.

        Raises:
          CxrError: `source` is missing, or its folders are neither classes nor splits with classes.
        """
        if source is None:
            raise CxrError("--source is missing: the folder that holds train, validation and test, or one per class")
        self.folders = list(self.find_folders(Path(source)))
        self.FINDINGS = self.classes()
        super().__init__(source=source, **kwargs)

    def find_folders(self, source: Path) -> Iterator[tuple[str, str, Path]]:
        """Yield split, class and path of each image folder; the split is "" if there are only class folders."""
        if not source.is_dir():
            raise CxrError(f"source folder {source} does not exist")
        splits = {folder: SPLIT_ALIASES.get(folder.name.lower()) for folder in _folders(source)}
        if not any(splits.values()):
            yield from (("", self.class_of(folder), folder) for folder in splits)
            return
        owner: dict[str, Path] = {}
        for folder, split in splits.items():
            if split is None:
                raise CxrError(f"{folder} is not train, validation or test, as the folders beside it; move it away")
            if owner.setdefault(split, folder) != folder:
                raise CxrError(f"{owner[split]} and {folder} are both the {split} split; keep one")
            yield from ((split, self.class_of(inner), inner) for inner in _folders(folder))

    def class_of(self, folder: Path) -> str:
        """Return the class of a folder."""
        return folder.name

    def classes(self) -> tuple[str, ...]:
        """Return the classes, in the order of the labels."""
        classes = tuple(sorted({name for _, name, _ in self.folders}))
        if len(classes) < 2:
            raise CxrError(
                f"{len(classes)} classes ({', '.join(classes) or 'none'}); --source must have folders train, "
                "validation and test with one folder per class each, or one folder per class"
            )
        return classes

    def with_file_name_metadata(self, record: Record, path: Path) -> Record:
        """Return the record with metadata from its file name."""
        return record

    def select(self) -> Selection:
        """Select the images of every class folder, in the order of their paths."""
        assert self.source is not None
        metadata = _read_metadata(self.source)
        records, paths, others = [], {}, []
        for split, name, folder in self.folders:
            labels = tuple(int(name == finding) for finding in self.FINDINGS)
            for path in sorted(walk_files(folder)):
                if not path.name.lower().endswith(SUFFIXES):
                    others += [] if path.name.startswith(".") else [path]
                    continue
                id = path.relative_to(self.source).as_posix()
                where, row = metadata.get(path.name, ("", {}))
                patient = next((row[column].strip() for column in _PATIENT if row.get(column)), "")
                record = make_record(id, patient, folder_name(self.source), labels)
                record = add_metadata(self.with_file_name_metadata(record, path), row, where)
                records.append(replace(record, official=split) if split else record)
                paths[id] = path
        if not records:
            raise CxrError(f"no image in the class folders of {self.source}; images end in {', '.join(SUFFIXES)}")
        images = (path for path in walk_files(self.source) if path.suffix.lower() in SUFFIXES)
        all_paths = {path.relative_to(self.source).as_posix(): path for path in images}
        notes = self.collect_notes(records)
        if others:
            notes.append(f"{len(others):,} files are skipped because of their suffix, such as {others[0]}")
        records = with_drawn_validation(records)
        return match_images(records, all_paths | paths, self.source, self.allow_missing, notes)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_metadata(source: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Read the table, if it exists: by file name, where each row is (for error messages) and the row."""
    path = source / METADATA
    if not path.is_file():
        return {}
    metadata: dict[str, tuple[str, dict[str, str]]] = {}
    for line, row in read_csv(path, ("filename",), "it is optional, so delete it if it is not a table of the images"):
        name = row["filename"].strip()
        if name in metadata:
            raise CxrError(f"{path}, line {line}: {name} has a second row; keep one")
        metadata[name] = f"{path}, line {line}", row
    return metadata
