"""Batches over several processes: shards are disjoint and complete, and the number of processes may change."""

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.data.images import Augment
from cxrjax.data.pipeline import Examples, Sampling, evaluation_batches, evaluation_steps, training_batches
from cxrjax.errors import CxrError

PROCESSES = (1, 2, 3, 4, 8)
BATCH = 24  # divisible by each of them


def pixel_examples(n):
    records = SimpleNamespace(
        image=lambda row, size: np.full((1, 1), row % 251, np.uint8), id=np.array([f"image-{k}" for k in range(n)])
    )
    label = (np.arange(n)[:, None] % (2, 5) == 0).astype(np.float32)
    return Examples(records, np.arange(n, dtype=np.int32), label, np.ones((n, 2), bool))  # pyright: ignore


def shard_rows(data, process, processes, start, count, *, seed=3, **options):
    """Return the rows that one process trains on in steps `start` to `start + count`."""
    batches = training_batches(
        data, size=1, batch_size=BATCH, augment=Augment(flip=0.5), seed=seed, start=start, threads=0,
        shard=(process, processes), **options,
    )  # fmt: skip
    rows = [batch.record for batch in itertools.islice(batches, count)]
    batches.close()
    return np.stack(rows)


@pytest.mark.parametrize("processes", PROCESSES)
def test_shards_of_an_epoch_are_disjoint_and_complete(processes):
    data, steps = pixel_examples(4 * BATCH), 4
    seen = [shard_rows(data, p, processes, 0, steps) for p in range(processes)]
    assert {rows.shape for rows in seen} == {(steps, BATCH // processes)}
    sets = [set(rows.ravel().tolist()) for rows in seen]
    assert sum(map(len, sets)) == len(set().union(*sets)) == len(data)


@given(
    st.lists(st.tuples(st.sampled_from(PROCESSES), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(0, 2**32), st.sampled_from(["shuffle", "balanced"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_restarts_with_other_numbers_of_processes_repeat_and_skip_nothing(runs, seed, name):
    steps = sum(count for _, count in runs)
    data, options = pixel_examples(steps * BATCH), {"seed": seed, "sampling": Sampling(name)}
    unbroken = shard_rows(data, 0, 1, 0, steps, **options)
    start, seen = 0, []
    for processes, count in runs:  # each run starts at the number of batches trained on so far
        shards = [shard_rows(data, p, processes, start, count, **options) for p in range(processes)]
        seen.append(np.concatenate(shards, axis=1))
        start += count
    np.testing.assert_array_equal(np.concatenate(seen), unbroken)
    if name == "shuffle":
        assert len(np.unique(unbroken)) == len(data)


@given(st.integers(0, 60), st.sampled_from(PROCESSES))
@settings(max_examples=40, deadline=None)
def test_evaluation_covers_each_record_once_in_equal_numbers_of_steps(n, processes):
    data = pixel_examples(n)
    streams = [
        list(evaluation_batches(data, size=1, batch_size=BATCH, threads=0, shard=(p, processes)))
        for p in range(processes)
    ]
    assert {len(stream) for stream in streams} == {evaluation_steps(n, BATCH)}
    assert {len(batch.example_mask) for stream in streams for batch in stream} <= {BATCH // processes}
    rows = [batch.record[batch.example_mask] for step in zip(*streams, strict=True) for batch in step]
    assert np.concatenate([np.zeros(0, int), *rows]).tolist() == list(range(n))


@pytest.mark.parametrize("make", [training_batches, evaluation_batches])
def test_batch_size_must_be_divisible_by_processes(make):
    options = {"augment": Augment(), "seed": 0} if make is training_batches else {}
    with pytest.raises(CxrError, match="batch size 24 must be a positive multiple of the 5 processes"):
        next(make(pixel_examples(48), size=1, batch_size=BATCH, shard=(0, 5), **options))


@pytest.mark.parametrize("threads", [0, 2])
def test_any_error_while_loading_names_the_image(threads):
    data = pixel_examples(30)

    def image(row, size):
        if row == 7:
            raise MemoryError("no room")
        return np.zeros((1, 1), np.uint8)

    data.records.image = image
    batches = evaluation_batches(data, size=1, batch_size=3, threads=threads)
    with pytest.raises(CxrError, match=r"^image-7 cannot be loaded \(MemoryError: no room\)$"):
        list(batches)


def test_the_first_batch_is_loaded_before_threads_start():
    """Loading imports modules, and concurrent imports may deadlock."""
    data, loaded = pixel_examples(24), {}

    def image(row, size):
        loaded[row] = threading.current_thread()
        return np.zeros((1, 1), np.uint8)

    data.records.image = image
    batches = evaluation_batches(data, size=1, batch_size=4, threads=2)
    next(batches)
    assert loaded == dict.fromkeys(range(4), threading.main_thread())
    assert len(list(batches)) == 5
    assert len(loaded) == 24
    assert threading.main_thread() not in [loaded[row] for row in range(4, 24)]
