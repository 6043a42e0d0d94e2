"""The Grain pipeline from records to batches: sampling, augmentation, and loading by threads.

Batch k of a stream depends on k alone and is made by one thread of this process. So the number of threads does not
matter, and a stream that starts at batch k continues exactly where another one stopped: a checkpoint only needs the
number of batches *trained on*. (The position of the stream itself would be wrong, since it prefetches.)
"""

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from cxrjax.data import Batch
from cxrjax.data.images import Augment, Transform
from cxrjax.data.records import Records
from cxrjax.errors import CxrError
from cxrjax.findings import NO_FINDING, LabelPolicy, derive_no_finding, finding_indices, make_targets

SAMPLING_NAMES = ("shuffle", "balanced")


@dataclass(frozen=True)
class Examples:
    """Records with their targets, such as those of one split.

    Attributes:
      records: the prepared data set with the images.
      row: rows of its table.
      label: target values from 0 to 1 (between them only where the label policy smooths); 0 where masked.
      label_mask: whether each label counts in losses and scores.
      dataset_index: index of each example's data set in a mixture; None for a single data set.
    """

    records: Records
    row: Int32[np.ndarray, " n"]
    label: Float32[np.ndarray, "n K"]
    label_mask: Bool[np.ndarray, "n K"]
    dataset_index: Int32[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.row)


def make_examples(
    records: Records, rows: Sequence[int] | np.ndarray, findings: Sequence[str], policy: LabelPolicy
) -> Examples:
    """Make examples of some rows of a data set, with targets for the given findings.

    `No Finding` is derived if the data set does not have it.

    Raises:
      CxrError: a finding is unknown, or a label is not 1, 0, -1 or -2.
    """
    rows = np.asarray(rows, np.int32)
    labels, names = records.labels[rows], records.findings
    if NO_FINDING in findings and NO_FINDING not in names:
        labels, names = np.column_stack([labels, derive_no_finding(labels, names)]), (*names, NO_FINDING)
    columns = finding_indices(findings, names)
    label, label_mask = make_targets(labels, policy, findings=names, ids=records.id[rows])
    return Examples(records, rows, label[:, columns], label_mask[:, columns])


class Stratum(NamedTuple):
    """Examples that are drawn together, by index, and their share of the draws relative to the other strata."""

    index: Int[np.ndarray, " m"]
    weight: float


@dataclass(frozen=True)
class Sampling:
    """How training draws its examples.

    The examples of a stratum come in random order; all of them come once before the next round, which has another
    order. Strata are interleaved in proportion to their weights, over any stretch of draws to within one draw and one
    percent of the smallest weight (Grain's precision).

    Attributes:
      name: "shuffle" takes every example once per epoch. "balanced" draws equally often from each finding with known
        positive examples and from the examples without a positive finding: class-balanced sampling (Kang et al., ICLR
        2020; for chest X-rays Holste et al., DALI 2022), one cycle per class as in Shen et al. (ECCV 2016). An example
        with several findings is in several strata, so common findings that accompany rare ones are drawn more often.
      weights: weight of each data set of a mixture, sampled separately; empty to sample all data sets as one.
    """

    name: str = "shuffle"
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.name not in SAMPLING_NAMES:
            raise CxrError(f"unknown sampling {self.name!r}; choose from {', '.join(SAMPLING_NAMES)}")
        if any(not 0 < weight < np.inf for weight in self.weights):
            raise CxrError(
                f"weights of data sets {self.weights} must all be above 0; leave out data sets not to be used"
            )

    def strata(
        self,
        label: Float32[np.ndarray, "n K"],
        label_mask: Bool[np.ndarray, "n K"],
        dataset_index: Int[np.ndarray, " n"] | None,
    ) -> list[Stratum]:
        """Group the examples into strata; arguments as in `Examples`, and a label above 0.5 is positive.

        Raises:
          CxrError: a weighted data set has no examples.
        """
        groups = [np.arange(len(label))]
        if self.weights:
            groups = [np.flatnonzero(dataset_index == number) for number in range(len(self.weights))]
        strata = []
        for number, (group, weight) in enumerate(zip(groups, self.weights or (1.0,), strict=True)):
            if not len(group):
                raise CxrError(f"data set {number} of the mixture has a weight but no training records")
            classes = [np.arange(len(group))]
            if self.name == "balanced":
                positive = label_mask[group] & (label[group] > 0.5)
                columns = [*positive.T, ~positive.any(1)]
                classes = [np.flatnonzero(column) for column in columns if column.any()]
            strata += [Stratum(group[members], weight / len(classes)) for members in classes]
        return strata


def sample_order(strata: list[Stratum], batch_size: int, seed: int) -> grain.MapDataset:
    """Return the endless order of draws: element k is the index of the k-th example."""
    if len(strata) == 1:
        members = strata[0].index
        return grain.MapDataset.range(len(members)).map(lambda index: members[index]).shuffle(seed).repeat()
    cycles = [_Cycle(stratum.index, seed, number) for number, stratum in enumerate(strata)]
    mixed = grain.MapDataset.mix(
        [grain.MapDataset.source(cycle) for cycle in cycles], [stratum.weight for stratum in strata]
    )
    return grain.MapDataset.source(_ShuffledBatches(mixed, batch_size, seed))


class _Cycle:
    """The examples of a stratum round after round, each in another order. Grain's shuffle is slow for few examples."""

    def __init__(self, members: Int[np.ndarray, " m"], seed: int, number: int):
        self._members = members
        self._round = lru_cache(2)(lambda turn: np.random.default_rng((seed, number, turn)).permutation(members))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        turn, position = divmod(int(index), len(self._members))
        return int(self._round(turn)[position])


