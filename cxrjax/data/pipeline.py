"""The Grain chain from records to batches: shuffled and endless for training, once and in order for evaluation.

Batch k of a stream is computed from k alone, by a thread of this process. So it does not matter how many threads there
are, and a stream that starts at batch k goes on exactly where another one stopped: the number of batches *trained on*
is all that a checkpoint needs to keep. (A position kept by the stream would be wrong: it runs ahead of the training.)
"""

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from cxrjax.data.batch import Batch
from cxrjax.data.images import Augment, Warp
from cxrjax.data.records import Records
from cxrjax.data.sampling import Sampling, order
from cxrjax.errors import CxrError
from cxrjax.findings import NO_FINDING, LabelPolicy, no_finding, positions, targets


@dataclass(frozen=True)
class Examples:
    """Records with their targets: one part of a split.

    Attributes:
      records: the prepared data set that the images come from.
      row: rows of its table, n of them.
      label: target values, 0 or 1, or between where the label policy smooths.
      label_mask: whether each target is known.
      origin: number of the data set that each comes from, where there are several.
    """

    records: Records
    row: Int32[np.ndarray, " n"]
    label: Float32[np.ndarray, "n K"]
    label_mask: Bool[np.ndarray, "n K"]
    origin: Int32[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.row)


def make_examples(
    records: Records, rows: Sequence[int] | np.ndarray, findings: Sequence[str], policy: LabelPolicy
) -> Examples:
    """The given rows of a data set with the wanted findings' targets.

    `No Finding` may be wanted of a data set that does not have it: it is derived.

    Raises:
      CxrError: a finding is unknown, or a label is not one of 1, 0, -1, -2.
    """
    rows = np.asarray(rows, np.int32)
    labels, names = records.labels[rows], records.findings
    if NO_FINDING in findings and NO_FINDING not in names:
        labels, names = np.column_stack([labels, no_finding(labels, names)]), (*names, NO_FINDING)
    wanted = positions(findings, names)
    label, label_mask = targets(labels, policy, findings=names, ids=records.id[rows])
    return Examples(records, rows, label[:, wanted], label_mask[:, wanted])


