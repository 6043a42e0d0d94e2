"""A prepared data set: the table of all its records, and random access to each record's image.

Prepared data is a TFDS directory of ArrayRecord shards with one file more, `records.parquet`: everything that is known
of the images except their pixels. Opening reads that table only; row k of it is record k of the shards.
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
from cxrjax.data.manifest import find_truncated, describe_damage, read_manifest
from cxrjax.errors import CxrError
from cxrjax.findings import positions

TABLE = "records.parquet"
FORMAT = 1
"""Version of the table's layout."""


@dataclass(frozen=True, slots=True)
class Box:
    """A finding's bounding box: left, top, width and height as fractions of the image's width and height."""

    finding: str
    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one image.

    Attributes:
      id: unique and stable, such as the file's name.
      patient: who; the unit of every split.
      study: one visit of that patient.
      view: PA, AP, LATERAL, ...; "" unknown.
      age: years; nan unknown.
      sex: M, F or "" unknown.
      source: the collection that the image comes from.
      labels: one label per finding of the data set: 1, 0, -1 uncertain, -2 not mentioned.
      official: the data set's own part, "train", "validation", "test", or "train_val", of which validation is drawn; ""
        without one.
      boxes: where findings are.
      sha256: hex digest of the image as its source gave it.
      width, height: of that image, in px; 0 unknown.
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
_MEND = "delete that folder and prepare it again"
_REPAIR = "the `cxrjax prepare` command that made it, with --repair, makes only what is damaged anew"
_BOXES = pa.list_(pa.struct([("finding", pa.string()), *((side, pa.float32()) for side in "xywh")]))


