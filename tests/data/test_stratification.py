"""Iterative stratification on cases with known results, and compared with chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrjax.data.splits import stratify


def label_distance(labels, split, splits):
    """Compute the label distribution (LD) of the paper: mean deviation of the odds of a label in a split."""
    odds = labels.sum(0) / (len(labels) - labels.sum(0))
    members = [labels[split == k] for k in range(splits)]
    return np.mean([np.abs(rows.sum(0) / (len(rows) - rows.sum(0)) - odds) for rows in members])


def independent_labels(n, seed=0):
    """Make n examples with independent labels."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, 5)) < [0.4, 0.2, 0.1, 0.03, 0.01]).astype(int)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_divisible_labels_are_divided_exactly(splits, times, seed):
    kinds = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    labels = np.random.default_rng(seed).permutation(np.repeat(kinds, splits * times, axis=0))
    split = stratify(labels, np.ones(len(labels), int), [1 / splits] * splits, seed)
    for k in range(splits):
        assert labels[split == k].sum(0).tolist() == [times] * 3
        assert (split == k).sum() == 4 * times


def test_groups_are_weighted_by_their_examples():
    """One group has half of the label, so it must be in one split and all others with the label in the other."""
    positives = np.array([[6], [1], [1], [2], [2], [0], [0]])
    sizes = np.array([6, 1, 1, 2, 2, 3, 3])
    split = stratify(positives, sizes, [0.5, 0.5], seed=3)
    assert (split[1:5] != split[0]).all()
    assert split[5] != split[6]


def test_stratified_is_better_than_chance_and_labels_differ_by_at_most_one():
    labels = independent_labels(5000)
    split = stratify(labels, np.ones(5000, int), [0.2] * 5, seed=0)
    chance = np.random.default_rng(0).permutation(np.arange(5000) % 5)
    assert label_distance(labels, split, 5) < 0.1 * label_distance(labels, chance, 5)
    counts = np.stack([labels[split == k].sum(0) for k in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all()


@pytest.mark.parametrize("fractions", [[0.7, 0.1, 0.2], [0.05, 0.95]])
def test_unequal_fractions(fractions):
    labels = independent_labels(5000, seed=1)
    split = stratify(labels, np.ones(5000, int), fractions, seed=0)
    for k, fraction in enumerate(fractions):
        assert np.abs(labels[split == k].sum(0) - fraction * labels.sum(0)).max() < 2
        assert abs((split == k).sum() - fraction * 5000) <= 1


def test_seed_breaks_ties():
    labels = independent_labels(300)
    one, same, other = (stratify(labels, np.ones(300, int), [0.5, 0.5], seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_sizes_are_divided_without_labels():
    sizes = np.random.default_rng(0).integers(1, 9, 400)
    split = stratify(np.zeros((400, 0), int), sizes, [0.6, 0.4], seed=0)
    assert abs(sizes[split == 0].sum() / sizes.sum() - 0.6) < 0.002
