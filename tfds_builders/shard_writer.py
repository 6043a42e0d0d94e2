"""One stored size of a data set while it is being made: its plan, what of it is finished, and how it becomes the data.

A shard is a range of records, the same whoever makes it and with however many workers. Until all are there they lie in
`incomplete.VERSION/data`, each written beside and renamed, with a note in `incomplete.VERSION/finished` of its checksum
and of what it was made from. A run that finds such a folder keeps the shards that are as their notes say, and makes the
others. At last `data` becomes `VERSION` by one rename.
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

from cxrjax import console
from cxrjax.data.manifest import ShardEntry, Manifest, read_manifest, file_sha256, write_manifest
from cxrjax.data.records import TABLE, Record, compute_fingerprint, read_directory, write_table
from cxrjax.errors import CxrError
from cxrjax.files import write_json, write_text

if TYPE_CHECKING:
    from tfds_builders.builder import Radiographs, Stored

SPLIT = "records"  # the only TFDS split: what is trained on is decided later, by patient


@dataclass(frozen=True)
class Shard:
    """Records `start` to `stop` and the file that is to hold them."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Finished:
    """The note of a finished shard.

    Attributes:
      source: digest of what it was made from.
      entry: its line in the manifest.
      images: of each record the sha256, the width and the height of the source's image.
    """

    source: str
    entry: ShardEntry
    images: list[tuple[str, int, int]]


