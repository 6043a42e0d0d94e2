"""Shapes of a patient's chest, including the vessels of the lungs, in unit coordinates.

The patient's right side (-1) is on the left of the image, the left side (+1) on the right.
"""

from dataclasses import dataclass

import numpy as np

from cxrjax.data.phantom.drawing import Points, ellipse, outline, spline
from cxrjax.data.phantom.population import Radiograph

RIGHT, LEFT = -1, 1
SIDES = (RIGHT, LEFT)

CARDIOTHORACIC = {False: (0.42, 0.545), True: (0.555, 0.66)}
"""Range of the heart's width divided by the thorax's inner width, without and with cardiomegaly."""

# Outline of a lung, lateral wall first: x in half-widths of the thorax, y in heights.
_LUNG = np.array([
    (0.22, -0.375), (0.38, -0.400), (0.55, -0.368), (0.71, -0.285), (0.84, -0.160), (0.94, 0.000), (0.985, 0.150),
    (1.00, 0.255), (1.005, 0.310), (0.985, 0.318), (0.93, 0.275), (0.80, 0.222), (0.60, 0.190), (0.40, 0.193),
    (0.26, 0.215), (0.18, 0.235), (0.14, 0.130), (0.11, 0.000), (0.12, -0.150), (0.14, -0.280),
])  # fmt: skip
_DOME = slice(9, 17)  # points on the diaphragm
# Outline of the heart: x in its widths (re-centred below), y in its heights from the top.
_HEART = np.array([
    (-0.14, -0.06), (-0.24, 0.12), (-0.30, 0.34), (-0.315, 0.56), (-0.28, 0.78), (-0.18, 0.96), (0.05, 1.05),
    (0.33, 1.07), (0.54, 1.00), (0.665, 0.87), (0.685, 0.74), (0.63, 0.56), (0.50, 0.36), (0.35, 0.18), (0.23, 0.00),
    (0.08, -0.10),
])  # fmt: skip
# Outlines of a scapula and a humerus: x in half-widths of the thorax.
_SCAPULA = np.array([
    (1.05, -0.285), (0.98, -0.17), (0.97, -0.04), (1.02, 0.035), (1.07, 0.02), (1.13, -0.09), (1.20, -0.20),
    (1.27, -0.235), (1.26, -0.30), (1.40, -0.335), (1.38, -0.350), (1.20, -0.325),
])  # fmt: skip
_HUMERUS = np.array([
    (1.24, -0.29), (1.30, -0.325), (1.40, -0.325), (1.47, -0.285), (1.50, -0.21), (1.54, -0.05), (1.60, 0.20),
    (1.66, 0.60), (1.52, 0.60), (1.45, 0.20), (1.37, -0.05), (1.28, -0.21),
])  # fmt: skip
_RIBS, _RIBS_TO_STERNUM = 10, 7
_POSTERIOR_ANGLES = np.linspace(0.16, np.pi / 2, 14)  # angles along a rib, from the spine to the side of the chest
_ANTERIOR_ANGLES = np.linspace(np.pi / 2, 2.62, 12)  # from the side to the cartilage, which does not show


@dataclass(frozen=True)
class Anatomy:
    """Outlines and lines of one patient in one view, in image widths.

    Attributes:
      half_width: half of the largest inner width of the thorax.
      lungs: outlines, by side.
      heart: outline.
      mediastinum: great vessels above the heart, with the aortic knob.
      hila: centres, by side.
      posterior_ribs, anterior_ribs, clavicles, scapulae, humeri, vertebrae: outlines of the bones.
      airway: centre lines of the trachea and the main bronchi.
      skin: outline of the body.
      breasts: outlines; empty for men.
    """

    half_width: float
    lungs: dict[int, Points]
    heart: Points
    mediastinum: Points
    hila: dict[int, Points]
    posterior_ribs: Points
    anterior_ribs: Points
    clavicles: list[Points]
    scapulae: list[Points]
    humeri: list[Points]
    vertebrae: list[Points]
    airway: list[Points]
    skin: Points
    breasts: list[Points]

    def span(self, side: int, y: float) -> tuple[float, float]:
        """Return where aerated lung begins (at heart or mediastinum) and ends (at the wall) at height y, as |x|."""
        lung = self.lungs[side]
        across = side * lung[:, 0]
        top = int(lung[:, 1].argmin())
        base = int(across.argmax())
        wall = np.interp(y, lung[top : base + 1, 1], across[top : base + 1])
        inner = side * self.heart[:, 0]
        border = inner[np.abs(self.heart[:, 1] - y) < 0.02]
        shadow = np.abs(self.mediastinum[:, 0]).max() if y < self.heart[:, 1].min() + 0.03 else 0.1 * self.half_width
        return max(float(border.max(initial=0.0)), float(shadow)), float(wall)

    def dome(self, side: int) -> float:
        """Return the y of the top of the diaphragm."""
        lung = self.lungs[side]
        across = side * lung[:, 0] / self.half_width
        return float(lung[(across > 0.3) & (across < 0.8) & (lung[:, 1] > 0), 1].min())


