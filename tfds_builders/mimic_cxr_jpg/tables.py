"""Read the tables of MIMIC-CXR-JPG: official split and view of each image, labels of each study."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxrjax.data.records import Record
from cxrjax.data.splits import SPLIT_ALIASES
from cxrjax.errors import CxrError
from cxrjax.findings import CHEXPERT14, NOT_MENTIONED
from tfds_builders.sources import Files, read_csv, read_label

PAGE = "https://physionet.org/content/mimic-cxr-jpg/"
SOURCE = "MIMIC-CXR-JPG"
LABELLERS = ("chexpert", "negbio")

_KEY = ("dicom_id", "study_id", "subject_id")


@dataclass(frozen=True)
class Tables:
    """Content of the tables.

    Attributes:
      records: one per image of the split table, in its order.
      unlabelled: studies without a row in the label table; all their labels are not mentioned.
      viewless: images without a row in the metadata table.
      sizes: width and height in px from the metadata table, by id.
    """

    records: list[Record]
    unlabelled: list[str]
    viewless: list[str]
    sizes: dict[str, tuple[int, int]]


def read_tables(files: Files, source: object, labeller: str) -> Tables:
    """Read the three tables, plain or compressed (`.gz`); additional columns are ignored.

    Args:
      files: the published files by name.
      source: their origin, for error messages.
      labeller: one of `LABELLERS`.

    Raises:
      CxrError: a table or a column is missing, or a row is invalid; the message names it.
    """
    labels = _read_labels(_path(files, labeller, source))
    views, sizes = _read_metadata(_path(files, "metadata", source))
    path = _path(files, "split", source)
    records: list[Record] = []
    unlabelled: dict[str, None] = {}
    seen: dict[str, int] = {}
    for line, row in _rows(path, (*_KEY, "split")):
        id, study, patient = (row[column] for column in _KEY)
        split = SPLIT_ALIASES.get(row["split"])
        if split is None:
            raise CxrError(f"{path}, line {line}: unknown split {row['split']!r}; use train, validate or test")
        if seen.setdefault(id, line) != line:
            raise CxrError(f"{path}: image {id} has two rows, lines {seen[id]} and {line}; keep one")
        if study not in labels:
            unlabelled[study] = None
        records.append(
            Record(
                id=id,
                patient=patient,
                study=study,
                view=views.get(id, ""),
                age=math.nan,  # age and sex are only in MIMIC-IV
                sex="",
                source=SOURCE,
                labels=labels.get(study, (NOT_MENTIONED,) * len(CHEXPERT14)),
                official=split,
            )
        )
    return Tables(records, list(unlabelled), [record.id for record in records if record.id not in views], sizes)


def _read_labels(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the labels of each study."""
    labels: dict[str, tuple[int, ...]] = {}
    for line, row in _rows(path, ("subject_id", "study_id", *CHEXPERT14)):
        if row["study_id"] in labels:
            raise CxrError(f"{path}, line {line}: study {row['study_id']} has a second row; keep one")
        labels[row["study_id"]] = tuple(read_label(row, finding, f"{path}, line {line}") for finding in CHEXPERT14)
    return labels


def _read_metadata(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Read the view and the size in px of each image, by id."""
    views, sizes = {}, {}
    for line, row in _rows(path, ("dicom_id", "ViewPosition", "Rows", "Columns")):
        if row["dicom_id"] in views:
            raise CxrError(f"{path}, line {line}: image {row['dicom_id']} has a second row; keep one")
        views[row["dicom_id"]] = row["ViewPosition"]
        try:
            sizes[row["dicom_id"]] = int(row["Columns"]), int(row["Rows"])
        except ValueError:
            raise CxrError(
                f"{path}, line {line}: Rows and Columns are {row['Rows']!r} and {row['Columns']!r}"
            ) from None
    return views, sizes


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    for line, row in read_csv(path, columns, f"download it again from {PAGE}"):
        yield line, {column: row[column].strip() for column in columns}


def _path(files: Files, kind: str, source: object) -> Path:
    """Find the newest version of a table; a plain file is preferred to a compressed one."""
    pattern = re.compile(rf"mimic-cxr-(\d+)\.(\d+)\.(\d+)-{kind}\.csv(\.gz)?")
    versions = [(match, path) for name, path in files.items() if (match := pattern.fullmatch(name))]
    if not versions:
        raise CxrError(f"no mimic-cxr-2.0.0-{kind}.csv.gz anywhere below {source}; get it from {PAGE}")
    return max(versions, key=lambda item: ([int(number) for number in item[0].groups()[:3]], not item[0][4]))[1]
