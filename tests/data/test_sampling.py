"""Sampling: proportions of strata, rounds without repetition, and dependence on seed and position only."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.data.images import Augment
from cxrjax.data.pipeline import Examples, Sampling, sample_order, training_batches
from cxrjax.errors import CxrError

NAMES = st.sampled_from(["shuffle", "balanced"])


def random_examples(n=60, seed=0, sets=1):
    """Examples with 4 findings, common to rare, and images of one pixel."""
    rng = np.random.default_rng(seed)
    label = (rng.random((n, 4)) < (0.6, 0.3, 0.1, 0.05)).astype(np.float32)
    label[0] = 0
    label[1] = (0, 0, 1, 1)
    dataset_index = rng.permutation(np.arange(n, dtype=np.int32) % sets)
    records = SimpleNamespace(image=lambda row, size: np.full((1, 1), row % 251, np.uint8))
    return Examples(records, np.arange(n, dtype=np.int32), label, np.ones((n, 4), bool), dataset_index)  # pyright: ignore


def sample_rows(data, count, *, batch_size=4, shards=1, **options):
    """Return the rows of `count` global batches, put together from all processes."""
    shard_rows = []
    for p in range(shards):
        batches = training_batches(
            data, size=1, batch_size=batch_size, augment=Augment(), threads=0, shard=(p, shards),
            **({"seed": 1} | options),
        )  # fmt: skip
        shard_rows.append(np.stack([batch.record for batch in itertools.islice(batches, count)]))
        batches.close()
    return np.concatenate(shard_rows, axis=1)


def test_balanced_draws_every_finding_and_no_finding_equally_often():
    data = random_examples(400)
    rounds = 400
    rows = sample_rows(data, rounds, batch_size=5, sampling=Sampling("balanced"))
    strata = Sampling("balanced").strata(data.label, data.label_mask, None)
    assert [len(s.index) for s in strata] == [*data.label.sum(0).astype(int), (data.label.sum(1) == 0).sum()]
    times = Counter(rows.ravel().tolist())
    expected = np.zeros(400)  # an example is drawn as a member of each of its classes
    for stratum in strata:
        expected[stratum.index] += rounds / len(stratum.index)
    np.testing.assert_allclose([times[row] for row in range(400)], expected, atol=len(strata))
    for batch in rows:  # every batch has every class
        assert (data.label[batch].sum(0) >= 1).all()
        assert (data.label[batch].sum(1) == 0).any()


def test_every_class_is_sampled_without_repetition_in_a_round():
    data = random_examples(100)
    rows = sample_rows(data, 200, batch_size=5, sampling=Sampling("balanced")).ravel()
    none = rows[data.label[rows].sum(1) == 0]
    size = (data.label.sum(1) == 0).sum()
    for cycle in none[: len(none) // size * size].reshape(-1, size)[:3]:
        assert len(set(cycle.tolist())) == size


def test_unknown_and_smoothed_labels():
    label = np.array([[1, 0.7], [0, 0.3], [1, 0]], np.float32)
    label_mask = np.array([[False, True], [True, True], [True, True]])
    strata = Sampling("balanced").strata(label, label_mask, None)
    assert [s.index.tolist() for s in strata] == [[2], [0], [1]]
    assert [s.weight for s in strata] == [1 / 3] * 3


@pytest.mark.parametrize("name", ["shuffle", "balanced"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.2, 0.1), (3, 1)])
def test_data_sets_are_drawn_in_proportion_to_their_weights(name, weights):
    data = random_examples(90, sets=len(weights))
    rows = sample_rows(data, 125, batch_size=8, sampling=Sampling(name, weights))
    fraction = np.array(weights) / sum(weights)
    index = data.dataset_index[rows]
    counts = np.stack([(index == k).sum(1) for k in range(len(weights))], axis=1)
    np.testing.assert_allclose(counts, np.tile(8 * fraction, (125, 1)), atol=8 * 0.01 + len(data.label.T) + 1)
    np.testing.assert_allclose(counts.mean(0), 8 * fraction, rtol=0.02, atol=0.05)
    assert (counts[:, 0] > 0).all()


def test_strata_are_shuffled_within_a_batch():
    data = random_examples(90, sets=2)
    index = data.dataset_index[sample_rows(data, 300, batch_size=8, sampling=Sampling("shuffle", (1, 1)))]
    assert (index.sum(1) == 4).all()
    fraction = index.mean(0)  # of the second data set at each position
    np.testing.assert_allclose(fraction, 0.5, atol=0.15)


@given(
    st.sampled_from([1, 2, 3, 4, 8]), NAMES, st.sampled_from([(), (0.5, 0.5), (0.75, 0.25)]), st.integers(0, 2**34),
    st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_stream_is_the_same_for_any_number_of_processes_and_any_start(shards, name, weights, seed, start):
    data, options = random_examples(30, sets=2), {"batch_size": 24, "sampling": Sampling(name, weights), "seed": seed}
    whole = sample_rows(data, start + 3, **options)
    np.testing.assert_array_equal(sample_rows(data, 3, shards=shards, start=start, **options), whole[start:])


def test_seeds_differ_in_order():
    data = random_examples(60, sets=2)
    for sampling in (Sampling(), Sampling("balanced"), Sampling("shuffle", (0.5, 0.5))):
        one, other = (sample_rows(data, 15, seed=seed, sampling=sampling) for seed in (1, 2))
        assert (one == other).mean() < 0.3


def test_order_continues_after_billions_of_batches():
    plan = sample_order(
        Sampling("balanced").strata(random_examples().label, random_examples().label_mask, None), 32, 2**32 - 1
    )
    assert 0 <= plan[10**9 * 32] < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "class"}, "unknown sampling 'class'; choose from shuffle, balanced"),
        ({"weights": (1.0, 0.0)}, "must all be above 0"),
        ({"weights": (1.0, float("nan"))}, "must all be above 0"),
    ],
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(CxrError, match=message):
        Sampling(**options)


def test_weighted_data_set_without_records_is_an_error():
    with pytest.raises(CxrError, match="data set 2 of the mixture has a weight but no training records"):
        sample_rows(random_examples(sets=2), 1, sampling=Sampling("shuffle", (1, 1, 1)))