def make_anatomy(radiograph: Radiograph) -> Anatomy:
    """Make the shapes of a patient from the body's seed, the presence of cardiomegaly and the view."""
    rng = np.random.default_rng([radiograph.body, 0])
    u = rng.uniform
    portable = radiograph.view == "AP"
    half_width, height_scale = u(0.29, 0.40), u(0.94, 1.06)
    depth = u(-0.012, 0.012) - 0.022 * portable  # shallower inspiration on a portable film

    lungs = {}
    for side in SIDES:
        outline = _LUNG + rng.normal(0, 0.006, _LUNG.shape)
        outline[_DOME, 1] += u(0.000, 0.035) * (side == LEFT) + u(-0.02, 0.02) + depth
        curve = spline(outline * (1, height_scale), closed=True)
        lungs[side] = curve * (side * half_width / curve[:, 0].max(), 1)

    lowest, highest = CARDIOTHORACIC[radiograph.shows("Cardiomegaly")]
    rank = u(0.2, 1.0) if portable else u(0.0, 0.8)  # a portable heart is nearer to the tube and looks larger
    heart_width = 2 * half_width * (lowest + rank * (highest - lowest))
    medial = lungs[LEFT][lungs[LEFT][:, 0] < 0.32 * half_width, 1].max()
    heart_top, heart_base = u(-0.10, -0.03), medial + u(0.00, 0.02)
    heart = spline(_HEART + rng.normal(0, 0.008, _HEART.shape), closed=True)
    heart[:, 0] *= heart_width / np.ptp(heart[:, 0])
    shift = u(-0.13, 0.13) * half_width  # so that neither border alone reveals the heart's size
    heart[:, 0] += min(shift, 0.94 * half_width - heart[:, 0].max())
    heart[:, 1] = heart_top + heart[:, 1] * (heart_base - heart_top)

    slim, knob = u(0.17, 0.22) * half_width, u(0.02, 0.10) * half_width
    mediastinum = spline(np.array([
        (-0.9 * slim, -0.60), (-0.85 * slim, -0.36), (-0.95 * slim, -0.24), (-1.05 * slim, -0.12), (-1.1 * slim, 0.02),
        (0, 0.15), (1.2 * slim, 0.02), (1.15 * slim, -0.08), (slim + 0.5 * knob, -0.125), (slim + knob, -0.165),
        (slim + 0.4 * knob, -0.205), (0.8 * slim, -0.25), (0.8 * slim, -0.36), (0.9 * slim, -0.60),
    ]), closed=True)  # fmt: skip
    hila = {
        side: np.array([side * u(0.23, 0.27) * half_width, u(-0.05, -0.03) - 0.02 * (side == LEFT)]) for side in SIDES
    }

    posterior, anterior = _make_ribs(rng, half_width, height_scale, lungs)
    scapulae, humeri = _make_arms(rng, half_width, portable)
    return Anatomy(
        half_width=half_width, lungs=lungs, heart=heart, mediastinum=mediastinum, hila=hila,
        posterior_ribs=posterior, anterior_ribs=anterior,
        clavicles=_make_clavicles(rng, half_width), scapulae=scapulae, humeri=humeri,
        vertebrae=_make_vertebrae(u(0.062, 0.074)), airway=_make_airway(rng, hila),
        skin=_make_skin(half_width, u(1.14, 1.24)),
        breasts=_make_breasts(rng, half_width) if radiograph.sex == "F" else [],
    )  # fmt: skip


