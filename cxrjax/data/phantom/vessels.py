"""The tree of vessels in each lung: trunks from the hilum, branches, twigs."""

import numpy as np

from cxrjax.data.phantom.anatomy import SIDES, Anatomy
from cxrjax.data.phantom.drawing import Points

TRUNKS, BRANCHES, TWIGS = 13, 26, 110  # per lung


Vessels = list[tuple[Points, float, float]]
"""Lines of one calibre each, from fine to coarse: (lines, width in image widths, contrast 0 to 1)."""


def vessels(shape: Anatomy, seed: int) -> tuple[Vessels, Vessels]:
    """The vessels of both lungs: those wide enough for a soft grid, and the fine ones."""
    rng = np.random.default_rng([seed, 1])
    both = [_tree(rng, shape.hila[side], shape.lungs[side], side) for side in SIDES]
    trunks, branches, twigs = (np.concatenate(level) for level in zip(*both, strict=True))
    broad = [
        (branches[:, :5], 0.0036, 0.16),
        (trunks[:, 9:], 0.0036, 0.16),
        (trunks[:, 6:10], 0.0050, 0.18),
        (trunks[:, 3:7], 0.0068, 0.19),
        (trunks[:, :4], 0.0085, 0.19),
    ]
    return broad, [(twigs, 0.0015, 0.12), (branches[:, 4:], 0.0024, 0.14)]


def _tree(rng: np.random.Generator, hilum: Points, lung: Points, side: int) -> tuple[Points, Points, Points]:
    trunks = _trunks(rng, hilum, lung, side)
    branches = _offshoots(rng, trunks[:, 2:10], BRANCHES, (0.07, 0.17), (0.3, 0.7))
    early, late = trunks[:, 4:8], trunks[:, 7:11]
    stems = np.concatenate([early, late, branches[:, :4], branches[:, 3:]])
    return trunks, branches, _offshoots(rng, stems, TWIGS, (0.03, 0.08), (0.4, 1.0))


def _trunks(rng: np.random.Generator, hilum: Points, lung: Points, side: int) -> Points:
    """Curves of 13 points from a hilum most of the way to the lung's border."""
    spoke = (lung - hilum) * (side, 1)
    angles, reach = np.arctan2(spoke[:, 1], spoke[:, 0]), np.hypot(*spoke.T)
    order = angles.argsort()
    angle = np.linspace(-1.4, 1.5, TRUNKS) + rng.uniform(-0.12, 0.12, TRUNKS)
    length = np.interp(angle, angles[order], reach[order]) * rng.uniform(0.6, 0.95, TRUNKS)
    t = np.linspace(0, 1, 13)
    bend = rng.uniform(-0.22, 0.22, (TRUNKS, 1)) * t * (1 - t) + rng.normal(0, 0.010, (TRUNKS, 13)).cumsum(axis=1) * t
    along = np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, None]
    across = along[..., ::-1] * (-1, 1)
    course = length[:, None, None] * (t[:, None] * along + bend[..., None] * across)
    root = np.stack([rng.uniform(-0.012, 0.012, TRUNKS), 0.035 * np.sin(angle)], axis=1)
    return hilum + (course + root[:, None]) * (side, 1)


def _offshoots(
    rng: np.random.Generator, parents: Points, number: int, length: tuple[float, float], fork: tuple[float, float]
) -> Points:
    """Curves of 7 points that leave the parents' lines at an angle within `fork` (radians)."""
    starts, steps = parents[:, :-1].reshape(-1, 2), np.diff(parents, axis=1).reshape(-1, 2)
    chosen = rng.integers(0, len(starts), number)
    heading = np.arctan2(steps[chosen, 1], steps[chosen, 0]) + rng.choice([-1, 1], number) * rng.uniform(*fork, number)
    s = np.linspace(0, 1, 7)
    turn = heading[:, None] + rng.uniform(-0.6, 0.6, (number, 1)) * s
    course = np.stack([np.cos(turn), np.sin(turn)], axis=-1) * (rng.uniform(*length, (number, 1)) * s)[..., None]
    return starts[chosen, None] + course
