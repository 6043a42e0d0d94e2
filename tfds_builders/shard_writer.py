"""Write the shards of one data set at one stored size, and turn them into a prepared data set.

A shard is a fixed range of records, independent of the number of workers. Unfinished data sets are in
`incomplete.VERSION/data`; each shard is written under a temporary name and renamed, and a note in
`incomplete.VERSION/finished` has its checksum and a digest of what it was made from. A later run keeps the shards that
match their notes and writes the others. Finally `data` is renamed to `VERSION`.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitDict, SplitInfo

from cxrjax.console import progress_bar
from cxrjax.data.manifest import Manifest, ShardEntry, file_sha256, read_manifest, write_manifest
from cxrjax.data.records import TABLE, Record, compute_fingerprint, read_directory, write_table
from cxrjax.errors import CxrError
from cxrjax.files import write_json, write_text

if TYPE_CHECKING:
    from tfds_builders.builder import RadiographBuilder, StoredImage

TFDS_SPLIT = "records"  # the only TFDS split; records are split by patient when they are used


@dataclass(frozen=True)
class Shard:
    """A shard's file name and its records, `start` to `stop`."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class FinishedShard:
    """The note of a finished shard.

    Attributes:
      source: digest of what it was made from.
      entry: its entry in the manifest.
      images: sha256, width and height of each record's source image.
    """

    source: str
    entry: ShardEntry
    images: list[tuple[str, int, int]]