def training_batches(
    examples: Examples,
    *,
    size: int,
    batch_size: int,
    augment: Augment,
    seed: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    start: int = 0,
    threads: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Endless batches of augmented images; every record once per epoch, each epoch in another order.

    Epochs follow each other without a gap: where the batch size does not divide their length, a batch holds the end of
    one and the beginning of the next. No batch is short. Another `sampling` draws in its proportions instead, which
    every batch has as nearly as it can.

    Args:
      examples: n records, in any order.
      size: rows and columns of the images.
      batch_size: of all processes together.
      augment: what may happen to the images.
      seed: of the order and the augmentation; 0 or more.
      sampling: which examples are drawn, and how often.
      start: number of the first batch, so that a run goes on as if it had never stopped.
      threads: that load batches; 0 loads them in the caller's thread. Memory holds `threads + 1` loaded batches.
      shard: (p, P): yield part p, `batch_size / P` rows, of every batch. The parts together are the global batch.

    Yields:
      The parts of batches `start`, `start + 1`, ...; `close()` ends the threads.

    Raises:
      CxrError: no records, or sizes that do not fit; while iterating, for an image that cannot be read.
    """
    if not len(examples):
        raise CxrError("there are no records to train on; check the split and its sizes")
    if seed < 0 or start < 0:
        raise CxrError(f"seed {seed} and first batch {start} must be 0 or more")
    rows = _local_rows(batch_size, shard)
    order_seed, draw_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))

    def draw(index: int, rng: np.random.Generator) -> tuple[int, Warp]:
        return int(index), augment.draw(rng)

    strata = sampling.strata(examples.label, examples.label_mask, examples.origin)
    plan = order(strata, batch_size, order_seed)
    if augment == Augment():
        plan = plan.map(lambda index: (int(index), Warp()))  # drawing nothing costs a third of reading a small image
    else:
        plan = plan.random_map(draw, seed=draw_seed)

    def batch(number: int) -> Batch:
        return _load(examples, [plan[number * batch_size + row] for row in rows], size)

    return _stream(batch, start, sys.maxsize // batch_size - 1, threads)


def evaluation_batches(
    examples: Examples, *, size: int, batch_size: int, threads: int = 2, shard: tuple[int, int] = (0, 1)
) -> Generator[Batch, None, None]:
    """Every record once, in the order of `examples`, unaugmented; the last batch is padded.

    Every process of `shard` gets the same number of batches of the same shape (`evaluation_steps`), some perhaps of
    padding alone, so that all take part in every collective. Arguments and errors are those of `training_batches`.
    """
    rows = _local_rows(batch_size, shard)

    def batch(number: int) -> Batch:
        places = (number * batch_size + row for row in rows)
        return _load(examples, [(place, Warp()) if place < len(examples) else None for place in places], size)

    return _stream(batch, 0, evaluation_steps(len(examples), batch_size), threads)


def evaluation_steps(n: int, batch_size: int) -> int:
    """How many batches hold n records; the same on every process."""
    return -(-n // batch_size)


def _local_rows(batch_size: int, shard: tuple[int, int]) -> range:
    """This process's rows of every global batch."""
    part, parts = shard
    if not 0 <= part < parts:
        raise CxrError(f"shard {part} of {parts} does not exist; parts count from 0")
    if batch_size < 1 or batch_size % parts:
        raise CxrError(f"batch size {batch_size} must be a positive multiple of the {parts} processes that load data")
    share = batch_size // parts
    return range(part * share, (part + 1) * share)


def _load(examples: Examples, plan: Sequence[tuple[int, Warp] | None], size: int) -> Batch:
    """Reads what is planned: (which example, what happens to it), None for padding."""
    count, findings = len(plan), examples.label.shape[1]
    batch = Batch(
        image=np.empty((count, size, size, 1), np.uint8),
        label=np.zeros((count, findings), np.float32),
        label_mask=np.zeros((count, findings), bool),
        example_mask=np.zeros(count, bool),
        record=np.full(count, -1, np.int32),
    )
    for i, item in enumerate(plan):
        pixels = batch.image[i, :, :, 0]
        if item is None:
            pixels[...] = 0
        else:
            which, warp = item
            row = int(examples.row[which])
            warp.into(pixels, _image(examples.records, row, size))
            batch.label[i], batch.label_mask[i] = examples.label[which], examples.label_mask[which]
            batch.example_mask[i], batch.record[i] = True, row
    return batch


def _image(records: Records, row: int, size: int) -> UInt8[np.ndarray, "size size"]:
    try:
        return records.image(row, size)
    except CxrError:
        raise
    except Exception as error:  # of whichever library: a run of days must say which image it was
        raise CxrError(f"{records.id[row]} cannot be loaded ({type(error).__name__}: {error})") from error


def _stream(batch: Callable[[int], Batch], start: int, stop: int, threads: int) -> Generator[Batch, None, None]:
    """Batches start to stop in order, loaded by threads a little ahead of their use.

    Threads, not processes: decoding and warping release the interpreter's lock, and nothing is copied or left behind.
    The first batch is loaded before they start, since it imports TFDS: two threads that both do may wait for each other
    for ever.
    """
    if start >= stop:
        return
    yield batch(start)

    def attempt(number: int) -> Batch | CxrError:
        try:
            return batch(number)
        except CxrError as error:
            return error  # to be raised below: Grain would add lines of its own to the message

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0)
    batches = iter(grain.MapDataset.range(start + 1, stop).map(attempt).to_iter_dataset(options))
    try:
        for loaded in batches:
            if isinstance(loaded, CxrError):
                raise loaded
            yield loaded
    finally:
        batches.close()
