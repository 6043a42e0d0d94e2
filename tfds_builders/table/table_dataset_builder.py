"""TFDS builder of radiographs listed in a user's table with their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.errors import CxrError
from tfds_builders.sources import Selection, match_images, read_csv, read_label
from tfds_builders.user_dataset import (
    UserDatasetBuilder,
    add_metadata,
    folder_name,
    make_record,
    with_drawn_validation,
)


class Builder(UserDatasetBuilder):
    """Radiographs listed in a table with one row per image."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - required by TFDS

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
        """Make the builder.

        Args:
          table: CSV, plain or compressed (`.gz`).
          image_column: column of image paths, which become the ids.
          label_columns: one column per finding: 1, 0, -1 (uncertain) or empty (not mentioned).
          class_column: column of class names, for exclusive classes instead of findings.
          patient_column: column of patient ids; an image without one counts as its own patient.
          source: the folder that the paths are relative to; None uses the table's.
          **kwargs: name, allow_missing, workers, data_dir, config, version.

        Raises:
          CxrError: an option is missing, or the table cannot be read or lacks a column.
        """
        if table is None or image_column is None or not (label_columns or class_column):
            raise CxrError("the data set table needs --table, --image-column, and --label-columns or --class-column")
        if label_columns and class_column:
            raise CxrError("give either --label-columns or --class-column, not both")
        self.table, self.image_column, self.patient_column = Path(table), image_column, patient_column
        self.class_column = class_column
        columns = (image_column, *label_columns, class_column, patient_column)
        required = [column for column in columns if column is not None]
        self.rows = list(read_csv(self.table, required, "give a CSV with a header and one row per image"))
        self.EXCLUSIVE = class_column is not None
        self.FINDINGS = self.classes(class_column) if class_column else tuple(label_columns)
        super().__init__(source=self.table.parent if source is None else source, **kwargs)

    def classes(self, column: str) -> tuple[str, ...]:
        """Return the values of the class column, in alphabetical order."""
        line_of = {row[column].strip(): line for line, row in reversed(self.rows)}
        if "" in line_of:
            raise CxrError(f"{self.table}, line {line_of['']}: {column} is empty; every image needs a class")
        if len(line_of) < 2:
            raise CxrError(f"{self.table}: column {column} has {len(line_of)} classes; at least two are needed")
        return tuple(sorted(line_of))

    def select(self) -> Selection:
        """Match the rows of the table with the images."""
        assert self.source is not None
        records, paths, lines = [], {}, {}
        for line, row in self.rows:
            record = self._parse_record(row, f"{self.table}, line {line}")
            if lines.setdefault(record.id, line) != line:
                raise CxrError(f"{self.table}: image {record.id} has two rows, lines {lines[record.id]} and {line}")
            records.append(record)
            if (path := self.source / record.id).is_file():
                paths[record.id] = path
        if not records:
            raise CxrError(f"{self.table} has no rows")
        records = with_drawn_validation(records)
        selection = match_images(records, paths, self.source, self.allow_missing)
        selection.notes.extend(self.collect_notes(selection.records))
        return selection

    def _parse_record(self, row: dict[str, str], where: str) -> Record:
        assert self.source is not None
        id = row[self.image_column].strip()
        if not id:
            raise CxrError(f"{where}: {self.image_column} is empty; give the image's path")
        if self.class_column:
            labels = tuple(int(row[self.class_column].strip() == name) for name in self.FINDINGS)
        else:
            labels = tuple(read_label(row, finding, where) for finding in self.FINDINGS)
        patient = row[self.patient_column].strip() if self.patient_column else ""
        return add_metadata(make_record(id, patient, folder_name(self.source), labels), row, where)
