"""Prepared data sets: the table of all records, and random access to their images.

A prepared data set is a TFDS directory of ArrayRecord shards plus `records.parquet`, which holds everything but the
images. Opening it reads only this table; row k of the table is record k of the shards.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int8, Int32, UInt8
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cxrjax.data.images import decode, decode_resized
from cxrjax.data.manifest import describe_damage, find_truncated, read_manifest
from cxrjax.errors import CxrError
from cxrjax.findings import finding_indices

TABLE = "records.parquet"
FORMAT = 1
"""Version of the table's layout."""


@dataclass(frozen=True, slots=True)
class Box:
    """Bounding box of a finding: left, top, width and height as fractions of the image's width and height."""

    finding: str
    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True, slots=True)
class Record:
    """Metadata and labels of one image.

    Attributes:
      id: unique and stable, such as the file name.
      patient: the patient's id, the unit of every split.
      study: id of the visit.
      view: PA, AP, LATERAL, ...; "" if unknown.
      age: in years; NaN if unknown.
      sex: M, F, or "" if unknown.
      source: the collection that the image comes from.
      labels: one per finding: 1 positive, 0 negative, -1 uncertain, -2 not mentioned.
      official: the data set's own split: "train", "validation", "test", or "train_val", from which validation is
        drawn; "" if there is none.
      boxes: bounding boxes of findings.
      sha256: hex digest of the source file.
      width, height: of the source image in px; 0 if unknown.
    """

    id: str
    patient: str
    study: str
    view: str
    age: float
    sex: str
    source: str
    labels: tuple[int, ...]
    official: str = ""
    boxes: tuple[Box, ...] = ()
    sha256: str = ""
    width: int = 0
    height: int = 0


_TEXT = ("id", "patient", "study", "view", "sex", "source", "official")
_CATEGORIES = ("view", "sex", "source", "official")
_PREPARE_AGAIN = "delete that folder and prepare it again"
_REPAIR = "run the `cxrjax prepare` command that made it with --repair, which rebuilds the damaged shards"
_BOXES = pa.list_(pa.struct([("finding", pa.string()), *((side, pa.float32()) for side in "xywh")]))


