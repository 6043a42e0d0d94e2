"""Preparing a data set: run its TFDS builder, once, so that what is there afterwards is complete or is nothing."""

import contextlib
import errno
import fcntl
import io
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds

from cxrjax import console
from cxrjax.data.records import Records, as_table, read_directory
from cxrjax.errors import CxrError
from tfds_builders.chestxray14.chestxray14_dataset_builder import Builder as ChestXray14
from tfds_builders.cxr_phantom.cxr_phantom_dataset_builder import Builder as CxrPhantom
from tfds_builders.folder.folder_dataset_builder import Builder as Folder
from tfds_builders.mimic_cxr_jpg.mimic_cxr_jpg_dataset_builder import Builder as MimicCxrJpg
from tfds_builders.radiographs import Radiographs
from tfds_builders.six_class.six_class_dataset_builder import Builder as SixClass
from tfds_builders.sources import FromFiles, some
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
    "chestxray14": (),
    "cxr_phantom": ("patients", "seed"),
    "mimic_cxr_jpg": ("labels",),
    "six_class": ("name",),
    "folder": ("name",),
    "table": ("name", "table", "image_column", "label_columns", "class_column", "patient_column"),
}
"""Options of each builder beside source, size and workers."""

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


def prepare(
    dataset: str,
    *,
    source: Path | str | None = None,
    data_dir: Path | str,
    size: int | None = None,
    allow_missing: bool = False,
    workers: int | None = None,
    **options: Any,
) -> Prepared:
    """Prepare a data set at one stored size; what is prepared already is checked against the options and reported.

    Args:
      dataset: one of `BUILDERS`.
      source: folder with the files. None downloads ChestX-ray14; the phantom needs none.
      data_dir: where prepared data sets are kept.
      size: side of the stored images in pixels; None keeps the source's images, and takes 256 for the phantom.
      allow_missing: go on although images are missing, or not in the table; see `sources.match`.
      workers: threads; None takes one per core.
      **options: of the builder, as `OPTIONS` names them.

    Raises:
      CxrError: the source cannot be used (the file or row is named), the disk is full, the data set is prepared with
        other options, or another process is preparing it. Then nothing new is left on the disk.
    """
    start = time.monotonic()
    builder = _builder(dataset, source, Path(data_dir), size, allow_missing, workers, options)
    directory = Path(builder.data_dir)
    with _alone(directory):
        reused = directory.is_dir()
        if reused:
            records = read_directory(directory)
            _same(builder, records)
        else:
            _run(builder)
            records = read_directory(directory)
    selection = builder.selection if isinstance(builder, FromFiles) else None
    missing, unlisted = (selection.missing, selection.unlisted) if selection else ([], [])
    notes = _notes(len(records), missing, unlisted) + (selection.notes if selection else []) + _twins(records)
    prepared = Prepared(
        directory=directory,
        images=len(records),
        patients=len(np.unique(records.patient)),
        missing=missing,
        unlisted=unlisted,
        fingerprint=records.fingerprint,
        bytes=sum(path.stat().st_size for path in directory.iterdir()),
        seconds=time.monotonic() - start,
        reused=reused,
        notes=notes,
    )
    for note in prepared.notes:
        console.stderr.print(note, soft_wrap=True)
    return prepared


def _builder(
    dataset: str,
    source: Path | str | None,
    data_dir: Path,
    size: int | None,
    allow_missing: bool,
    workers: int | None,
    options: dict[str, Any],
) -> Radiographs:
    """The builder, with options it knows."""
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
    return cls(data_dir=data_dir, config=config, workers=workers, **options)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock on a data set's config; what a killed run left behind is removed."""
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
        for leftover in folder.glob(f"incomplete.*_{directory.name}"):
            shutil.rmtree(leftover)
        yield


def _run(builder: Radiographs) -> None:
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
            builder.download_and_prepare(download_config=config)
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, CxrError):
                raise cause from None
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(cause):
                raise CxrError(
                    f"the disk is full: {builder.data_dir} could not be written and nothing of it was kept; "
                    "make room, or choose another --data-dir"
                ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _same(builder: Radiographs, records: Records) -> None:
    """Check that what is prepared is what would be prepared."""
    mend = f"delete {records.directory} to prepare it anew, or choose another --data-dir"
    for name, wanted in builder.options.items():
        if records.options.get(name) != wanted:
            raise CxrError(
                f"{records.directory} was prepared with {name} {records.options.get(name)}, not {wanted}; {mend}"
            )
    if isinstance(builder, FromFiles) and builder.source is not None:
        builder.selection = builder.select()
        ids = [record.id for record in builder.selection.records]
        if ids != records.id.tolist():
            raise CxrError(
                f"{records.directory} was prepared from {len(records):,} images, not the {len(ids):,} of "
                f"{builder.source}; {mend}"
            )
        if tuple(builder.FINDINGS) != records.findings:
            raise CxrError(f"{records.directory} was prepared with findings {', '.join(records.findings)}; {mend}")
        now = as_table(builder.selection.records, builder.FINDINGS)
        for name in (*_FIXED, *(f"label_{finding}" for finding in records.findings)):
            if not _equal(now[name], records.table[name]):
                raise CxrError(f"{records.directory} was prepared with another {name} than the source has now; {mend}")


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Equal values, whether kept as a dictionary or not; unknown ages are equal."""
    values = [column.cast(pa.string()).combine_chunks() for column in (one, other)]
    return values[0].equals(values[1])


def _twins(records: Records) -> list[str]:
    """A note of images that are the same file under several patients."""
    _, first, which = np.unique(records.digests, return_index=True, return_inverse=True)
    twins = np.flatnonzero(records.patient != records.patient[first[which]])
    if not len(twins):
        return []
    pairs = [f"{records.id[row]} = {records.id[first[which[row]]]}" for row in twins.tolist()]
    return [
        f"{len(twins):,} images are the same file as another patient's ({some(pairs)}): parts that are drawn keep such "
        "patients together, but the source's own parts may have one in training and one in the test part; delete one "
        "of each, or give both the same patient"
    ]


def _notes(images: int, missing: list[str], unlisted: list[str]) -> list[str]:
    notes = []
    if missing:
        notes.append(
            f"subset: {images:,} of the {images + len(missing):,} images in the table are prepared, "
            f"{len(missing):,} are not in the source"
        )
    if unlisted:
        notes.append(f"{len(unlisted):,} images of the source are left out: they are not in the table")
    return notes
