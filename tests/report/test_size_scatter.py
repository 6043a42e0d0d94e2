"""Sizes of original images: every image is in the dots and in both marginals."""

import numpy as np

from cxrjax.report.plots import size_scatter


def test_dots_are_the_distinct_sizes_and_marginals_count_every_image():
    sizes = np.random.default_rng(0).choice([[2544, 3056], [3056, 2544], [2021, 2021]], 500)
    main, top, side = size_scatter(sizes).axes
    pairs, counts = np.unique(sizes, axis=0, return_counts=True)
    [dots] = main.collections
    np.testing.assert_array_equal(dots.get_offsets(), pairs)
    assert (np.diff(dots.get_sizes()[np.argsort(counts)]) > 0).all(), "larger dots stand for more images"
    assert sum(bar.get_height() for bar in top.patches) == len(sizes)
    assert sum(bar.get_width() for bar in side.patches) == len(sizes)
    for bar in top.patches:
        inside = (sizes[:, 0] >= bar.get_x()) & (sizes[:, 0] < bar.get_x() + bar.get_width())
        assert inside.sum() == bar.get_height()


def test_a_single_size_has_integer_ticks():
    main, *_ = size_scatter(np.full((40, 2), 1024)).axes
    assert main.get_xlim()[0] < 1024 < main.get_xlim()[1]
    assert all(tick == round(tick) for tick in (*main.get_xticks(), *main.get_yticks()))