def _text_column(name: str) -> cached_property:
    def read(self: "Records") -> np.ndarray:
        column = self.table[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            return np.array(column.dictionary.to_pylist(), str)[column.indices.to_numpy()]
        return column.to_numpy(zero_copy_only=False).astype(str)

    return cached_property(read)


@dataclass(frozen=True)
class Records:
    """The records of one data set at one stored size; see `open_records`.

    Attributes:
      directory: of the prepared data; None for a table without images.
      dataset: name of the TFDS builder.
      config: stored size, such as "256", or "native".
      findings: names of the K label columns.
      fingerprint: sha256 of the labels, patients, ids, source images and stored size.
      table: the columns in Arrow format.
      options: options of the builder that prepared the data.
      id, patient, study, view, sex, source, official: str[N].
      age: float32[N] in years, NaN if unknown.
      labels: int8[N, K], encoded as in `Record`.
    """

    directory: Path | None
    dataset: str
    config: str
    findings: tuple[str, ...]
    fingerprint: str
    table: pa.Table = field(repr=False, compare=False)
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    id = _text_column("id")
    patient = _text_column("patient")
    study = _text_column("study")
    view = _text_column("view")
    sex = _text_column("sex")
    source = _text_column("source")
    official = _text_column("official")

    @cached_property
    def age(self) -> Float32[np.ndarray, " N"]:  # noqa: D102 - listed above
        return self.table["age"].to_numpy()

    @cached_property
    def labels(self) -> Int8[np.ndarray, "N K"]:  # noqa: D102 - listed above
        columns = [self.table[f"label_{finding}"].to_numpy() for finding in self.findings]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self), 0), np.int8)

    @cached_property
    def original_sizes(self) -> Int32[np.ndarray, "N 2"] | None:
        """Width and height of the source images in px; None if that of any image is unknown."""
        sizes = np.stack([self.table[side].to_numpy() for side in ("width", "height")], axis=1)
        return sizes if len(sizes) and (sizes > 0).all() else None

    @classmethod
    def from_records(
        cls, records: Sequence[Record], findings: Sequence[str], *, dataset: str, config: str = "table"
    ) -> "Records":
        """Make a table of records that have no stored images."""
        fingerprint = compute_fingerprint(records, dataset, config, "", *findings)
        return cls(None, dataset, config, tuple(findings), fingerprint, records_to_table(records, findings))

    @cached_property
    def digests(self) -> np.ndarray:
        """The sha256 of each source image, bytes[N]; empty if unknown."""
        table = self.table if self.directory is None else pq.read_table(self.directory / TABLE, columns=["sha256"])
        return table["sha256"].to_numpy().astype(bytes)

    @cached_property
    def patient_groups(self) -> Int32[np.ndarray, " N"]:
        """Number of each image's patient, where patients who share an identical image have the same number."""
        _, patient = np.unique(self.patient, return_inverse=True)
        _, image = np.unique(self.digests, return_inverse=True)
        image = np.where(self.digests == b"", len(self) + np.arange(len(self)), image)  # unknown: equal to no other
        nodes = 3 * len(self)  # patients, then images
        graph = coo_matrix((np.ones(len(self), bool), (patient, len(self) + image)), (nodes, nodes))
        _, component = connected_components(graph, directed=False)
        return np.unique(component[patient], return_inverse=True)[1].astype(np.int32)

    @property
    def exclusive(self) -> bool:
        """Whether the findings are classes, exactly one per image."""
        return bool(self.options.get("exclusive"))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getstate__(self):  # pickle without open readers and cached columns
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def boxes(self, row: int) -> list[Box]:
        """Return the bounding boxes of an image, as fractions of its sides."""
        return [Box(**box) for box in self.table["boxes"][int(row)].as_py()]

    def image_bytes(self, row: int) -> bytes:
        """Return the stored PNG or JPEG file; thread-safe."""
        return self._features(row)["image"].bytes_list.value[0]

    def image(self, row: int, size: int | None = None) -> UInt8[np.ndarray, "H W"]:
        """Return the grey image, 0 is black, at its stored size or resized to size x size px; thread-safe."""
        name = f"{self.id[row]} of {self.dataset}/{self.config}"
        data = self.image_bytes(row)
        return decode(data, name) if size is None else decode_resized(data, name, size)

    def mask(self, row: int, finding: str, size: int) -> Bool[np.ndarray, "size size"] | None:
        """Return the mask of a finding on a size x size grid over the image; None if the record has none.

        Uses the data set's masks if it has them (a cell is True if any of its pixels is), else the union of the
        finding's boxes.

        Raises:
          CxrError: the data set does not have the finding.
        """
        [position] = finding_indices([finding], self.findings)
        if not self.options.get("masks"):
            return _draw_boxes([box for box in self.boxes(row) if box.finding == finding], size)
        stored = decode(self._features(row)["mask"].bytes_list.value[0], f"mask of {self.id[row]}")
        present = (stored >> position & 1).astype(np.float32)
        if not present.any():
            return None
        interpolation = cv2.INTER_AREA if size < len(present) else cv2.INTER_NEAREST
        return cv2.resize(present, (size, size), interpolation=interpolation) > 0

    def verify(self, sample: int = 256) -> None:
        """Compare the shards with the table: their count, and the ids and images of evenly spaced records.

        Raises:
          CxrError: they differ, or an image cannot be decoded.
        """
        for row in np.unique(np.linspace(0, len(self) - 1, sample).astype(int)).tolist():
            if self._features(row)["id"].bytes_list.value[0].decode() != self.id[row]:
                raise CxrError(f"record {row} of {self.directory} is not {self.id[row]}; {_PREPARE_AGAIN}")
            self.image(row)

    def _features(self, row: int) -> Any:
        """Return the encoded TFDS features of a record."""
        from tensorflow_datasets.proto import tf_example_generated_pb2 as proto  # slow, and only needed for images

        try:
            example = proto.Example.FromString(self._shards[int(row)])  # pyright: ignore[reportAttributeAccessIssue]
        except (OSError, RuntimeError, ValueError) as error:
            where = f"record {row} of {self.directory}{self._shard_of(int(row))}"
            raise CxrError(f"{where} cannot be read ({error}); {_REPAIR}") from error
        return example.features.feature

    def _shard_of(self, row: int) -> str:
        """Return the name of a record's shard in brackets, or "" if it is unknown."""
        for entry in read_manifest(self.directory).shards if self.directory else ():
            if row < entry.records:
                return f" ({entry.file})"
            row -= entry.records
        return ""

    @cached_property
    def _shards(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if self.directory is None:
            raise CxrError(f"this table of {self.dataset} has no images; prepare the data set first")
        source = ArrayRecordDataSource(shard_paths(self.directory))
        if len(source) != len(self):
            raise CxrError(f"{self.directory} has {len(source):,} images, its table {len(self):,}; {_PREPARE_AGAIN}")
        return source


def open_records(data_dir: Path | str, dataset: str, config: str) -> Records:
    """Open the newest version of a prepared data set, without reading its images.

    Args:
      data_dir: the folder that `prepare` wrote to.
      dataset: name of the builder, such as "chestxray14".
      config: stored size, such as "256", or "native".

    Raises:
      CxrError: the data set is not prepared at this size, or only by another version of this program; or a shard is
        missing or truncated (only `prepare` compares checksums).
    """
    folder = Path(data_dir) / dataset / config
    versions = [path.parent for path in folder.glob(f"*/{TABLE}") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    if not versions:
        prepared = sorted({f"{p.parents[2].name}/{p.parents[1].name}" for p in Path(data_dir).glob(f"*/*/*/{TABLE}")})
        size = "" if config == "native" else f" --size {config}"
        raise CxrError(
            f"{dataset}/{config} is not prepared in {data_dir} (prepared are: {', '.join(prepared) or 'none'}); "
            f"run `cxrjax prepare {dataset}{size} --data-dir {data_dir}`"
        )
    return read_directory(max(versions, key=lambda path: [int(number) for number in path.name.split(".")]))


def read_directory(directory: Path, *, check: bool = True) -> Records:
    """Open the prepared data in this directory; see `open_records`. `check` refuses missing or truncated shards."""
    path = directory / TABLE
    try:
        with pq.ParquetFile(path) as file:
            header = json.loads((file.schema_arrow.metadata or {}).get(b"cxrjax", b"{}"))
            names = [name for name in file.schema_arrow.names if name != "sha256"]
            table = pa.table({name: file.read([name], use_threads=False)[name] for name in names})  # least memory
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CxrError(f"{path} cannot be read ({error}); delete {directory} and prepare it again") from error
    pa.default_memory_pool().release_unused()
    if header.get("format") != FORMAT:
        raise CxrError(
            f"{path} has layout {header.get('format')}, but this program reads {FORMAT}; "
            f"delete {directory} and prepare it again"
        )
    if check and (damage := find_truncated(directory, read_manifest(directory))):
        raise CxrError(f"damaged shards in {directory}: {describe_damage(damage)}; {_REPAIR}")
    attributes = {name: header[name] for name in ("dataset", "config", "fingerprint", "options")}
    return Records(directory, findings=tuple(header["findings"]), table=table, **attributes)


def shard_paths(directory: Path) -> list[Path]:
    """Return the ArrayRecord files of a prepared data set, in order."""
    return sorted(directory.glob("*.array_record-*"))


def write_table(
    directory: Path,
    records: Sequence[Record],
    findings: Sequence[str],
    *,
    dataset: str,
    config: str,
    version: str = "",
    options: dict[str, Any] | None = None,
) -> None:
    """Write the table of a prepared data set, with its fingerprint and the attributes of `Records`."""
    header = {"format": FORMAT, "dataset": dataset, "config": config, "findings": findings, "options": options or {}}
    aspect = [f"aspect={header['options']['aspect']}"] if "aspect" in header["options"] else []
    header["fingerprint"] = compute_fingerprint(records, dataset, config, version, *findings, *aspect)
    table = records_to_table(records, findings).replace_schema_metadata({"cxrjax": json.dumps(header)})
    pq.write_table(table, directory / TABLE, compression="zstd")


def records_to_table(records: Sequence[Record], findings: Sequence[str]) -> pa.Table:
    """Convert records to Arrow columns; each finding has a column `label_<finding>`."""
    columns: dict[str, Any] = {
        name: pa.array([getattr(record, name) for record in records], pa.string()) for name in _TEXT
    }
    columns |= {name: columns[name].dictionary_encode() for name in _CATEGORIES}
    columns["age"] = pa.array(np.array([record.age for record in records], np.float32))
    labels = np.array([record.labels for record in records], np.int8).reshape(len(records), len(findings))
    columns |= {f"label_{finding}": pa.array(labels[:, k].copy()) for k, finding in enumerate(findings)}
    boxes = [[dataclasses.asdict(box) for box in record.boxes] for record in records]
    columns["boxes"] = pa.array(boxes, _BOXES)
    columns["sha256"] = pa.array([bytes.fromhex(record.sha256) for record in records], pa.binary())
    columns |= {side: pa.array([getattr(r, side) for r in records], pa.int32()) for side in ("width", "height")}
    return pa.table(columns)


def compute_fingerprint(records: Sequence[Record], *context: str) -> str:
    """Return the sha256 of the records, their images' digests, and the given context."""
    digest = hashlib.sha256(json.dumps([FORMAT, *context]).encode())
    for r in records:
        age = None if math.isnan(r.age) else round(r.age, 3)
        boxes = [[box.finding, *(round(side, 6) for side in (box.x, box.y, box.w, box.h))] for box in r.boxes]
        text = [r.id, r.patient, r.study, r.view, r.sex, r.source, r.official, r.sha256]
        digest.update(json.dumps([text, age, r.labels, boxes]).encode())
    return digest.hexdigest()


def _draw_boxes(boxes: Sequence[Box], size: int) -> Bool[np.ndarray, "size size"] | None:
    """Return the union of boxes on a grid, at least one cell for each box."""
    if not boxes:
        return None
    mask = np.zeros((size, size), bool)
    for box in boxes:
        top, left = (min(round(edge * size), size - 1) for edge in (box.y, box.x))
        bottom, right = round((box.y + box.h) * size), round((box.x + box.w) * size)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return mask
