"""Radiographs that a user's own table lists, with their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.errors import CxrError
from tfds_builders.sources import Selection, match, read_label, read_rows
from tfds_builders.user_dataset import Own, blank, details, folder_name, with_drawn_validation


class Builder(Own):
    """Radiographs of a table: one row an image."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - as TFDS wants it

    def __init__(
        self,
        *,
        table: Path | str | None = None,
        image_column: str | None = None,
        label_columns: Sequence[str] = (),
        class_column: str | None = None,
        patient_column: str | None = None,
        source: Path | str | None = None,
        **kwargs: Any,
    ):
        """Makes the builder.

        Args:
          table: CSV, plain or compressed (`.gz`).
          image_column: the images' paths; these are the ids.
          label_columns: one per finding: 1, 0, -1 (uncertain) or empty (not mentioned).
          class_column: instead of them, the names of exclusive classes.
          patient_column: who; empty or None is a patient of its own.
          source: the folder that the paths start from; None takes the table's.
          **kwargs: name, allow_missing, workers, data_dir, config, version.

        Raises:
          CxrError: an option is missing, or the table cannot be read, or lacks a column.
        """
        if table is None or image_column is None or not (label_columns or class_column):
            raise CxrError("the data set table needs --table, --image-column, and --label-columns or --class-column")
        if label_columns and class_column:
            raise CxrError("give --label-columns or --class-column: labels of a table are one or the other")
        self.table, self.image_column, self.patient_column = Path(table), image_column, patient_column
        self.class_column = class_column
        columns = (image_column, *label_columns, class_column, patient_column)
        needed = [column for column in columns if column is not None]
        self.rows = list(read_rows(self.table, needed, "give a CSV of one row an image, with a header"))
        self.EXCLUSIVE = class_column is not None
        self.FINDINGS = self.classes(class_column) if class_column else tuple(label_columns)
        super().__init__(source=self.table.parent if source is None else source, **kwargs)

    def classes(self, column: str) -> tuple[str, ...]:
        """The values of the class column, in alphabetical order."""
        found = {row[column].strip(): line for line, row in reversed(self.rows)}
        if "" in found:
            raise CxrError(f"{self.table}, line {found['']}: {column} is empty; every image needs a class")
        if len(found) < 2:
            raise CxrError(f"{self.table}: column {column} has {len(found)} classes; two or more are needed")
        return tuple(sorted(found))

    def select(self) -> Selection:
        """The rows of the table whose image is there."""
        assert self.source is not None
        records, paths, lines = [], {}, {}
        for line, row in self.rows:
            record = self._record(row, f"{self.table}, line {line}")
            if lines.setdefault(record.id, line) != line:
                raise CxrError(f"{self.table}: image {record.id} has two rows, lines {lines[record.id]} and {line}")
            records.append(record)
            if (path := self.source / record.id).is_file():
                paths[record.id] = path
        if not records:
            raise CxrError(f"{self.table} has no rows")
        records = with_drawn_validation(records)
        found = match(records, paths, self.source, self.allow_missing)
        found.notes.extend(self.notes(found.records))
        return found

    def _record(self, row: dict[str, str], where: str) -> Record:
        assert self.source is not None
        id = row[self.image_column].strip()
        if not id:
            raise CxrError(f"{where}: {self.image_column} is empty; it names the image")
        if self.class_column:
            labels = tuple(int(row[self.class_column].strip() == name) for name in self.FINDINGS)
        else:
            labels = tuple(read_label(row, finding, where) for finding in self.FINDINGS)
        patient = row[self.patient_column].strip() if self.patient_column else ""
        return details(blank(id, patient, folder_name(self.source), labels), row, where)