class Draft:
    """One stored size of a data set in the making.

    Attributes:
      builder: of that size.
      records: all that it is to hold, in order.
      folder: where it is made.
      shards: the plan.
      length: records of a shard, but for the last.
      finished: notes of the shards that are done, by their place in the plan.
    """

    def __init__(self, builder: "Radiographs", records: Sequence[Record], only: Iterable[str] | None = None):
        """Plans; `only` are the files that are to be made, by default all."""
        self.builder, self.records = builder, records
        self.final = Path(builder.data_dir)
        self.folder = folder_of(self.final)
        self.length = builder.shard_length(len(records))
        starts = range(0, len(records), self.length)
        template = builder._get_filename_template(SPLIT)
        files = [template.sharded_filepath(shard_index=k, num_shards=len(starts)).name for k in range(len(starts))]
        self.shards = [
            Shard(file, start, min(start + self.length, len(records)))
            for file, start in zip(files, starts, strict=True)
        ]
        self.wanted = {k for k, shard in enumerate(self.shards) if only is None or shard.file in set(only)}
        self.finished: dict[int, Finished] = {}
        features: Any = builder.info.features
        self._features, self._serializer = features, ExampleSerializer(features.get_serialized_info())
        self._open: tuple[Path, Any, str, list[tuple[str, int, int]]] | None = None

    @property
    def directory(self) -> Path:
        """What becomes the prepared data set."""
        return self.folder / "data"

    @property
    def failures(self) -> Path:
        """Where other processes that make shards say what went wrong."""
        return self.folder / "failed"

    @property
    def missing(self) -> set[int]:
        """The shards that are still to be made."""
        return self.wanted - self.finished.keys()

    @property
    def rows(self) -> set[int]:
        """The records of the shards that are still to be made."""
        return {row for k in self.missing for row in range(self.shards[k].start, self.shards[k].stop)}

    def resume(self) -> int:
        """Take up what an earlier run finished.

        Returns:
          how many shards were found that cannot be kept: damaged, or made from another source or with other options.
        """
        notes = {path.name: path for path in self._notes.glob("*.json")}
        noted = [k for k in sorted(self.wanted) if _note(k) in notes]
        title = f"checking {self.builder.name}/{self.builder.builder_config_name}"
        with console.progress_bar(title, len(noted), unit="shards") as advance, ThreadPoolExecutor(self.builder.workers) as pool:
            for k, found in zip(noted, pool.map(self._read, noted), strict=True):
                if found:
                    self.finished[k] = found
                advance()
        stale = [path for name, path in notes.items() if name not in {_note(k) for k in self.finished}]
        shutil.rmtree(self.failures, ignore_errors=True)
        kept = {note.entry.file for note in self.finished.values()}
        for path in [*stale, *(path for path in self._files() if path.name not in kept)]:
            path.unlink()
        return len(stale)

    def trust(self, rows: range | None = None) -> None:
        """Take up every shard (that begins in these rows) that has a note, as it is."""
        for k in self.missing:
            path = self._notes / _note(k)
            if (rows is None or self.shards[k].start in rows) and path.exists():
                self.finished[k] = _parse(path)

    def add(self, row: int, stored: "Stored") -> None:
        """Write the next record of a shard; after the last one, the shard is finished."""
        k = row // self.length
        shard = self.shards[k]
        if row == shard.start:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f".{shard.file}.{uuid.uuid4().hex}"
            self._open = path, ArrayRecordWriter(str(path), "group_size:1"), self._source(shard), []
        assert self._open is not None, "records of a shard come in order"
        path, writer, source, images = self._open
        record = self.builder.as_stored(self.records[row], stored.sha256, stored.width, stored.height)
        example = self._features.encode_example(self.builder.example(record, stored))
        writer.write(self._serializer.get_tf_example(example).SerializeToString(deterministic=True))
        images.append((stored.sha256, stored.width, stored.height))
        if row + 1 == shard.stop:
            writer.close()
            entry = ShardEntry(shard.file, len(images), path.stat().st_size, file_sha256(path))
            os.replace(path, self.directory / shard.file)
            self.finished[k] = Finished(source, entry, images)
            write_text(self._notes / _note(k), json.dumps(asdict(self.finished[k])))
            self._open = None

    def drop(self) -> None:
        """Drop the shard that is half written, if there is one."""
        if self._open is not None:
            path, writer, *_ = self._open
            with contextlib.suppress(Exception):  # a full disk says so again
                writer.close()
            path.unlink(missing_ok=True)
            self._open = None

    def finish(self) -> None:
        """Add the tables, check everything, and make it the prepared data set."""
        builder, records, entries = self.builder, [], []
        for k, shard in enumerate(self.shards):
            done = self.finished[k]
            entries.append(done.entry)
            rows = zip(self.records[shard.start : shard.stop], done.images, strict=True)
            records += [builder.as_stored(record, *image) for record, image in rows]
        about = {"dataset": builder.name, "config": str(builder.builder_config_name), "version": str(builder.version)}
        write_table(self.directory, records, builder.FINDINGS, options=builder.options, **about)
        write_manifest(self.directory, Manifest(file_sha256(self.directory / TABLE), tuple(entries)))
        split = SplitInfo(
            name=SPLIT,
            shard_lengths=[entry.records for entry in entries],
            num_bytes=sum(entry.bytes for entry in entries),
            filename_template=builder._get_filename_template(SPLIT),
        )
        builder.info.set_splits(SplitDict([split]))
        builder.info.write_to_directory(self.directory)
        read_directory(self.directory).verify()
        default = {"default_config_name": builder.BUILDER_CONFIGS[0].name}  # for `tfds.builder(NAME)` without a config
        write_json(self.final.parents[1] / ".config" / "metadata.json", default)
        os.rename(self.directory, self.final)
        shutil.rmtree(self.folder)

    def replace(self, digests: Sequence[str]) -> None:
        """Put the shards that were made in the place of the prepared ones.

        Raises:
          CxrError: an image is another than the one of that digest.
        """
        manifest = read_manifest(self.final)
        assert manifest is not None
        entries = {entry.file: entry for entry in manifest.shards}
        for k, done in sorted(self.finished.items()):
            shard = self.shards[k]
            for record, image, digest in zip(
                self.records[shard.start : shard.stop], done.images, digests[shard.start : shard.stop], strict=True
            ):
                if image[0] != digest:
                    raise CxrError(
                        f"{record.id} is not the image that {self.final} was prepared from; give the source that was, "
                        "or delete that folder and prepare it again"
                    )
        for done in self.finished.values():
            os.replace(self.directory / done.entry.file, self.final / done.entry.file)
            entries[done.entry.file] = done.entry
        write_manifest(self.final, replace(manifest, shards=tuple(entries[entry.file] for entry in manifest.shards)))
        shutil.rmtree(self.folder)

    def give_up(self) -> bool:
        """After an error: remove the folder unless shards in it are finished. Returns whether it was kept."""
        kept = any(self._notes.glob("*.json"))
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        return kept

    @property
    def _notes(self) -> Path:
        return self.folder / "finished"

    def _files(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _read(self, k: int) -> Finished | None:
        """The note of a shard if the shard is as it says, made from what is there now."""
        shard = self.shards[k]
        try:
            found = _parse(self._notes / _note(k))
        except (ValueError, KeyError, TypeError):
            return None
        same = (found.entry.file, found.source) == (shard.file, self._source(shard))
        return found if same and file_sha256(self.directory / shard.file) == found.entry.sha256 else None

    def _source(self, shard: Shard) -> str:
        """Digest of all that a shard is made from, with the sizes and times of the files instead of their content."""
        builder, records = self.builder, self.records[shard.start : shard.stop]
        about = [builder.name, str(builder.builder_config_name), str(builder.version), *builder.FINDINGS]
        about += [json.dumps(builder.options, sort_keys=True), builder.ENCODING, cv2.__version__]
        return compute_fingerprint(records, *about, *(builder.stamp(record) for record in records))


def folder_of(final: Path) -> Path:
    """Where a data set is made that will lie here."""
    return final.with_name(f"incomplete.{final.name}")


def _parse(note: Path) -> Finished:
    read = json.loads(note.read_text(encoding="utf-8"))
    return Finished(read["source"], ShardEntry(**read["entry"]), [(str(s), int(w), int(h)) for s, w, h in read["images"]])


def _note(k: int) -> str:
    return f"{k:05d}.json"
