"""Iterative stratification on cases whose answer is known, and against chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrjax.data.splits import stratify


def distances(labels, part, parts):
    """The paper's measure LD: how far the odds of each label in a part are from those in all, on average."""
    odds = labels.sum(0) / (len(labels) - labels.sum(0))
    here = [labels[part == k] for k in range(parts)]
    return np.mean([np.abs(some.sum(0) / (len(some) - some.sum(0)) - odds) for some in here])


def singles(n, seed=0):
    """n examples with independent labels; the group of each is itself."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, 5)) < [0.4, 0.2, 0.1, 0.03, 0.01]).astype(int)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_what_can_be_divided_is_divided_exactly(parts, times, seed):
    kinds = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    labels = np.random.default_rng(seed).permutation(np.repeat(kinds, parts * times, axis=0))
    part = stratify(labels, np.ones(len(labels), int), [1 / parts] * parts, seed)
    for k in range(parts):
        assert labels[part == k].sum(0).tolist() == [times] * 3
        assert (part == k).sum() == 4 * times


def test_groups_are_weighed_by_their_examples():
    """One group has half of the label: two parts can only hold that group against all the others."""
    positives = np.array([[6], [1], [1], [2], [2], [0], [0]])
    sizes = np.array([6, 1, 1, 2, 2, 3, 3])
    part = stratify(positives, sizes, [0.5, 0.5], seed=3)
    assert (part[1:5] != part[0]).all()
    assert part[5] != part[6]


def test_stratified_is_far_closer_than_chance_and_every_label_within_one():
    labels = singles(5000)
    part = stratify(labels, np.ones(5000, int), [0.2] * 5, seed=0)
    chance = np.random.default_rng(0).permutation(np.arange(5000) % 5)
    assert distances(labels, part, 5) < 0.1 * distances(labels, chance, 5)
    counts = np.stack([labels[part == k].sum(0) for k in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all()


@pytest.mark.parametrize("shares", [[0.7, 0.1, 0.2], [0.05, 0.95]])
def test_unequal_shares(shares):
    labels = singles(5000, seed=1)
    part = stratify(labels, np.ones(5000, int), shares, seed=0)
    for k, share in enumerate(shares):
        assert np.abs(labels[part == k].sum(0) - share * labels.sum(0)).max() < 2
        assert abs((part == k).sum() - share * 5000) <= 1


def test_only_ties_depend_on_the_seed():
    labels = singles(300)
    one, same, other = (stratify(labels, np.ones(300, int), [0.5, 0.5], seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_without_labels_the_sizes_are_shared():
    sizes = np.random.default_rng(0).integers(1, 9, 400)
    part = stratify(np.zeros((400, 0), int), sizes, [0.6, 0.4], seed=0)
    assert abs(sizes[part == 0].sum() / sizes.sum() - 0.6) < 0.002
