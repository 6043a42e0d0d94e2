"""Preparing a data set: run its TFDS builder, once, so that what is there afterwards is complete or is nothing."""

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

from cxrjax import console
from cxrjax.data.manifest import MANIFEST, find_damage, describe_damage, read_manifest, file_sha256
from cxrjax.data.records import TABLE, Record, Records, records_to_table, read_directory
from cxrjax.errors import CxrError
from tfds_builders import shards
from tfds_builders.builder import Radiographs
from tfds_builders.chestxray14.chestxray14_dataset_builder import Builder as ChestXray14
from tfds_builders.cxr_phantom.cxr_phantom_dataset_builder import Builder as CxrPhantom
from tfds_builders.folder.folder_dataset_builder import Builder as Folder
from tfds_builders.mimic_cxr_jpg.mimic_cxr_jpg_dataset_builder import Builder as MimicCxrJpg
from tfds_builders.prepare_warnings import about
from tfds_builders.shard_writer import Draft, folder_of
from tfds_builders.six_class.six_class_dataset_builder import Builder as SixClass
from tfds_builders.sources import FromFiles
from tfds_builders.table.table_dataset_builder import Builder as Table

BUILDERS: dict[str, type[Radiographs]] = {
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
"""Options of each builder beside source, size and workers."""

Run = Callable[[Sequence[Draft]], None]
"""What makes the missing shards of drafts."""

_DEFAULTS = {"aspect": "stretch"}  # of options that are kept only where they are another
_FIXED = ("id", "patient", "study", "view", "age", "sex", "source", "official")


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left behind.

    Attributes:
      directory: of the prepared data; `open_records` finds it.
      images: how many.
      patients: how many.
      missing: ids of the source's table that have no image.
      unlisted: images of the source that its table does not list.
      fingerprint: of the data.
      bytes: on the disk.
      seconds: it took.
      reused: it was there already.
      notes: one line each, what a user should know.
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


def prepare(dataset: str, *, size: int | None = None, **how: Any) -> Prepared:
    """Prepare a data set at one stored size; see `prepare_sizes`."""
    return prepare_sizes(dataset, [size], **how)[0]


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
    """Prepare a data set at several stored sizes, each image read once; sizes that are prepared already are checked.

    Args:
      dataset: one of `BUILDERS`.
      sizes: sides of the stored images in pixels; None keeps the source's images, and takes 256 for the phantom.
      source: folder with the files. None downloads ChestX-ray14; the phantom needs none.
      data_dir: where prepared data sets are kept.
      allow_missing: go on although images are missing, or not in the table; see `sources.match`.
      workers: threads; None takes one per core.
      repair: make damaged shards of what is prepared already anew.
      beam: options of the Apache Beam pipeline that makes the shards; None makes them in this process.
      **options: of the builder, as `OPTIONS` names them.

    Returns:
      what was prepared at each size.

    Raises:
      CxrError: the source cannot be used (the file or row is named), the disk is full, the data set is prepared with
        other options or is damaged, or another process is preparing it. Shards that are finished then stay, beside the
        place of the data set, and the same call goes on with them.
    """
    start = time.monotonic()
    if beam is not None:  # its workers have other working directories, and the runner one of them per core
        options = {name: _absolute(option) for name, option in options.items()}
        source, data_dir, workers = _absolute(source), Path(data_dir).absolute(), workers or 1
    given = {"allow_missing": allow_missing, "workers": workers}
    recipes = [
        _recipe(dataset, source, Path(data_dir), size, **given, options=options) for size in dict.fromkeys(sizes)
    ]
    builders = [recipe() for recipe in recipes]
    with contextlib.ExitStack() as held:
        for directory in sorted(Path(builder.data_dir) for builder in builders):
            held.enter_context(_alone(directory))
        prepared = [builder for builder in builders if Path(builder.data_dir).is_dir()]
        there = {builder: read_directory(Path(builder.data_dir), check=False) for builder in prepared}
        for builder, records in there.items():
            _same_options(builder, records)
        new = [builder for builder in builders if builder not in there]
        has_source = any(isinstance(builder, FromFiles) and builder.source is not None for builder in builders)
        selected = _select(builders) if new or repair or has_source else None
        notes = {builder: [] for builder in builders}
        for builder, records in there.items():
            if selected is not None and isinstance(builder, FromFiles):
                _same_source(builder, records, selected)
            notes[builder] += _whole(builder, records, selected if repair else None)
        if new:
            assert selected is not None
            run = None if beam is None else _on_beam([recipes[builders.index(builder)] for builder in new], beam)
            made = _make(new, selected, run)
            notes |= {builder: made if builder is new[0] else [] for builder in new}
    results = []
    for builder in builders:
        records = read_directory(Path(builder.data_dir))
        selection = builder.selection if isinstance(builder, FromFiles) else None
        results.append(
            Prepared(
                directory=Path(builder.data_dir),
                images=len(records),
                patients=len(np.unique(records.patient)),
                missing=selection.missing if selection else [],
                unlisted=selection.unlisted if selection else [],
                fingerprint=records.fingerprint,
                bytes=sum(path.stat().st_size for path in Path(builder.data_dir).iterdir()),
                seconds=time.monotonic() - start,
                reused=builder in there,
                notes=notes[builder] + about(records, selection, builder.PUBLISHED),
            )
        )
    for note in dict.fromkeys(note for prepared in results for note in prepared.notes):
        console.stderr.print(note, soft_wrap=True)
    return results


def _recipe(
    dataset: str,
    source: Path | str | None,
    data_dir: Path,
    size: int | None,
    allow_missing: bool,
    workers: int | None,
    options: dict[str, Any],
) -> Callable[[], Radiographs]:
    """How the builder is made, with options it knows."""
    if dataset not in BUILDERS:
        raise CxrError(f"unknown data set {dataset!r}; choose one of {', '.join(BUILDERS)}")
    cls, known = BUILDERS[dataset], OPTIONS[dataset]
    for name in options:
        if name not in known:
            raise CxrError(f"{dataset} has no option {name!r}; its options are {', '.join(known) or 'none'}")
    config = str(size) if size is not None else cls.BUILDER_CONFIGS[0].name
    if config not in cls.builder_configs:
        raise CxrError(f"{dataset} is not stored at size {config}; choose one of {', '.join(cls.builder_configs)}")
    if issubclass(cls, FromFiles):
        options = {**options, "source": source, "allow_missing": allow_missing}
    elif source is not None:
        raise CxrError(f"{dataset} has no source: it is drawn; leave --source out")
    return partial(cls, data_dir=data_dir, config=config, workers=workers, **options)


def _absolute(option: Any) -> Any:
    return option.absolute() if isinstance(option, Path) else option


def _on_beam(recipes: Sequence[Callable[[], Radiographs]], flags: Sequence[str]) -> Run:
    try:
        from tfds_builders import beam
    except ImportError as error:
        raise CxrError("--beam needs the package apache-beam: install with `uv sync --no-dev --extra beam`") from error
    return beam.run(recipes, flags)


def _select(builders: Sequence[Radiographs]) -> Sequence[Record]:
    """The records of the source, with which every builder can then make images."""
    records = builders[0].records()
    for builder in builders[1:]:
        builder.adopt(builders[0])
    return records


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock on a data set's config."""
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
            raise CxrError(f"another process is preparing {folder}; wait until it is done") from error
        yield


def _make(builders: Sequence[Radiographs], records: Sequence[Record], run: Run | None) -> list[str]:
    """Make what is not there yet; a `CxrError` that the work wrapped in another error comes out as it was."""
    try:
        return shards.make(builders, records, run)
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, CxrError):
                raise cause from None
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _whole(builder: Radiographs, records: Records, repair_from: Sequence[Record] | None) -> list[str]:
    """Compare every shard with its checksum, and repair it from these records if there are any.

    Returns:
      notes, one line each.

    Raises:
      CxrError: something is damaged and is not to be repaired, or cannot be.
    """
    directory = Path(builder.data_dir)
    manifest = read_manifest(directory)
    if manifest is None:
        return [
            f"{directory} was prepared before checksums were kept ({MANIFEST} is absent), so it was not checked for "
            "damage; delete it and prepare it again to have them"
        ]
    if file_sha256(directory / TABLE) != manifest.table:
        raise CxrError(f"{directory / TABLE} is damaged (checksum differs); delete {directory} and prepare it again")
    with console.progress_bar(
        f"checking {builder.name}/{builder.builder_config_name}", len(manifest.shards), unit="shards"
    ) as on:
        wrong = find_damage(directory, manifest, workers=builder.workers, advance=on)
    if not wrong:
        shutil.rmtree(folder_of(directory), ignore_errors=True)  # of a run that was killed in its last moment
        return []
    if repair_from is None:
        raise CxrError(
            f"damaged in {directory}: {describe_damage(wrong)}; the same command with --repair makes only these shards anew"
        )
    shards.repair(builder, repair_from, [digest.hex() for digest in records.digests.tolist()], list(wrong))
    return [f"repaired in {directory}: {describe_damage(wrong)}"]


