"""Read NIH's published files of ChestX-ray14: labels, official splits, boxes and images."""

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path

from cxrjax.data.records import Box, Record, Records
from cxrjax.errors import CxrError
from cxrjax.files import read_text
from cxrjax.findings import NIH14
from tfds_builders import sources
from tfds_builders.sources import Files

PAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
SOURCE = "NIH ChestX-ray14"
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the first one found is read
TRAIN_VAL_LIST, TEST_LIST, BOXES = "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"

_SIDE = 1024  # size of the published images in px; boxes are in px
_COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "View Position")
_SEX = ("Patient Gender", "Patient Sex")  # NIH renamed the column
_AGE = re.compile(r"(\d+)([YMWD]?)")
_YEARS = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
_OLDEST = 120
_SPELLINGS = {"Infiltrate": "Infiltration"}  # in the table of boxes
_DOWNLOAD_AGAIN = f"download it again from {PAGE}"


def find_files(source: Path) -> Files:
    """Find all files below a folder, by file name; see `sources.find_files`."""
    return sources.find_files(source, (".png",), "NIH's images and tables")


def select_images(files: Files, source: object) -> Files:
    """Return the image files.

    Raises:
      CxrError: there are none.
    """
    images = {name: path for name, path in files.items() if name.lower().endswith(".png")}
    if not images:
        packed = [name for name in files if name.endswith((".tar.gz", ".tgz", ".zip"))]
        fix = f"unpack {', '.join(sorted(packed)[:3])} there" if packed else f"get images_001.tar.gz ... from {PAGE}"
        raise CxrError(f"no .png image anywhere below {source}; {fix}")
    return images


def read_records(files: Files, source: object) -> list[Record]:
    """Read all records of the label table, in its order, with official splits and boxes.

    Args:
      files: the published files by name, plain or compressed (`.gz`).
      source: their origin, for error messages.

    Raises:
      CxrError: a file or a column is missing, or a row is invalid; the message names it.
    """
    table = next((name for name in TABLES if _path(files, name)), None)
    if table is None:
        raise CxrError(f"no label table below {source}; get {TABLES[0]} from {PAGE}")
    official = _read_official_splits(files, source)
    boxes = _read_boxes(files)
    records: list[Record] = []
    lines: dict[str, int] = {}
    for line, row in _rows(files, table):
        record = _parse_record(row, f"{table}, line {line}", official, boxes)
        if record.id in lines:
            raise CxrError(f"{table}: image {record.id} has two rows, lines {lines[record.id]} and {line}; keep one")
        lines[record.id] = line
        records.append(record)
    return records


def read_table(source: Path) -> Records:
    """Read the label table of a folder as records without images."""
    return Records.from_records(read_records(find_files(source), source), NIH14, dataset="chestxray14")


def _parse_record(row: dict[str, str], where: str, official: dict[str, str], boxes: dict[str, list[Box]]) -> Record:
    id = row["Image Index"].strip()
    try:
        patient, visit = f"{int(row['Patient ID']):08d}", int(row["Follow-up #"])
    except ValueError as error:
        raise CxrError(f"{where} ({id}): patient or follow-up is not a number: {error}") from error
    return Record(
        id=id,
        patient=patient,
        study=f"{patient}_{visit:03d}",
        view=row["View Position"].strip(),
        age=_parse_age(row["Patient Age"].strip(), f"{where} ({id})"),
        sex=next(row[column] for column in _SEX if column in row).strip(),
        source=SOURCE,
        labels=_parse_labels(row["Finding Labels"], f"{where} ({id})"),
        official=official.get(id, ""),
        boxes=tuple(boxes.get(id, ())),
    )


def _parse_labels(text: str, where: str) -> tuple[int, ...]:
    names = [name.strip() for name in text.split("|")]
    if names == ["No Finding"]:
        return (0,) * len(NIH14)
    for name in names:
        if name not in NIH14:
            raise CxrError(f"{where}: unknown finding {name!r} in {text!r}; the findings are {', '.join(NIH14)}")
    return tuple(int(finding in names) for finding in NIH14)


def _parse_age(text: str, where: str) -> float:
    """Parse an age in years; older tables have 058Y or 011M. Ages above 120 are errors of the table, so unknown."""
    match = _AGE.fullmatch(text)
    if text and not match:
        raise CxrError(f"{where}: age {text!r} is not a number of years (58, 058Y) or months (011M)")
    years = int(match[1]) / _YEARS[match[2]] if match else math.nan
    return years if years <= _OLDEST else math.nan


def _read_official_splits(files: Files, source: object) -> dict[str, str]:
    """Read the official split of each listed image."""
    split_of: dict[str, str] = {}
    for name, split in ((TRAIN_VAL_LIST, "train_val"), (TEST_LIST, "test")):
        path = _path(files, name)
        if path is None:
            raise CxrError(f"no {name} below {source}; get it from {PAGE}: without it there is no official split")
        for id in filter(None, map(str.strip, read_text(path, _DOWNLOAD_AGAIN).splitlines())):
            if split_of.setdefault(id, split) != split:
                raise CxrError(f"image {id} is in {TRAIN_VAL_LIST} and in {TEST_LIST}; download them again from {PAGE}")
    return split_of


def _read_boxes(files: Files) -> dict[str, list[Box]]:
    """Read the boxes of each image as fractions, if the file exists. Its header is irregular."""
    boxes: dict[str, list[Box]] = {}
    path = _path(files, BOXES)
    if path is None:
        return boxes
    for line, row in enumerate(csv.reader(read_text(path, _DOWNLOAD_AGAIN).splitlines()), start=1):
        if line == 1 or not row:
            continue
        try:
            id, finding, *sides = row[:6]
            x, y, w, h = (float(side) / _SIDE for side in sides)
        except ValueError as error:
            raise CxrError(f"{path}, line {line}: expected an image, a finding and x, y, w, h: {error}") from error
        finding = _SPELLINGS.get(finding, finding)
        if finding not in NIH14:
            raise CxrError(f"{path}, line {line}: unknown finding {finding!r}")
        if not (0 <= x <= x + w <= 1 and 0 <= y <= y + h <= 1):
            raise CxrError(f"{path}, line {line}: the box is outside the image of {_SIDE} x {_SIDE} pixels")
        boxes.setdefault(id, []).append(Box(finding, x, y, w, h))
    return boxes


def _rows(files: Files, table: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table with their line numbers after checking its columns."""
    path = files.get(table) or files[f"{table}.gz"]
    for line, row in sources.read_csv(path, _COLUMNS, _DOWNLOAD_AGAIN):
        if not any(name in row for name in _SEX):
            raise CxrError(f"{path} lacks the column {_SEX[0]}; it has {', '.join(row)}")
        yield line, row


def _path(files: Files, name: str) -> Path | None:
    return files.get(name) or files.get(f"{name}.gz")
