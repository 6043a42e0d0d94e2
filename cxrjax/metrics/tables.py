"""Reading and writing tables of any origin. Errors name the file, column and row."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Float64, Int, Int8

from cxrjax.errors import CxrError, list_some
from cxrjax.files import atomic_path
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

ID = ("id", "Image Index", "dicom_id")
"""Names of the column that identifies the image, in order of preference."""

PATIENT = ("patient", "Patient ID", "subject_id")
"""Names of the column that identifies the patient, in order of preference."""

FINDING_LIST = "Finding Labels"
"""NIH's column that lists the findings of an image."""


def normalize_name(name: str) -> str:
    """Return a name without case, spaces and underscores."""
    return name.casefold().replace("_", "").replace(" ", "")


@dataclass(frozen=True, eq=False)
class Table:
    """A table and its path. Column names match up to case, spaces and underscores."""

    path: Path
    arrow: pa.Table

    def __len__(self) -> int:
        return self.arrow.num_rows

    @property
    def column_names(self) -> str:
        """The first 20 column names, for error messages."""
        return list_some(self.arrow.column_names, 20)

    def find_column(self, names: Sequence[str]) -> str | None:
        """Return the column that matches the first possible of these names, or None.

        Raises:
          CxrError: two columns match.
        """
        for name in names:
            matches = [column for column in self.arrow.column_names if normalize_name(column) == normalize_name(name)]
            if len(matches) > 1:
                raise CxrError(f"{self.path}: columns {' and '.join(map(repr, matches))} both mean {name!r}; keep one")
            if matches:
                return matches[0]
        return None

    def columns_by_finding(self, prefix: str) -> dict[str, str]:
        """Return the columns PREFIX_FINDING by finding, in order; two of one finding raise a `CxrError`."""
        columns: dict[str, str] = {}
        for column in self.arrow.column_names:
            head, underscore, finding = column.partition("_")
            if head.casefold() == prefix and underscore and finding:
                same = next((name for name in columns if normalize_name(name) == normalize_name(finding)), None)
                if same is not None:
                    raise CxrError(
                        f"{self.path}: columns {columns[same]!r} and {column!r} are of one finding; keep one"
                    )
                columns[finding] = column
        return columns

    def ids(self) -> np.ndarray:
        """Return the names of the images, str[N].

        Raises:
          CxrError: no column of `ID` exists, or an image has two rows.
        """
        column = self.find_column(ID)
        if column is None:
            names = " or ".join(map(repr, ID))
            raise CxrError(f"{self.path}: no column named {names}; columns are {self.column_names}")
        ids = self.strings(column)
        names, first = np.unique(ids, return_index=True)
        if len(names) < len(ids):
            repeated = np.setdiff1d(np.arange(len(ids)), first)[0]
            raise CxrError(f"{self.path}: row {repeated + 1} repeats the id {ids[repeated]}; keep one row per image")
        return ids

    def strings(self, column: str) -> np.ndarray:
        """Return a column as str[N]; an empty row raises a `CxrError`."""
        values = self.arrow[column].cast(pa.string()).fill_null("").to_numpy().astype(np.str_)
        if (values == "").any():
            raise CxrError(f"{self.path}: column {column!r} is empty in row {np.flatnonzero(values == '')[0] + 1}")
        return values

    def numbers(self, column: str) -> Float64[np.ndarray, " N"]:
        """Return a column as float64, empty cells as NaN, true and false as 1 and 0; else raise a `CxrError`."""
        values = self.arrow[column]
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return np.array([self._number(text, column, row) for row, text in enumerate(values.to_pylist(), 1)])
        try:
            return values.cast(pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise CxrError(f"{self.path}: column {column!r} has type {values.type}, not numbers") from None

    def _number(self, text: str | None, column: str, row: int) -> float:
        try:
            return float(text) if text and text.strip() else float("nan")
        except ValueError:
            raise CxrError(f"{self.path}: column {column!r} is {text!r} in row {row}, not a number") from None

    def labels(self, column: str) -> Int8[np.ndarray, " N"]:
        """Return labels: 1, 0, -1 uncertain, -2 or empty not mentioned; other values raise a `CxrError`."""
        values = self.numbers(column)
        values = np.where(np.isnan(values), NOT_MENTIONED, values)
        wrong = np.flatnonzero(~np.isin(values, (POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED)))
        if len(wrong):
            where = f"column {column!r} is {values[wrong[0]]:g} in row {wrong[0] + 1}"
            raise CxrError(f"{self.path}: {where}; a label is 1, 0, -1, -2 or empty")
        return values.astype(np.int8)


def read(path: Path) -> Table:
    """Read a .parquet, .csv or .csv.gz file.

    Raises:
      CxrError: the file is missing, of another format, corrupt or empty.
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
    """Write a .parquet, .csv or .csv.gz file atomically; another suffix raises a `CxrError`."""
    suffix = table_format(path)
    with atomic_path(path) as temporary:
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, temporary)
        else:
            with open(temporary, "wb") if suffix == ".csv" else gzip.open(temporary, "wb", compresslevel=6) as file:
                pyarrow.csv.write_csv(table, file)


def find_rows(ids: np.ndarray, table_ids: np.ndarray) -> tuple[Int[np.ndarray, " n"], np.ndarray]:
    """Return the table's row of each id, and the ids that the table lacks (the rows are then meaningless)."""
    indices = pc.index_in(pa.array(ids), value_set=pa.array(table_ids))  # pyright: ignore
    missing = indices.is_null().to_numpy(zero_copy_only=False)
    return indices.fill_null(0).to_numpy().astype(np.int64), ids[missing]


def table_format(path: Path) -> str:
    """Return the suffix of a table's path; raise a `CxrError` if it is none of .parquet, .csv and .csv.gz."""
    for suffix in (".parquet", ".csv", ".csv.gz"):
        if path.name.endswith(suffix):
            return suffix
    raise CxrError(f"{path}: the name must end in .parquet, .csv or .csv.gz")


def _read_csv(path: Path) -> pa.Table:
    with pyarrow.csv.open_csv(path) as start:
        names = start.schema.names
    text_names = {normalize_name(name) for name in (*ID, *PATIENT, FINDING_LIST)}  # "00000001" is a name, not a number
    types = {name: pa.string() for name in names if normalize_name(name) in text_names}
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