def _text(name: str) -> cached_property:
    def column(self: "Records") -> np.ndarray:
        column = self.table[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            return np.array(column.dictionary.to_pylist(), str)[column.indices.to_numpy()]
        return column.to_numpy(zero_copy_only=False).astype(str)

    return cached_property(column)


@dataclass(frozen=True)
class Records:
    """The records of one data set at one stored size; see `open_records`.

    Attributes:
      directory: of the prepared data; None for a table without images.
      dataset: name of the TFDS builder.
      config: stored size, such as "256", or "native".
      findings: names of the K label columns.
      fingerprint: says which data this is: equal labels, patients, ids, source images and size give the same one.
      table: the columns as Arrow keeps them.
      options: what the data set was prepared with.
      id, patient, study, view, sex, source, official: str[N].
      age: float32[N] in years, nan unknown.
      labels: int8[N, K], 1 positive, 0 negative, -1 uncertain, -2 not mentioned.
    """

    directory: Path | None
    dataset: str
    config: str
    findings: tuple[str, ...]
    compute_fingerprint: str
    table: pa.Table = field(repr=False, compare=False)
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    id = _text("id")
    patient = _text("patient")
    study = _text("study")
    view = _text("view")
    sex = _text("sex")
    source = _text("source")
    official = _text("official")

    @cached_property
    def age(self) -> Float32[np.ndarray, " N"]:  # noqa: D102 - listed above
        return self.table["age"].to_numpy()

    @cached_property
    def labels(self) -> Int8[np.ndarray, "N K"]:  # noqa: D102 - listed above
        columns = [self.table[f"label_{finding}"].to_numpy() for finding in self.findings]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self), 0), np.int8)

    @cached_property
    def original_sizes(self) -> Int32[np.ndarray, "N 2"] | None:
        """Width and height in px of the images as their source gave them; None where an image's are not known."""
        if not {"width", "height"} <= set(self.table.column_names):  # prepared before they were kept
            return None
        sizes = np.stack([self.table[side].to_numpy() for side in ("width", "height")], axis=1)
        return sizes if len(sizes) and (sizes > 0).all() else None

    @classmethod
    def of(
        cls, records: Sequence[Record], findings: Sequence[str], *, dataset: str, config: str = "table"
    ) -> "Records":
        """Make the table of records that have no stored images."""
        mark = compute_fingerprint(records, dataset, config, "", *findings)
        return cls(None, dataset, config, tuple(findings), mark, records_to_table(records, findings))

    @cached_property
    def digests(self) -> np.ndarray:
        """The sha256 of each image as its source gave it, bytes[N]; empty where it is unknown."""
        table = self.table if self.directory is None else pq.read_table(self.directory / TABLE, columns=["sha256"])
        return table["sha256"].to_numpy().astype(bytes)

    @cached_property
    def patient_groups(self) -> Int32[np.ndarray, " N"]:
        """Whose image each is, by number: the patient's, but patients who share an identical image count as one."""
        _, patient = np.unique(self.patient, return_inverse=True)
        _, image = np.unique(self.digests, return_inverse=True)
        image = np.where(self.digests == b"", len(self) + np.arange(len(self)), image)  # unknown: equal to no other
        count = 3 * len(self)  # patients, then images
        graph = coo_matrix((np.ones(len(self), bool), (patient, len(self) + image)), (count, count))
        _, component = connected_components(graph, directed=False)
        return np.unique(component[patient], return_inverse=True)[1].astype(np.int32)

    @property
    def exclusive(self) -> bool:
        """Whether the findings are classes, of which every image has exactly one."""
        return bool(self.options.get("exclusive"))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getstate__(self):  # open readers and cached columns stay behind
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def boxes(self, row: int) -> list[Box]:
        """The bounding boxes drawn in the image, as fractions of its sides."""
        return [Box(**box) for box in self.table["boxes"][int(row)].as_py()]

    def image_bytes(self, row: int) -> bytes:
        """The image as it is stored: PNG or JPEG. Safe to call from many threads."""
        return self._features(row)["image"].bytes_list.value[0]

    def image(self, row: int, size: int | None = None) -> UInt8[np.ndarray, "H W"]:
        """The grey image, 0 black; as it is stored, or at size x size px, for which less of it may be decoded."""
        name = f"{self.id[row]} of {self.dataset}/{self.config}"
        data = self.image_bytes(row)
        return decode(data, name) if size is None else decode_resized(data, name, size)

    def mask(self, row: int, finding: str, size: int) -> Bool[np.ndarray, "size size"] | None:
        """Where the finding is, on a grid of size x size over the whole image.

        Exact where the data set has masks (a pixel is set if any of the finding falls into it), else the union of the
        finding's boxes; None where the record has neither.

        Raises:
          CxrError: the data set does not know the finding.
        """
        [position] = positions([finding], self.findings)
        if not self.options.get("masks"):
            return _draw_boxes([box for box in self.boxes(row) if box.finding == finding], size)
        stored = decode(self._features(row)["mask"].bytes_list.value[0], f"mask of {self.id[row]}")
        present = (stored >> position & 1).astype(np.float32)
        if not present.any():
            return None
        if size < len(present):
            return cv2.resize(present, (size, size), interpolation=cv2.INTER_AREA) > 0
        return cv2.resize(present, (size, size), interpolation=cv2.INTER_NEAREST) > 0

    def verify(self, sample: int = 256) -> None:
        """Check the shards against the table: the count, and every so many records down to the decoded image.

        Raises:
          CxrError: they differ.
        """
        for row in np.unique(np.linspace(0, len(self) - 1, sample).astype(int)).tolist():
            if self._features(row)["id"].bytes_list.value[0].decode() != self.id[row]:
                raise CxrError(f"record {row} of {self.directory} is not {self.id[row]}: {_MEND}")
            self.image(row)

    def _features(self, row: int) -> Any:
        """The record's TFDS features, undecoded."""
        from tensorflow_datasets.proto import tf_example_generated_pb2 as proto  # a second, for images only

        try:
            example = proto.Example.FromString(self._shards[int(row)])  # pyright: ignore[reportAttributeAccessIssue]
        except (OSError, RuntimeError, ValueError) as error:
            where = f"record {row} of {self.directory}{self._shard_of(int(row))}"
            raise CxrError(f"{where} cannot be read ({error}): {_REPAIR}") from error
        return example.features.feature

    def _shard_of(self, row: int) -> str:
        """The name of the shard that holds a record, in brackets; nothing where shards are not listed."""
        manifest = read_manifest(self.directory) if self.directory else None
        for entry in manifest.shards if manifest else ():
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
            raise CxrError(f"{self.directory} holds {len(source):,} images, its table {len(self):,}: {_MEND}")
        return source