def _same_options(builder: Radiographs, records: Records) -> None:
    """Check that what is prepared was prepared with these options."""
    wanted, had = ({**_DEFAULTS, **options} for options in (builder.options, records.options))
    for name in wanted:
        if had.get(name) != wanted[name]:
            raise CxrError(
                f"{records.directory} was prepared with {name} {had.get(name)}, not {wanted[name]}; {_mend(records)}"
            )


def _same_source(builder: FromFiles, records: Records, selected: Sequence[Record]) -> None:
    """Check that what is prepared is what would be prepared from the source."""
    ids = [record.id for record in selected]
    if ids != records.id.tolist():
        raise CxrError(
            f"{records.directory} was prepared from {len(records):,} images, not the {len(ids):,} of "
            f"{builder.source}; {_mend(records)}"
        )
    if tuple(builder.FINDINGS) != records.findings:
        raise CxrError(
            f"{records.directory} was prepared with findings {', '.join(records.findings)}; {_mend(records)}"
        )
    now = records_to_table(selected, builder.FINDINGS)
    for name in (*_FIXED, *(f"label_{finding}" for finding in records.findings)):
        if not _equal(now[name], records.table[name]):
            raise CxrError(
                f"{records.directory} was prepared with another {name} than the source has now; {_mend(records)}"
            )


def _mend(records: Records) -> str:
    return f"delete {records.directory} to prepare it anew, or choose another --data-dir"


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Equal values, whether kept as a dictionary or not; unknown ages are equal."""
    values = [column.cast(pa.string()).combine_chunks() for column in (one, other)]
    return values[0].equals(values[1])
