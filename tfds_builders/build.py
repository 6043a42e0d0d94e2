"""Build prepared data sets at several sizes in one pass, resume interrupted builds, and repair damaged shards."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from cxrjax.console import progress_bar
from cxrjax.data.records import Record
from cxrjax.errors import CxrError
from tfds_builders.shard_writer import DatasetWriter

if TYPE_CHECKING:
    from tfds_builders.builder import RadiographBuilder, StoredImage

Item = TypeVar("Item")
Result = TypeVar("Result")
WriteMissing = Callable[[Sequence[DatasetWriter]], None]
"""Writes the missing shards of all writers."""


def build_datasets(
    builders: Sequence["RadiographBuilder"], records: Sequence[Record], write_missing: WriteMissing | None = None
) -> list[str]:
    """Build a data set at several sizes, reading each image once; resumes an interrupted build.

    Args:
      builders: one per size, otherwise equal; the first makes the images.
      records: the records to prepare, in order.
      write_missing: writes the missing shards; None writes them in this process.

    Returns:
      Notes on what was resumed, one line each.

    Raises:
      CxrError: an image cannot be used, or the disk is full; finished shards are kept for the next run.
    """
    writers = [DatasetWriter(builder, records) for builder in builders]
    notes = []
    with _keep_finished(writers):
        for writer in writers:
            stale = writer.resume()
            if writer.finished or stale:
                notes.append(_resume_note(writer, stale))
        (write_missing or _write_in_process)(writers)
        for writer in writers:
            writer.finalize()
    return notes


def repair_shards(
    builder: "RadiographBuilder", records: Sequence[Record], digests: Sequence[str], files: Sequence[str]
) -> None:
    """Rebuild some shards of a prepared data set.

    Args:
      builder: builder that has read the records.
      records: all records of the data set.
      digests: sha256 of the source image of each record.
      files: names of the shards to rebuild.

    Raises:
      CxrError: an image is not the one that was prepared.
    """
    writer = DatasetWriter(builder, records, only=files)
    if unknown := set(files) - {shard.file for shard in writer.shards}:
        raise CxrError(
            f"{writer.target} has shards of another length ({min(unknown)}); delete that folder and prepare it again"
        )
    with _keep_finished([writer]):
        writer.resume()
        _write_in_process([writer])
        writer.replace_shards(digests)


def write_shards(
    writers: Sequence[DatasetWriter], rows: Iterable[int], *, workers: int, advance: Callable[[], None]
) -> None:
    """Write the missing shards of some rows, reading each image once for all sizes that need it.

    Args:
      writers: one per size.
      rows: in order; whole shards only.
      workers: number of threads.
      advance: called after each row.
    """
    builder, records = writers[0].builder, writers[0].records
    missing = [writer.missing for writer in writers]  # a copy: images are made ahead of the writers' state

    def make_images(row: int) -> list[tuple[DatasetWriter, "StoredImage"]]:
        needed = [w for w, shards in zip(writers, missing, strict=True) if row // w.shard_length in shards]
        images = builder.make_images(records[row], [writer.builder.size for writer in needed]) if needed else []
        return list(zip(needed, images, strict=True))

    rows = list(rows)
    with contextlib.closing(map_in_order(make_images, rows, workers=workers)) as stream:
        try:
            for row, images in zip(rows, stream, strict=True):
                for writer, image in images:
                    writer.write(row, image)
                advance()
        finally:
            for writer in writers:
                writer.discard_open_shard()


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int = 4
) -> Generator[Result, None, None]:
    """Map in threads and yield in order, with at most `ahead` pending results per worker."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= ahead * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_in_process(writers: Sequence[DatasetWriter]) -> None:
    first = writers[0]
    sizes = "+".join(str(writer.builder.builder_config_name) for writer in writers)
    rows = sorted(set().union(*(writer.missing_rows for writer in writers)))
    done = len(first.records) - len(rows)
    with progress_bar(f"{first.builder.name}/{sizes}", len(first.records), start=done) as advance:
        write_shards(writers, rows, workers=first.builder.workers, advance=advance)


@contextlib.contextmanager
def _keep_finished(writers: Sequence[DatasetWriter]) -> Generator[None, None, None]:
    """Keep finished shards after an error, and report a full disk as a `CxrError`."""
    try:
        yield
    except BaseException as error:
        kept = [writer for writer in writers if writer.remove_if_empty()]
        for writer in kept:
            writer.load_finished()  # other processes may have finished more
        if _is_disk_full(error):
            raise CxrError(_disk_full_message(writers, kept)) from error
        raise


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full_message(writers: Sequence[DatasetWriter], kept: Sequence[DatasetWriter]) -> str:
    targets = ", ".join(str(writer.target) for writer in writers)
    if not kept:
        return f"the disk is full: cannot write {targets}; nothing was kept. Free space or choose another --data-dir"
    shards = ", ".join(f"{len(w.finished):,} of {len(w.shards):,} shards in {w.work_dir}" for w in kept)
    return (
        f"the disk is full: cannot write {targets}; kept {shards}. Free space and rerun the command to resume, or "
        "choose another --data-dir"
    )


def _resume_note(writer: DatasetWriter, stale: int) -> str:
    name = f"{writer.builder.name}/{writer.builder.builder_config_name}"
    note = f"resuming {name}: {len(writer.finished):,} of {len(writer.shards):,} shards were already finished"
    reason = "because they are damaged, or were made from other files or with other options"
    return f"{note}; {stale:,} are rebuilt {reason}" if stale else note