def shard_paths(directory: Path) -> list[Path]:
    """The ArrayRecord files of a prepared data set, in order."""
    return sorted(directory.glob("*.array_record-*"))


def _draw_boxes(boxes: Sequence[Box], size: int) -> Bool[np.ndarray, "size size"] | None:
    """The union of boxes: pixels whose centre is in one, at least one pixel each."""
    if not boxes:
        return None
    mask = np.zeros((size, size), bool)
    for box in boxes:
        top, left = (min(round(edge * size), size - 1) for edge in (box.y, box.x))
        bottom, right = round((box.y + box.h) * size), round((box.x + box.w) * size)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return mask


def records_to_table(records: Sequence[Record], findings: Sequence[str]) -> pa.Table:
    """The records as Arrow columns: text, `age`, a `label_<finding>` each, `boxes`, `sha256`, `width`, `height`."""
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


def compute_fingerprint(records: Sequence[Record], *about: str) -> str:
    """The sha256 of the records with their images' digests, and of whatever else tells these data from others."""
    digest = hashlib.sha256(json.dumps([FORMAT, *about]).encode())
    for r in records:
        age = None if math.isnan(r.age) else round(r.age, 3)
        boxes = [[box.finding, *(round(side, 6) for side in (box.x, box.y, box.w, box.h))] for box in r.boxes]
        text = [r.id, r.patient, r.study, r.view, r.sex, r.source, r.official, r.sha256]
        digest.update(json.dumps([text, age, r.labels, boxes]).encode())
    return digest.hexdigest()


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
    """Put the table beside the shards, with its fingerprint and what else `open_records` says."""
    header = {"format": FORMAT, "dataset": dataset, "config": config, "findings": findings, "options": options or {}}
    more = [f"{name}={header['options'][name]}" for name in ("aspect",) if name in header["options"]]
    header["fingerprint"] = compute_fingerprint(records, dataset, config, version, *findings, *more)
    table = records_to_table(records, findings).replace_schema_metadata({"cxrjax": json.dumps(header)})
    pq.write_table(table, directory / TABLE, compression="zstd")


def open_records(data_dir: Path | str, dataset: str, config: str) -> Records:
    """Open a prepared data set, without touching its images.

    Args:
      data_dir: the folder that `prepare` wrote to.
      dataset: the builder's name, such as "chestxray14".
      config: the stored size, such as "256", or "native".

    Raises:
      CxrError: nothing of that name and size is prepared there, or only by another version of this program; or a shard
        is missing or cut off (its content is compared with its checksum by `prepare` only).
    """
    directory = _newest(Path(data_dir) / dataset / config)
    if directory is None:
        found = sorted({f"{p.parents[2].name}/{p.parents[1].name}" for p in Path(data_dir).glob(f"*/*/*/{TABLE}")})
        size = "" if config == "native" else f" --size {config}"
        raise CxrError(
            f"{dataset}/{config} is not prepared in {data_dir} (there: {', '.join(found) or 'nothing'}); "
            f"run `cxrjax prepare {dataset}{size} --data-dir {data_dir}`"
        )
    return read_directory(directory)


def read_directory(directory: Path, *, check: bool = True) -> Records:
    """Open the prepared data in exactly this directory; see `open_records`.

    Args:
      directory: of the prepared data.
      check: whether shards that are missing or cut off are an error.
    """
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
            f"{path} has layout {header.get('format')} and this program reads {FORMAT}; "
            f"delete {directory} and prepare it again"
        )
    manifest = read_manifest(directory) if check else None
    if manifest and (wrong := find_truncated(directory, manifest)):
        raise CxrError(f"damaged in {directory}: {describe_damage(wrong)}; {_REPAIR}")
    about = {name: header[name] for name in ("dataset", "config", "fingerprint", "options")}
    return Records(directory, findings=tuple(header["findings"]), table=table, **about)


def _newest(folder: Path) -> Path | None:
    """The highest version below a config's folder that is prepared completely."""
    versions = [path.parent for path in folder.glob(f"*/{TABLE}") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")], default=None)
