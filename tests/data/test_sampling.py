"""Which record comes next: proportions, cycles, and that nothing but (seed, number) has a say in it."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.data.images import Augment
from cxrjax.data.pipeline import Examples, training_batches
from cxrjax.data.sampling import Sampling, order
from cxrjax.errors import CxrError

NAMES = st.sampled_from(["shuffle", "balanced"])


def some(n=60, seed=0, sets=1):
    """Examples of 4 findings, common to rare, whose images are single pixels."""
    rng = np.random.default_rng(seed)
    label = (rng.random((n, 4)) < (0.6, 0.3, 0.1, 0.05)).astype(np.float32)
    label[0] = 0
    label[1] = (0, 0, 1, 1)
    origin = rng.permutation(np.arange(n, dtype=np.int32) % sets)
    records = SimpleNamespace(image=lambda row, size: np.full((1, 1), row % 251, np.uint8))
    return Examples(records, np.arange(n, dtype=np.int32), label, np.ones((n, 4), bool), origin)  # pyright: ignore


def drawn(data, count, *, batch_size=4, shards=1, **options):
    """Rows of `count` batches, the parts of all processes put together."""
    parts = []
    for p in range(shards):
        batches = training_batches(
            data, size=1, batch_size=batch_size, augment=Augment(), threads=0, shard=(p, shards),
            **({"seed": 1} | options),
        )  # fmt: skip
        parts.append(np.stack([batch.record for batch in itertools.islice(batches, count)]))
        batches.close()
    return np.concatenate(parts, axis=1)


def test_balanced_draws_every_finding_and_none_equally_often():
    data = some(400)
    rounds = 400
    rows = drawn(data, rounds, batch_size=5, sampling=Sampling("balanced"))
    strata = Sampling("balanced").strata(data.label, data.label_mask, None)
    assert [len(s.places) for s in strata] == [*data.label.sum(0).astype(int), (data.label.sum(1) == 0).sum()]
    times = Counter(rows.ravel().tolist())
    expected = np.zeros(400)  # an example comes at its part of each class it belongs to
    for stratum in strata:
        expected[stratum.places] += rounds / len(stratum.places)
    np.testing.assert_allclose([times[row] for row in range(400)], expected, atol=len(strata))
    for batch in rows:  # in every batch each class has had its turn
        assert (data.label[batch].sum(0) >= 1).all()
        assert (data.label[batch].sum(1) == 0).any()


def test_every_class_is_a_cycle_of_its_own():
    data = some(100)
    rows = drawn(data, 200, batch_size=5, sampling=Sampling("balanced")).ravel()
    none = rows[data.label[rows].sum(1) == 0]
    size = (data.label.sum(1) == 0).sum()
    for cycle in none[: len(none) // size * size].reshape(-1, size)[:3]:
        assert len(set(cycle.tolist())) == size


def test_unknown_and_smoothed_labels():
    label = np.array([[1, 0.7], [0, 0.3], [1, 0]], np.float32)
    label_mask = np.array([[False, True], [True, True], [True, True]])
    strata = Sampling("balanced").strata(label, label_mask, None)
    assert [s.places.tolist() for s in strata] == [[2], [0], [1]]
    assert [s.weight for s in strata] == [1 / 3] * 3


@pytest.mark.parametrize("name", ["shuffle", "balanced"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.2, 0.1), (3, 1)])
def test_data_sets_have_their_weights_in_any_stretch(name, weights):
    data = some(90, sets=len(weights))
    rows = drawn(data, 125, batch_size=8, sampling=Sampling(name, weights))
    share = np.array(weights) / sum(weights)
    origin = data.origin[rows]
    counts = np.stack([(origin == k).sum(1) for k in range(len(weights))], axis=1)
    np.testing.assert_allclose(counts, np.tile(8 * share, (125, 1)), atol=8 * 0.01 + len(data.label.T) + 1)
    np.testing.assert_allclose(counts.mean(0), 8 * share, rtol=0.02, atol=0.05)
    assert (counts[:, 0] > 0).all()


def test_a_pattern_of_strata_does_not_fall_to_the_same_place_of_a_batch():
    data = some(90, sets=2)
    origin = data.origin[drawn(data, 300, batch_size=8, sampling=Sampling("shuffle", (1, 1)))]
    assert (origin.sum(1) == 4).all()
    share = origin.mean(0)  # of the second data set in each place
    np.testing.assert_allclose(share, 0.5, atol=0.15)


@given(
    st.sampled_from([1, 2, 3, 4, 8]), NAMES, st.sampled_from([(), (0.5, 0.5), (0.75, 0.25)]), st.integers(0, 2**34),
    st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_stream_is_the_same_for_any_number_of_processes_and_any_start(shards, name, weights, seed, start):
    data, options = some(30, sets=2), {"batch_size": 24, "sampling": Sampling(name, weights), "seed": seed}
    whole = drawn(data, start + 3, **options)
    np.testing.assert_array_equal(drawn(data, 3, shards=shards, start=start, **options), whole[start:])


def test_another_seed_is_another_order():
    data = some(60, sets=2)
    for sampling in (Sampling(), Sampling("balanced"), Sampling("shuffle", (0.5, 0.5))):
        one, other = (drawn(data, 15, seed=seed, sampling=sampling) for seed in (1, 2))
        assert (one == other).mean() < 0.3


def test_billions_of_batches_on_it_still_goes():
    plan = order(Sampling("balanced").strata(some().label, some().label_mask, None), 32, 2**32 - 1)
    assert 0 <= plan[10**9 * 32] < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "class"}, "sampling 'class' is not one of shuffle, balanced"),
        ({"weights": (1.0, 0.0)}, "must all be above 0"),
        ({"weights": (1.0, float("nan"))}, "must all be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(CxrError, match=message):
        Sampling(**options)


def test_a_weighted_data_set_without_records_is_refused():
    with pytest.raises(CxrError, match="data set 2 of the weighted ones has no records"):
        drawn(some(sets=2), 1, sampling=Sampling("shuffle", (1, 1, 1)))
