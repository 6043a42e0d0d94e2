"""MIMIC-CXR-JPG's own tables: which image is in which part, its view, and the labels of its study."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxrjax.data.records import Record
from cxrjax.data.splits import SPLIT_ALIASES
from cxrjax.errors import CxrError
from cxrjax.findings import CHEXPERT14, NOT_MENTIONED
from tfds_builders.sources import Files, read_label, read_rows

PAGE = "https://physionet.org/content/mimic-cxr-jpg/"
SOURCE = "MIMIC-CXR-JPG"
LABELLERS = ("chexpert", "negbio")

_KEY = ("dicom_id", "study_id", "subject_id")


@dataclass(frozen=True)
class Tables:
    """What the tables say.

    Attributes:
      records: one per image of the table of parts, in its order.
      unlabelled: studies without a row in the table of labels; theirs are all not mentioned.
      viewless: images without a row in the table of metadata.
      sizes: width and height in px that the table of metadata gives, by id.
    """

    records: list[Record]
    unlabelled: list[str]
    viewless: list[str]
    sizes: dict[str, tuple[int, int]]


def read(files: Files, source: object, labeller: str) -> Tables:
    """Read the three tables, each plain or compressed (`.gz`); columns are found by name, further ones do not matter.

    Args:
      files: the published files by name.
      source: where they are from, for error messages.
      labeller: whose labels, one of `LABELLERS`.

    Raises:
      CxrError: a table or a column is missing, or a row cannot be understood; the message names it.
    """
    labels = _labels(_path(files, labeller, source))
    views, sizes = _metadata(_path(files, "metadata", source))
    path = _path(files, "split", source)
    records: list[Record] = []
    unlabelled: dict[str, None] = {}
    seen: dict[str, int] = {}
    for line, row in _rows(path, (*_KEY, "split")):
        id, study, patient = (row[column] for column in _KEY)
        part = SPLIT_ALIASES.get(row["split"])
        if part is None:
            raise CxrError(f"{path}, line {line}: unknown part {row['split']!r}; parts are train, validate and test")
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
                age=math.nan,  # only MIMIC-IV has it, and the sex
                sex="",
                source=SOURCE,
                labels=labels.get(study, (NOT_MENTIONED,) * len(CHEXPERT14)),
                official=part,
            )
        )
    return Tables(records, list(unlabelled), [record.id for record in records if record.id not in views], sizes)


def _labels(path: Path) -> dict[str, tuple[int, ...]]:
    """The labels of each study: 1.0, 0.0, -1.0 or empty."""
    labels: dict[str, tuple[int, ...]] = {}
    for line, row in _rows(path, ("subject_id", "study_id", *CHEXPERT14)):
        if row["study_id"] in labels:
            raise CxrError(f"{path}, line {line}: study {row['study_id']} has a second row; keep one")
        labels[row["study_id"]] = tuple(read_label(row, finding, f"{path}, line {line}") for finding in CHEXPERT14)
    return labels


def _metadata(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """The view and the size of each image, by id."""
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
    for line, row in read_rows(path, columns, f"get it anew from {PAGE}"):
        yield line, {column: row[column].strip() for column in columns}


def _path(files: Files, kind: str, source: object) -> Path:
    """The table of a kind, whichever version its name says; the newest, and a plain one before a compressed one."""
    pattern = re.compile(rf"mimic-cxr-(\d+)\.(\d+)\.(\d+)-{kind}\.csv(\.gz)?")
    found = [(match, path) for name, path in files.items() if (match := pattern.fullmatch(name))]
    if not found:
        raise CxrError(f"no mimic-cxr-2.0.0-{kind}.csv.gz anywhere below {source}; get it from {PAGE}")
    return max(found, key=lambda entry: ([int(number) for number in entry[0].groups()[:3]], not entry[0][4]))[1]
