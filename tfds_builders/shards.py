"""Making prepared data shard by shard: at several sizes in one pass, going on where a run ended, repairing."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from cxrjax import console
from cxrjax.data.records import Record
from cxrjax.errors import CxrError
from tfds_builders.shard_writer import Draft

if TYPE_CHECKING:
    from tfds_builders.builder import Radiographs, Stored

Item = TypeVar("Item")
Result = TypeVar("Result")


def make(
    builders: Sequence["Radiographs"],
    records: Sequence[Record],
    run: Callable[[Sequence[Draft]], None] | None = None,
) -> list[str]:
    """Prepare a data set at several sizes, each image read once; goes on where an earlier run ended.

    Args:
      builders: one per size, which differ in nothing else; the first has been given the records, and makes the images.
      records: what is to be prepared, in order.
      run: makes the shards that are missing in all drafts; default in this process.

    Returns:
      notes, one line each, of what was kept and what was made anew.

    Raises:
      CxrError: an image cannot be used, or the disk is full; finished shards are kept for the next run.
    """
    drafts = [Draft(builder, records) for builder in builders]
    notes = []
    with _keeping(drafts):
        for draft in drafts:
            stale = draft.resume()
            if draft.finished or stale:
                notes.append(_resumed(draft, stale))
        (run or _here)(drafts)
        for draft in drafts:
            draft.finish()
    return notes


def repair(builder: "Radiographs", records: Sequence[Record], digests: Sequence[str], files: Sequence[str]) -> None:
    """Make some shards of a prepared data set anew.

    Args:
      builder: which has been given the records.
      records: all of the data set.
      digests: sha256 of the image that each was made from.
      files: names of the shards.

    Raises:
      CxrError: an image is not the one that was prepared.
    """
    draft = Draft(builder, records, only=files)
    if strange := set(files) - {shard.file for shard in draft.shards}:
        raise CxrError(
            f"{draft.final} has shards of another length ({min(strange)}); delete that folder and prepare it again"
        )
    with _keeping([draft]):
        draft.resume()
        _here([draft])
        draft.replace(digests)


@contextlib.contextmanager
def _keeping(drafts: Sequence[Draft]) -> Generator[None, None, None]:
    """After an error, keep what is finished, and say so if it is that the disk is full."""
    try:
        yield
    except BaseException as error:
        kept = [draft for draft in drafts if draft.give_up()]
        for draft in kept:
            draft.trust()  # other processes may have finished more
        if disk_is_full(error):
            raise CxrError(_full(drafts, kept)) from error
        raise


def write(drafts: Sequence[Draft], rows: Iterable[int], *, workers: int, advance: Callable[[], None]) -> None:
    """Make the missing shards of these rows; every image is read once for all sizes that need it.

    Args:
      drafts: one per size.
      rows: in order; of no shard a part only.
      workers: threads.
      advance: is called for each row, also of those that no draft needs.
    """
    maker, records = drafts[0].builder, drafts[0].records
    missing = [draft.missing for draft in drafts]  # as it is now: it changes while images are made ahead

    def made(row: int) -> list[tuple[Draft, "Stored"]]:
        need = [d for d, shards in zip(drafts, missing, strict=True) if row // d.length in shards]
        images = maker.store(records[row], [draft.builder.size for draft in need]) if need else []
        return list(zip(need, images, strict=True))

    rows = list(rows)
    with contextlib.closing(in_order(made, rows, workers=workers)) as stream:
        try:
            for row, images in zip(rows, stream, strict=True):
                for draft, stored in images:
                    draft.add(row, stored)
                advance()
        finally:
            for draft in drafts:
                draft.drop()


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int = 4
) -> Generator[Result, None, None]:
    """Map in threads, in order; at most `ahead` results per worker wait. OpenCV and hashing release the GIL."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that the disk or the quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _here(drafts: Sequence[Draft]) -> None:
    first = drafts[0]
    sizes = "+".join(str(draft.builder.builder_config_name) for draft in drafts)
    rows = sorted(set().union(*(draft.rows for draft in drafts)))
    done = len(first.records) - len(rows)
    with console.progress_bar(f"{first.builder.name}/{sizes}", len(first.records), start=done) as advance:
        write(drafts, rows, workers=first.builder.workers, advance=advance)


def _resumed(draft: Draft, stale: int) -> str:
    text = (
        f"{draft.builder.name}/{draft.builder.builder_config_name} goes on: {len(draft.finished):,} of "
        f"{len(draft.shards):,} shards were finished before"
    )
    changed = "are made anew, for they are damaged, or were made from other files or with other options"
    return f"{text}; {stale:,} {changed}" if stale else text


def _full(drafts: Sequence[Draft], kept: Sequence[Draft]) -> str:
    places = ", ".join(str(draft.final) for draft in drafts)
    if not kept:
        return (
            f"the disk is full: {places} could not be written and nothing of it was kept; make room, or choose another "
            "--data-dir"
        )
    shards = ", ".join(f"{len(d.finished):,} of {len(d.shards):,} shards in {d.folder}" for d in kept)
    return (
        f"the disk is full: {places} could not be written; finished are {shards}: make room and give the same command "
        "again, which goes on there, or choose another --data-dir"
    )
