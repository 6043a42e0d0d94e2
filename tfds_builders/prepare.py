"""Prepare a data set with its TFDS builder: resumable, and complete or absent."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cxrjax.console import log, progress_bar
from cxrjax.data.manifest import describe_damage, file_sha256, find_damage, read_manifest
from cxrjax.data.records import TABLE, Record, Records, read_directory, records_to_table
from cxrjax.errors import CxrError
from tfds_builders.build import WriteMissing, build_datasets, repair_shards
from tfds_builders.builder import RadiographBuilder
from tfds_builders.chestxray14.chestxray14_dataset_builder import Builder as ChestXray14
from tfds_builders.cxr_phantom.cxr_phantom_dataset_builder import Builder as CxrPhantom
from tfds_builders.folder.folder_dataset_builder import Builder as Folder
from tfds_builders.mimic_cxr_jpg.mimic_cxr_jpg_dataset_builder import Builder as MimicCxrJpg
from tfds_builders.prepare_warnings import collect_notes
from tfds_builders.shard_writer import work_dir_of
from tfds_builders.six_class.six_class_dataset_builder import Builder as SixClass
from tfds_builders.sources import FileBuilder
from tfds_builders.table.table_dataset_builder import Builder as Table

BUILDERS: dict[str, type[RadiographBuilder]] = {
    "chestxray14": ChestXray14,
    "cxr_phantom": CxrPhantom,
    "mimic_cxr_jpg": MimicCxrJpg,
    "six_class": SixClass,
    "folder": Folder,
    "table": Table,
}
OPTIONS = {
    "chestxray14": ("aspect",),
    "cxr_phantom": ("patients", "seed"),
    "mimic_cxr_jpg": ("aspect", "labels"),
    "six_class": ("aspect", "name"),
    "folder": ("aspect", "name"),
    "table": ("aspect", "name", "table", "image_column", "label_columns", "class_column", "patient_column"),
}
"""Options of each builder besides source, size and workers."""

_DEFAULTS = {"aspect": "stretch"}  # options that are stored only if they differ from this
_COMPARED = ("id", "patient", "study", "view", "age", "sex", "source", "official")


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
      directory: of the prepared data.
      images: number of images.
      patients: number of patients.
      missing: ids in the source's table without an image.
      unlisted: images of the source that its table does not list.
      fingerprint: of the data.
      bytes: size on disk.
      seconds: duration.
      reused: whether the data was already prepared.
      notes: notes for the user, one line each.
    """

    directory: Path
    images: int
    patients: int
    missing: list[str]
    unlisted: list[str]
    fingerprint: str
    bytes: int
    seconds: float
    reused: bool = False
    notes: list[str] = field(default_factory=list)


def prepare(dataset: str, *, size: int | None = None, **options: Any) -> Prepared:
    """Prepare a data set at one stored size; see `prepare_sizes`."""
    return prepare_sizes(dataset, [size], **options)[0]