def _make_ribs(
    rng: np.random.Generator, half_width: float, height_scale: float, lungs: dict[int, Points]
) -> tuple[Points, Points]:
    """Make the posterior and anterior ribs: the two halves of tilted rings seen from the front."""
    start = (np.linspace(-0.425, 0.215, _RIBS) + rng.uniform(-0.012, 0.012)) * height_scale
    fall = np.linspace(0.055, 0.15, _RIBS) * rng.uniform(0.85, 1.15)
    descent = np.linspace(0.07, 0.15, _RIBS) * rng.uniform(0.85, 1.15)
    reach = []
    for side in SIDES:
        lung = lungs[side] * (side, 1)
        wall = lung[lung[:, 1].argmin() : lung[:, 0].argmax() + 1]
        reach.append(side * np.maximum(np.interp(start + fall, wall[:, 1], wall[:, 0]) + 0.004, 0.42 * half_width))
    reach = np.stack(reach)[..., None]
    posterior = fall[:, None] * (1 - np.cos(_POSTERIOR_ANGLES)) - 0.015 * np.sin(2 * _POSTERIOR_ANGLES) + start[:, None]
    anterior = (start + fall)[:, None] - descent[:, None] * np.cos(_ANTERIOR_ANGLES)
    anterior, front_reach = anterior[:_RIBS_TO_STERNUM], reach[:, :_RIBS_TO_STERNUM]
    posterior = np.stack([reach * np.sin(_POSTERIOR_ANGLES), np.stack([posterior, posterior])], axis=-1)
    anterior = np.stack([front_reach * np.sin(_ANTERIOR_ANGLES), np.stack([anterior, anterior])], axis=-1)
    posterior, anterior = (ribs.reshape(-1, ribs.shape[-2], 2) for ribs in (posterior, anterior))
    width = rng.uniform(0.018, 0.023)
    return outline(posterior, width), outline(anterior, 1.15 * width)


def _make_clavicles(rng: np.random.Generator, half_width: float) -> list[Points]:
    """Make the clavicles: two flat S shapes, thick at the sternum."""
    line = np.array([(0.045, -0.250), (0.10, -0.272), (0.20, -0.300), (0.30, -0.333), (0.40, -0.350), (0.46, -0.345)])
    width = np.interp(np.linspace(0, 1, 26), [0, 0.04, 0.12, 0.5, 0.95, 1], [0.018, 0.032, 0.027, 0.019, 0.025, 0.012])[
        :, None
    ]
    height = rng.uniform(-0.03, 0.01)
    shapes = []
    for side in SIDES:
        curve = spline(line * (half_width / 0.36, 1) + (0, height + rng.uniform(-0.008, 0.008)), samples=5)
        shapes.append(outline(curve, width) * (side, 1))
    return shapes


def _make_arms(rng: np.random.Generator, half_width: float, portable: bool) -> tuple[list[Points], list[Points]]:
    """Make scapulae and humeri; on a portable film the scapulae overlie the lungs."""
    inward = rng.uniform(0.06, 0.14) if portable else rng.uniform(-0.06, 0.03)
    scapula = spline(_SCAPULA - (inward, 0), closed=True) * (half_width, 1)
    humerus = spline(_HUMERUS, closed=True, samples=3) * (half_width, 1) + (0, rng.uniform(-0.02, 0.02))
    return [scapula * (side, 1) for side in SIDES], [humerus * (side, 1) for side in SIDES]


def _make_vertebrae(pitch: float) -> list[Points]:
    """Make the vertebral bodies: rounded boxes with a slight waist."""
    t = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    box = np.stack(
        [np.sign(np.cos(t)) * np.abs(np.cos(t)) ** 0.45, np.sign(np.sin(t)) * np.abs(np.sin(t)) ** 0.4], axis=1
    )
    box[:, 0] *= 0.92 + 0.08 * box[:, 1] ** 2
    return [box * (0.036 + 0.008 * (y + 0.5), 0.40 * pitch) + (0, y) for y in np.arange(-0.62, 0.62, pitch)]