class DatasetWriter:
    """Writes one stored size of a data set.

    Attributes:
      builder: the builder of this size.
      records: all records, in order.
      target: directory of the prepared data set.
      work_dir: directory of the unfinished data set.
      shards: all shards.
      shard_length: number of records per shard, except the last.
      finished: notes of the finished shards, by index.
    """

    def __init__(self, builder: "RadiographBuilder", records: Sequence[Record], only: Iterable[str] | None = None):
        """Plan the shards; `only` selects the files to write, by default all."""
        self.builder, self.records = builder, records
        self.target = Path(builder.data_dir)
        self.work_dir = work_dir_of(self.target)
        self.shard_length = builder.shard_length(len(records))
        starts = range(0, len(records), self.shard_length)
        template = builder._get_filename_template(TFDS_SPLIT)
        files = [template.sharded_filepath(shard_index=k, num_shards=len(starts)).name for k in range(len(starts))]
        self.shards = [
            Shard(file, start, min(start + self.shard_length, len(records)))
            for file, start in zip(files, starts, strict=True)
        ]
        self.selected = {k for k, shard in enumerate(self.shards) if only is None or shard.file in set(only)}
        self.finished: dict[int, FinishedShard] = {}
        features: Any = builder.info.features
        self._features, self._serializer = features, ExampleSerializer(features.get_serialized_info())
        self._open: tuple[Path, Any, str, list[tuple[str, int, int]]] | None = None

    @property
    def directory(self) -> Path:
        """Directory that becomes the prepared data set."""
        return self.work_dir / "data"

    @property
    def errors_dir(self) -> Path:
        """Directory for the error messages of other processes that write shards."""
        return self.work_dir / "failed"

    @property
    def missing(self) -> set[int]:
        """Indices of the shards still to be written."""
        return self.selected - self.finished.keys()

    @property
    def missing_rows(self) -> set[int]:
        """Rows of the records in the missing shards."""
        return {row for k in self.missing for row in range(self.shards[k].start, self.shards[k].stop)}

    def resume(self) -> int:
        """Keep the shards that an earlier run finished and delete the others.

        Returns:
          Number of shards that cannot be kept: damaged, or made from another source or with other options.
        """
        notes = {path.name: path for path in self._notes_dir.glob("*.json")}
        noted = [k for k in sorted(self.selected) if _note_name(k) in notes]
        title = f"checking {self.builder.name}/{self.builder.builder_config_name}"
        with (
            progress_bar(title, len(noted), unit="shards") as advance,
            ThreadPoolExecutor(self.builder.workers) as pool,
        ):
            for k, finished in zip(noted, pool.map(self._read_checked_note, noted), strict=True):
                if finished:
                    self.finished[k] = finished
                advance()
        stale = [path for name, path in notes.items() if name not in {_note_name(k) for k in self.finished}]
        shutil.rmtree(self.errors_dir, ignore_errors=True)
        kept = {finished.entry.file for finished in self.finished.values()}
        files = list(self.directory.iterdir()) if self.directory.is_dir() else []
        for path in [*stale, *(path for path in files if path.name not in kept)]:
            path.unlink()
        return len(stale)

    def load_finished(self, rows: range | None = None) -> None:
        """Load the notes of finished shards (that start in `rows`) without checking the shards."""
        for k in self.missing:
            path = self._notes_dir / _note_name(k)
            if (rows is None or self.shards[k].start in rows) and path.exists():
                self.finished[k] = _read_note(path)

    def write(self, row: int, image: "StoredImage") -> None:
        """Write the next record of a shard; the last one finishes the shard."""
        k = row // self.shard_length
        shard = self.shards[k]
        if row == shard.start:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f".{shard.file}.{uuid.uuid4().hex}"
            self._open = path, ArrayRecordWriter(str(path), "group_size:1"), self._source_digest(shard), []
        assert self._open is not None, "records of a shard must be written in order"
        path, writer, source, images = self._open
        record = self.builder.with_image_info(self.records[row], image.sha256, image.width, image.height)
        example = self._features.encode_example(self.builder.encode_record(record, image))
        writer.write(self._serializer.get_tf_example(example).SerializeToString(deterministic=True))
        images.append((image.sha256, image.width, image.height))
        if row + 1 == shard.stop:
            writer.close()
            entry = ShardEntry(shard.file, len(images), path.stat().st_size, file_sha256(path))
            os.replace(path, self.directory / shard.file)
            self.finished[k] = FinishedShard(source, entry, images)
            write_text(self._notes_dir / _note_name(k), json.dumps(asdict(self.finished[k])))
            self._open = None

    def discard_open_shard(self) -> None:
        """Delete the shard that is only partly written, if any."""
        if self._open is not None:
            path, writer, *_ = self._open
            with contextlib.suppress(Exception):  # fails again on a full disk
                writer.close()
            path.unlink(missing_ok=True)
            self._open = None

    def finalize(self) -> None:
        """Write the table and the manifest, verify the data, and move it to its target."""
        builder, records, entries = self.builder, [], []
        for k, shard in enumerate(self.shards):
            entries.append(self.finished[k].entry)
            rows = zip(self.records[shard.start : shard.stop], self.finished[k].images, strict=True)
            records += [builder.with_image_info(record, *image) for record, image in rows]
        header = {"dataset": builder.name, "config": str(builder.builder_config_name), "version": str(builder.version)}
        write_table(self.directory, records, builder.FINDINGS, options=builder.options, **header)
        write_manifest(self.directory, Manifest(file_sha256(self.directory / TABLE), tuple(entries)))
        split = SplitInfo(
            name=TFDS_SPLIT,
            shard_lengths=[entry.records for entry in entries],
            num_bytes=sum(entry.bytes for entry in entries),
            filename_template=builder._get_filename_template(TFDS_SPLIT),
        )
        builder.info.set_splits(SplitDict([split]))
        builder.info.write_to_directory(self.directory)
        read_directory(self.directory).verify()
        default = {"default_config_name": builder.BUILDER_CONFIGS[0].name}  # for `tfds.builder(NAME)` without a config
        write_json(self.target.parents[1] / ".config" / "metadata.json", default)
        os.rename(self.directory, self.target)
        shutil.rmtree(self.work_dir)

    def replace_shards(self, digests: Sequence[str]) -> None:
        """Replace shards of the prepared data set by the finished ones.

        Args:
          digests: sha256 of the source image of each record that was prepared.

        Raises:
          CxrError: an image has another digest.
        """
        manifest = read_manifest(self.target)
        entries = {entry.file: entry for entry in manifest.shards}
        for k, finished in sorted(self.finished.items()):
            shard = self.shards[k]
            for record, image, digest in zip(
                self.records[shard.start : shard.stop], finished.images, digests[shard.start : shard.stop], strict=True
            ):
                if image[0] != digest:
                    raise CxrError(
                        f"{record.id} is not the image that {self.target} was prepared from; give the original source, "
                        "or delete that folder and prepare it again"
                    )
        for finished in self.finished.values():
            os.replace(self.directory / finished.entry.file, self.target / finished.entry.file)
            entries[finished.entry.file] = finished.entry
        write_manifest(self.target, replace(manifest, shards=tuple(entries[entry.file] for entry in manifest.shards)))
        shutil.rmtree(self.work_dir)

    def remove_if_empty(self) -> bool:
        """Remove the work directory unless it has finished shards; return whether it was kept."""
        kept = any(self._notes_dir.glob("*.json"))
        if not kept:
            shutil.rmtree(self.work_dir, ignore_errors=True)
        return kept

    @property
    def _notes_dir(self) -> Path:
        return self.work_dir / "finished"

    def _read_checked_note(self, k: int) -> FinishedShard | None:
        """Return the note of a shard if the shard matches it and would be made from the same source now."""
        shard = self.shards[k]
        try:
            finished = _read_note(self._notes_dir / _note_name(k))
        except (ValueError, KeyError, TypeError):
            return None
        current = (finished.entry.file, finished.source) == (shard.file, self._source_digest(shard))
        return finished if current and file_sha256(self.directory / shard.file) == finished.entry.sha256 else None

    def _source_digest(self, shard: Shard) -> str:
        """Digest everything a shard is made from, using the files' sizes and times instead of their content."""
        builder, records = self.builder, self.records[shard.start : shard.stop]
        context = [builder.name, str(builder.builder_config_name), str(builder.version), *builder.FINDINGS]
        context += [json.dumps(builder.options, sort_keys=True), builder.ENCODING, cv2.__version__]
        return compute_fingerprint(records, *context, *(builder.source_stamp(record) for record in records))


def work_dir_of(target: Path) -> Path:
    """Return the directory in which a data set is built before it is moved to `target`."""
    return target.with_name(f"incomplete.{target.name}")


def _read_note(path: Path) -> FinishedShard:
    note = json.loads(path.read_text(encoding="utf-8"))
    images = [(str(sha256), int(width), int(height)) for sha256, width, height in note["images"]]
    return FinishedShard(note["source"], ShardEntry(**note["entry"]), images)


def _note_name(k: int) -> str:
    return f"{k:05d}.json"