class _ShuffledBatches:
    """Interleaved strata, shuffled within each batch, so that no device always gets the same strata."""

    def __init__(self, mixed: grain.MapDataset, batch_size: int, seed: int):
        self._mixed, self._batch_size = mixed, batch_size
        self._order = lru_cache(8)(lambda batch: np.random.default_rng((seed, batch)).permutation(batch_size))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        batch, position = divmod(int(index), self._batch_size)
        return cast(int, self._mixed[batch * self._batch_size + int(self._order(batch)[position])])


def training_batches(
    examples: Examples,
    *,
    size: int,
    batch_size: int,
    augment: Augment,
    seed: int,
    sampling: Sampling = Sampling(),
    start: int = 0,
    threads: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Yield endless batches of augmented images, in another order each epoch.

    All batches are full: if the batch size does not divide an epoch, a batch holds the end of one epoch and the start
    of the next.

    Args:
      examples: the training examples.
      size: rows and columns of the images in px.
      batch_size: global batch size, over all processes.
      augment: ranges of the augmentation.
      seed: of the order and the augmentation; at least 0.
      sampling: which examples are drawn, and how often.
      start: number of the first batch, to resume a run.
      threads: number of loader threads; 0 loads in the caller's thread. Memory holds `threads + 1` batches.
      shard: (p, P) yields rows p * batch_size / P to (p + 1) * batch_size / P of every global batch.

    Yields:
      This process's rows of batches `start`, `start + 1`, ...; `close()` ends the threads.

    Raises:
      CxrError: there are no examples, or the arguments do not fit; while iterating, an image cannot be read.
    """
    if not len(examples):
        raise CxrError("there are no records to train on; check the split and its sizes")
    if seed < 0 or start < 0:
        raise CxrError(f"seed {seed} and first batch {start} must be 0 or more")
    rows = _local_rows(batch_size, shard)
    order_seed, augment_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))

    def sample(index: int, rng: np.random.Generator) -> tuple[int, Transform]:
        return int(index), augment.sample(rng)

    strata = sampling.strata(examples.label, examples.label_mask, examples.dataset_index)
    plan = sample_order(strata, batch_size, order_seed)
    if augment == Augment():
        plan = plan.map(lambda index: (int(index), Transform()))  # random_map would cost a third of a small image
    else:
        plan = plan.random_map(sample, seed=augment_seed)

    def load(number: int) -> Batch:
        return _load(examples, [plan[number * batch_size + row] for row in rows], size)

    return _stream(load, start, sys.maxsize // batch_size - 1, threads)


def evaluation_batches(
    examples: Examples, *, size: int, batch_size: int, threads: int = 2, shard: tuple[int, int] = (0, 1)
) -> Generator[Batch, None, None]:
    """Yield every example once, in order, without augmentation; the last batch is padded.

    Every process gets the same number of batches (`evaluation_steps`) of the same shape, some possibly all padding, so
    that all take part in every collective. See `training_batches` for the arguments and errors.
    """
    rows = _local_rows(batch_size, shard)

    def load(number: int) -> Batch:
        indices = (number * batch_size + row for row in rows)
        return _load(examples, [(index, Transform()) if index < len(examples) else None for index in indices], size)

    return _stream(load, 0, evaluation_steps(len(examples), batch_size), threads)


def evaluation_steps(n: int, batch_size: int) -> int:
    """Return the number of batches for n examples, the same in every process."""
    return -(-n // batch_size)


def _local_rows(batch_size: int, shard: tuple[int, int]) -> range:
    """Return this process's rows of every global batch."""
    process, processes = shard
    if not 0 <= process < processes:
        raise CxrError(f"shard {process} of {processes} does not exist; shards count from 0")
    if batch_size < 1 or batch_size % processes:
        raise CxrError(
            f"batch size {batch_size} must be a positive multiple of the {processes} processes that load data"
        )
    local = batch_size // processes
    return range(process * local, (process + 1) * local)


def _load(examples: Examples, plan: Sequence[tuple[int, Transform] | None], size: int) -> Batch:
    """Load the planned (example index, transform) pairs; None is padding."""
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
            index, transform = item
            row = int(examples.row[index])
            transform.apply(_read_image(examples.records, row, size), out=pixels)
            batch.label[i], batch.label_mask[i] = examples.label[index], examples.label_mask[index]
            batch.example_mask[i], batch.record[i] = True, row
    return batch


def _read_image(records: Records, row: int, size: int) -> UInt8[np.ndarray, "size size"]:
    try:
        return records.image(row, size)
    except CxrError:
        raise
    except Exception as error:  # from any library: a long run must report which image failed
        raise CxrError(f"{records.id[row]} cannot be loaded ({type(error).__name__}: {error})") from error


def _stream(load: Callable[[int], Batch], start: int, stop: int, threads: int) -> Generator[Batch, None, None]:
    """Yield batches start to stop in order, prefetched by threads.

    Threads rather than processes: decoding and warping release the GIL, and nothing is copied. The first batch is
    loaded before the threads start because it imports TFDS, and concurrent imports may deadlock.
    """
    if start >= stop:
        return
    yield load(start)

    def load_or_error(number: int) -> Batch | CxrError:
        try:
            return load(number)
        except CxrError as error:
            return error  # raised below; Grain would add its own lines to the message

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0)
    batches = iter(grain.MapDataset.range(start + 1, stop).map(load_or_error).to_iter_dataset(options))
    try:
        for batch in batches:
            if isinstance(batch, CxrError):
                raise batch
            yield batch
    finally:
        batches.close()
