"""Tables on disk as columns of numbers, whoever wrote them; errors name the file, column and row."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Float64, Int8

from cxrjax.errors import CxrError
from cxrjax.files import atomic_path
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

ID = ("id", "Image Index", "dicom_id")
"""Columns that may name the image, the first found counting."""

PATIENT = ("patient", "Patient ID", "subject_id")
"""Columns that may name the patient, the first found counting."""


def normalize_name(name: str) -> str:
    """A name without what people write in different ways: case, spaces and underscores."""
    return name.casefold().replace("_", "").replace(" ", "")


@dataclass(frozen=True, eq=False)
class Table:
    """A table and where it came from; columns are found by name up to case, spaces and underscores, never by guess."""

    path: Path
    arrow: pa.Table

    def __len__(self) -> int:
        return self.arrow.num_rows

    @property
    def listing(self) -> str:
        """The columns' names, for messages."""
        names = self.arrow.column_names
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")

    def find(self, names: Sequence[str]) -> str | None:
        """The column that goes by the first of these names that is here, or None.

        Raises:
          CxrError: two columns do.
        """
        for name in names:
            found = [column for column in self.arrow.column_names if normalize_name(column) == normalize_name(name)]
            if len(found) > 1:
                raise CxrError(f"{self.path}: columns {' and '.join(map(repr, found))} both mean {name!r}; keep one")
            if found:
                return found[0]
        return None

    def name_of(self, names: Sequence[str]) -> str:
        """As `find`, for a column that must be there.

        Raises:
          CxrError: there is none, or two.
        """
        column = self.find(names)
        if column is None:
            raise CxrError(f"{self.path}: no column named {' or '.join(map(repr, names))}; found {self.listing}")
        return column

    def with_prefix(self, prefix: str) -> dict[str, str]:
        """Findings and their columns, of all columns called PREFIX_FINDING, in the table's order.

        Raises:
          CxrError: two columns are of the same finding.
        """
        found: dict[str, str] = {}
        for column in self.arrow.column_names:
            head, underscore, finding = column.partition("_")
            if head.casefold() == prefix and underscore and finding:
                again = next((label_mask for label_mask in found if normalize_name(label_mask) == normalize_name(finding)), None)
                if again is not None:
                    raise CxrError(f"{self.path}: columns {found[again]!r} and {column!r} are of one finding; keep one")
                found[finding] = column
        return found

    def ids(self) -> np.ndarray:
        """The images' names, str[N], of the column that `ID` allows.

        Raises:
          CxrError: there is no such column, or two rows are of one image.
        """
        ids = self.strings(self.name_of(ID))
        names, first = np.unique(ids, return_index=True)
        if len(names) < len(ids):
            again = np.setdiff1d(np.arange(len(ids)), first)[0]
            raise CxrError(f"{self.path}: row {again + 1} repeats the id {ids[again]}; keep one row per image")
        return ids

    def strings(self, column: str) -> np.ndarray:
        """A column as str[N].

        Raises:
          CxrError: a row is empty.
        """
        values = self.arrow[column].cast(pa.string()).fill_null("").to_numpy().astype(np.str_)
        if (values == "").any():
            raise CxrError(f"{self.path}: column {column!r} is empty in row {np.flatnonzero(values == '')[0] + 1}")
        return values

    def numbers(self, column: str) -> Float64[np.ndarray, " N"]:
        """A column as float64, NaN where it is empty; true and false are 1 and 0.

        Raises:
          CxrError: a value is no number.
        """
        values = self.arrow[column]
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return np.array([self._number(text, column, row) for row, text in enumerate(values.to_pylist(), 1)])
        try:
            return values.cast(pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise CxrError(f"{self.path}: column {column!r} is of type {values.type}, not numbers") from None

    def _number(self, text: str | None, column: str, row: int) -> float:
        try:
            return float(text) if text and text.strip() else float("nan")
        except ValueError:
            raise CxrError(f"{self.path}: column {column!r} is {text!r} in row {row}, not a number") from None

    def labels(self, column: str) -> Int8[np.ndarray, " N"]:
        """A column of labels: 1, 0, -1 uncertain, -2 or empty not mentioned.

        Raises:
          CxrError: a value is none of these.
        """
        values = self.numbers(column)
        values = np.where(np.isnan(values), NOT_MENTIONED, values)
        wrong = np.flatnonzero(~np.isin(values, (POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED)))
        if len(wrong):
            what = f"column {column!r} is {values[wrong[0]]:g} in row {wrong[0] + 1}"
            raise CxrError(f"{self.path}: {what}; a label is 1, 0, -1, -2 or empty")
        return values.astype(np.int8)


def read(path: Path) -> Table:
    """Read a .parquet, .csv or .csv.gz file.

    Raises:
      CxrError: it is absent, of another kind, broken or empty.
    """
    if not path.is_file():
        raise CxrError(f"{path}: no such file")
    try:
        arrow = pyarrow.parquet.read_table(path) if table_format(path) == ".parquet" else _read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise CxrError(f"{path} cannot be read: {str(error).splitlines()[0]}; write or download it again") from None
    if arrow.num_rows == 0:
        raise CxrError(f"{path} has no rows")
    return Table(path, arrow)


def write(path: Path, table: pa.Table) -> None:
    """Write a .parquet, .csv or .csv.gz file, whole or not at all.

    Raises:
      CxrError: the name ends otherwise.
    """
    kind = table_format(path)
    with atomic_path(path) as temporary:
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, temporary)
        else:
            with open(temporary, "wb") if kind == ".csv" else gzip.open(temporary, "wb", compresslevel=6) as file:
                pyarrow.csv.write_csv(table, file)


def table_format(path: Path) -> str:
    """How the name of a table ends.

    Raises:
      CxrError: otherwise than tables are written and read.
    """
    for kind in (".parquet", ".csv", ".csv.gz"):
        if path.name.endswith(kind):
            return kind
    raise CxrError(f"{path}: the name must end in .parquet, .csv or .csv.gz")


def _read_csv(path: Path) -> pa.Table:
    with pyarrow.csv.open_csv(path) as start:
        names = start.schema.names
    texts = {normalize_name(name) for name in (*ID, *PATIENT, "Finding Labels")}  # "00000001" is a name, not a number
    types = {name: pa.string() for name in names if normalize_name(name) in texts}
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