def prepare_sizes(
    dataset: str,
    sizes: Sequence[int | None],
    *,
    source: Path | str | None = None,
    data_dir: Path | str,
    allow_missing: bool = False,
    workers: int | None = None,
    repair: bool = False,
    beam: Sequence[str] | None = None,
    **options: Any,
) -> list[Prepared]:
    """Prepare a data set at several stored sizes, reading each image once; checks sizes that are already prepared.

    Args:
      dataset: one of `BUILDERS`.
      sizes: stored sizes in px; None stores images at the size of the source, for the phantom at 256 px.
      source: folder with the files. None downloads ChestX-ray14; the phantom needs none.
      data_dir: folder of the prepared data sets.
      allow_missing: continue if images are missing or not in the table; see `sources.match_images`.
      workers: number of threads; None uses one per core.
      repair: rebuild damaged shards of data that is already prepared.
      beam: options of the Apache Beam pipeline that writes the shards; None writes them in this process.
      **options: of the builder, see `OPTIONS`.

    Returns:
      One result per size.

    Raises:
      CxrError: the source cannot be used (the message names the file or row), the disk is full, the data set was
        prepared with other options or is damaged, or another process is preparing it. Finished shards are kept, and
        the same call resumes with them.
    """
    start = time.monotonic()
    if beam is not None:  # its workers have other working directories, and the runner has one worker per core
        options = {name: _absolute(option) for name, option in options.items()}
        source, data_dir, workers = _absolute(source), Path(data_dir).absolute(), workers or 1
    factories = [
        _builder_factory(dataset, source, Path(data_dir), size, allow_missing, workers, options)
        for size in dict.fromkeys(sizes)
    ]
    builders = [factory() for factory in factories]
    with contextlib.ExitStack() as locks:
        for directory in sorted(Path(builder.data_dir) for builder in builders):
            locks.enter_context(_lock(directory))
        existing = {
            builder: read_directory(Path(builder.data_dir), check=False)
            for builder in builders
            if Path(builder.data_dir).is_dir()
        }
        for builder, records in existing.items():
            _check_options(builder, records)
        new = [builder for builder in builders if builder not in existing]
        has_source = any(isinstance(builder, FileBuilder) and builder.source is not None for builder in builders)
        source_records = _read_source(builders) if new or repair or has_source else None
        notes = {builder: [] for builder in builders}
        for builder, records in existing.items():
            if source_records is not None and isinstance(builder, FileBuilder):
                _check_source(builder, records, source_records)
            notes[builder] += _check_shards(builder, records, source_records if repair else None)
        if new:
            assert source_records is not None
            missing = [factories[builders.index(builder)] for builder in new]
            notes[new[0]] += _build(new, source_records, None if beam is None else _write_with_beam(missing, beam))
    results = []
    for builder in builders:
        directory = Path(builder.data_dir)
        records = read_directory(directory)
        selection = builder.selection if isinstance(builder, FileBuilder) else None
        results.append(
            Prepared(
                directory=directory,
                images=len(records),
                patients=len(np.unique(records.patient)),
                missing=selection.missing if selection else [],
                unlisted=selection.unlisted if selection else [],
                fingerprint=records.fingerprint,
                bytes=sum(path.stat().st_size for path in directory.iterdir()),
                seconds=time.monotonic() - start,
                reused=builder in existing,
                notes=notes[builder] + collect_notes(records, selection, builder.PUBLISHED_COUNTS),
            )
        )
    for note in dict.fromkeys(note for prepared in results for note in prepared.notes):
        log(note)
    return results


def _builder_factory(
    dataset: str,
    source: Path | str | None,
    data_dir: Path,
    size: int | None,
    allow_missing: bool,
    workers: int | None,
    options: dict[str, Any],
) -> Callable[[], RadiographBuilder]:
    """Check the options and return a function that makes the builder."""
    if dataset not in BUILDERS:
        raise CxrError(f"unknown data set {dataset!r}; choose one of {', '.join(BUILDERS)}")
    cls, allowed = BUILDERS[dataset], OPTIONS[dataset]
    for name in options:
        if name not in allowed:
            raise CxrError(f"{dataset} has no option {name!r}; its options are {', '.join(allowed) or 'none'}")
    config = str(size) if size is not None else cls.BUILDER_CONFIGS[0].name
    if config not in cls.builder_configs:
        raise CxrError(f"{dataset} is not stored at size {config}; choose one of {', '.join(cls.builder_configs)}")
    if issubclass(cls, FileBuilder):
        options = {**options, "source": source, "allow_missing": allow_missing}
    elif source is not None:
        raise CxrError(f"{dataset} is drawn and has no source; omit --source")
    return partial(cls, data_dir=data_dir, config=config, workers=workers, **options)


def _absolute(option: Any) -> Any:
    return option.absolute() if isinstance(option, Path) else option