def _make_airway(rng: np.random.Generator, hila: dict[int, Points]) -> list[Points]:
    """Make the centre lines of the trachea and the two main bronchi."""
    carina = np.array([rng.uniform(-0.012, 0.002), rng.uniform(-0.125, -0.095)])
    trachea = spline(np.stack([(0.002, -0.62), (0.003, -0.36), carina - (0.002, 0.11), carina]), samples=4)
    return [trachea, *(np.stack([carina, carina + 0.75 * (hila[side] - carina)]) for side in SIDES)]


def _make_skin(half_width: float, girth: float) -> Points:
    """Make the outline of neck, shoulders and trunk."""
    wall = girth * half_width
    left = np.array([
        (0.095, -0.70), (0.100, -0.46), (0.150, -0.440), (0.30, -0.405), (0.44, -0.360), (0.56, -0.28), (0.66, -0.05),
        (0.70, 0.40), (0.66, 0.70), (wall + 0.07, 0.60), (wall + 0.045, 0.30), (wall + 0.03, 0.10), (wall + 0.01, 0.12),
        (wall, 0.25), (wall + 0.005, 0.45), (wall + 0.01, 0.72),
    ])  # fmt: skip
    return np.concatenate([left, left[::-1] * (-1, 1)])


def _make_breasts(rng: np.random.Generator, half_width: float) -> list[Points]:
    """Make the breasts, over the lower lungs."""
    x, y = rng.uniform(0.55, 0.68), rng.uniform(0.08, 0.14)
    width, height = rng.uniform(0.40, 0.52), rng.uniform(0.11, 0.17)
    return [ellipse((side * x * half_width, y), (width * half_width, height), -0.25 * side) for side in SIDES]


TRUNKS, BRANCHES, TWIGS = 13, 26, 110  # per lung

Vessels = list[tuple[Points, float, float]]
"""Lines grouped by calibre: (lines, width in image widths, contrast 0 to 1)."""


def make_vessels(anatomy: Anatomy, seed: int) -> tuple[Vessels, Vessels]:
    """Make the vessels of both lungs: the broad ones, for the soft grid, and the fine ones."""
    rng = np.random.default_rng([seed, 1])
    both = [_make_tree(rng, anatomy.hila[side], anatomy.lungs[side], side) for side in SIDES]
    trunks, branches, twigs = (np.concatenate(level) for level in zip(*both, strict=True))
    broad = [
        (branches[:, :5], 0.0036, 0.16),
        (trunks[:, 9:], 0.0036, 0.16),
        (trunks[:, 6:10], 0.0050, 0.18),
        (trunks[:, 3:7], 0.0068, 0.19),
        (trunks[:, :4], 0.0085, 0.19),
    ]
    return broad, [(twigs, 0.0015, 0.12), (branches[:, 4:], 0.0024, 0.14)]


def _make_tree(rng: np.random.Generator, hilum: Points, lung: Points, side: int) -> tuple[Points, Points, Points]:
    trunks = _make_trunks(rng, hilum, lung, side)
    branches = _make_offshoots(rng, trunks[:, 2:10], BRANCHES, (0.07, 0.17), (0.3, 0.7))
    early, late = trunks[:, 4:8], trunks[:, 7:11]
    stems = np.concatenate([early, late, branches[:, :4], branches[:, 3:]])
    return trunks, branches, _make_offshoots(rng, stems, TWIGS, (0.03, 0.08), (0.4, 1.0))


def _make_trunks(rng: np.random.Generator, hilum: Points, lung: Points, side: int) -> Points:
    """Make curves of 13 points from a hilum most of the way to the border of the lung."""
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


def _make_offshoots(
    rng: np.random.Generator, parents: Points, number: int, length: tuple[float, float], fork: tuple[float, float]
) -> Points:
    """Make curves of 7 points that branch off the parents at an angle within `fork` (radians)."""
    starts, steps = parents[:, :-1].reshape(-1, 2), np.diff(parents, axis=1).reshape(-1, 2)
    chosen = rng.integers(0, len(starts), number)
    heading = np.arctan2(steps[chosen, 1], steps[chosen, 0]) + rng.choice([-1, 1], number) * rng.uniform(*fork, number)
    s = np.linspace(0, 1, 7)
    turn = heading[:, None] + rng.uniform(-0.6, 0.6, (number, 1)) * s
    course = np.stack([np.cos(turn), np.sin(turn)], axis=-1) * (rng.uniform(*length, (number, 1)) * s)[..., None]
    return starts[chosen, None] + course