def _write_with_beam(factories: Sequence[Callable[[], RadiographBuilder]], flags: Sequence[str]) -> WriteMissing:
    try:
        from tfds_builders.beam import write_with_beam
    except ImportError as error:
        raise CxrError("--beam needs the package apache-beam: install with `uv sync --no-dev --extra beam`") from error
    return write_with_beam(factories, flags)


def _read_source(builders: Sequence[RadiographBuilder]) -> Sequence[Record]:
    """Read the records of the source, after which every builder can make images."""
    records = builders[0].records()
    for builder in builders[1:]:
        builder.copy_source_from(builders[0])
    return records


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a data set at one size."""
    folder = directory.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise CxrError(f"cannot write to {folder}: {error.strerror}; choose another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CxrError(f"another process is preparing {folder}; wait until it has finished") from error
        yield


def _build(
    builders: Sequence[RadiographBuilder], records: Sequence[Record], write_missing: WriteMissing | None
) -> list[str]:
    """Build the data sets; a `CxrError` wrapped in another error is raised as it was."""
    try:
        return build_datasets(builders, records, write_missing)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, CxrError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def _check_shards(builder: RadiographBuilder, records: Records, repair_from: Sequence[Record] | None) -> list[str]:
    """Compare all files with their checksums, and rebuild damaged shards from `repair_from` if given.

    Returns:
      Notes, one line each.

    Raises:
      CxrError: a file is damaged and cannot or should not be repaired.
    """
    directory = Path(builder.data_dir)
    manifest = read_manifest(directory)
    if file_sha256(directory / TABLE) != manifest.table:
        raise CxrError(f"{directory / TABLE} is damaged (checksum differs); delete {directory} and prepare it again")
    title = f"checking {builder.name}/{builder.builder_config_name}"
    with progress_bar(title, len(manifest.shards), unit="shards") as advance:
        damage = find_damage(directory, manifest, workers=builder.workers, advance=advance)
    if not damage:
        shutil.rmtree(work_dir_of(directory), ignore_errors=True)  # left by a run that was killed at its very end
        return []
    if repair_from is None:
        raise CxrError(
            f"damaged shards in {directory}: {describe_damage(damage)}; rerun the command with --repair to rebuild them"
        )
    repair_shards(builder, repair_from, [digest.hex() for digest in records.digests.tolist()], list(damage))
    return [f"repaired in {directory}: {describe_damage(damage)}"]


def _check_options(builder: RadiographBuilder, records: Records) -> None:
    """Check that the data was prepared with the builder's options."""
    given, stored = ({**_DEFAULTS, **options} for options in (builder.options, records.options))
    for name, value in given.items():
        if stored.get(name) != value:
            raise _mismatch(records, f"with {name} {stored.get(name)}, not {value}")


def _check_source(builder: FileBuilder, records: Records, source_records: Sequence[Record]) -> None:
    """Check that the data would be prepared in the same way from the source as it is now."""
    ids = [record.id for record in source_records]
    if ids != records.id.tolist():
        raise _mismatch(records, f"from {len(records):,} images, not the {len(ids):,} of {builder.source}")
    if tuple(builder.FINDINGS) != records.findings:
        raise _mismatch(records, f"with findings {', '.join(records.findings)}")
    table = records_to_table(source_records, builder.FINDINGS)
    for name in (*_COMPARED, *(f"label_{finding}" for finding in records.findings)):
        if not _columns_equal(table[name], records.table[name]):
            raise _mismatch(records, f"with another {name} than the source has now")


def _mismatch(records: Records, difference: str) -> CxrError:
    return CxrError(
        f"{records.directory} was prepared {difference}; delete it to prepare it again, or choose another --data-dir"
    )


def _columns_equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Return whether two columns have equal values, dictionary-encoded or not; NaN equals NaN."""
    values = [column.cast(pa.string()).combine_chunks() for column in (one, other)]
    return values[0].equals(values[1])
