"""The shapes of a patient's chest in unit coordinates, and how the patient stands before the detector.

The patient's right side is on the left of the image (side -1), the left side on the right (side +1).
"""

from dataclasses import dataclass

import numpy as np

from cxrjax.data.phantom.drawing import Points, ellipse, outline, spline
from cxrjax.data.phantom.population import Radiograph

RIGHT, LEFT = -1, 1
SIDES = (RIGHT, LEFT)

CARDIOTHORACIC = {False: (0.42, 0.545), True: (0.555, 0.66)}
"""Width of the heart over that of the thorax, without and with cardiomegaly."""

# Outline of a lung: x over the thorax's half-width, y over its height; the lateral wall comes first.
_LUNG = np.array([
    (0.22, -0.375), (0.38, -0.400), (0.55, -0.368), (0.71, -0.285), (0.84, -0.160), (0.94, 0.000), (0.985, 0.150),
    (1.00, 0.255), (1.005, 0.310), (0.985, 0.318), (0.93, 0.275), (0.80, 0.222), (0.60, 0.190), (0.40, 0.193),
    (0.26, 0.215), (0.18, 0.235), (0.14, 0.130), (0.11, 0.000), (0.12, -0.150), (0.14, -0.280),
])  # fmt: skip
_DOME = slice(9, 17)  # its points on the diaphragm
# Outline of the heart: x over its width (re-centred below), y over its height from the top.
_HEART = np.array([
    (-0.14, -0.06), (-0.24, 0.12), (-0.30, 0.34), (-0.315, 0.56), (-0.28, 0.78), (-0.18, 0.96), (0.05, 1.05),
    (0.33, 1.07), (0.54, 1.00), (0.665, 0.87), (0.685, 0.74), (0.63, 0.56), (0.50, 0.36), (0.35, 0.18), (0.23, 0.00),
    (0.08, -0.10),
])  # fmt: skip
# Outlines of a shoulder blade and a humerus: x over the thorax's half-width.
_BLADE = np.array([
    (1.05, -0.285), (0.98, -0.17), (0.97, -0.04), (1.02, 0.035), (1.07, 0.02), (1.13, -0.09), (1.20, -0.20),
    (1.27, -0.235), (1.26, -0.30), (1.40, -0.335), (1.38, -0.350), (1.20, -0.325),
])  # fmt: skip
_HUMERUS = np.array([
    (1.24, -0.29), (1.30, -0.325), (1.40, -0.325), (1.47, -0.285), (1.50, -0.21), (1.54, -0.05), (1.60, 0.20),
    (1.66, 0.60), (1.52, 0.60), (1.45, 0.20), (1.37, -0.05), (1.28, -0.21),
])  # fmt: skip
_RIBS, _RIBS_TO_STERNUM = 10, 7
_BEHIND = np.linspace(0.16, np.pi / 2, 14)  # angles along a rib: from the spine to the side of the chest
_FRONT = np.linspace(np.pi / 2, 2.62, 12)  # and on to where bone ends and cartilage, which does not show, begins


@dataclass(frozen=True)
class Anatomy:
    """Contours and lines of one patient in one view, in image widths.

    Attributes:
      half_width: half the thorax's greatest inner width.
      heart_width: greatest width of the heart's shadow.
      lungs: outline of each lung, by side.
      heart: outline of the heart.
      mediastinum: outline of the vessels above the heart, the aortic knob included.
      hila: centre of each hilum, by side.
      ribs_behind: outlines of the posterior ribs.
      ribs_front: outlines of the anterior ribs.
      clavicles: outlines.
      scapulae: outlines of the shoulder blades.
      humeri: outlines of the upper arms' bones.
      vertebrae: outlines of the vertebral bodies.
      airway: centre lines of the trachea and the main bronchi.
      skin: outline of the body.
      breasts: outlines; none in men.
    """

    half_width: float
    heart_width: float
    lungs: dict[int, Points]
    heart: Points
    mediastinum: Points
    hila: dict[int, Points]
    ribs_behind: Points
    ribs_front: Points
    clavicles: list[Points]
    scapulae: list[Points]
    humeri: list[Points]
    vertebrae: list[Points]
    airway: list[Points]
    skin: Points
    breasts: list[Points]

    @property
    def cardiothoracic_ratio(self) -> float:
        """Width of the heart over the inner width of the thorax."""
        return self.heart_width / (2 * self.half_width)

    def span(self, side: int, y: float) -> tuple[float, float]:
        """Where aerated lung begins and ends at a height: |x| at the heart or mediastinum, and at the wall."""
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
        """Height (y) of the top of the diaphragm."""
        lung = self.lungs[side]
        across = side * lung[:, 0] / self.half_width
        return float(lung[(across > 0.3) & (across < 0.8) & (lung[:, 1] > 0), 1].min())


def anatomy(radiograph: Radiograph) -> Anatomy:
    """The shapes of a radiograph's patient: a function of the body's seed, the heart's size and the view."""
    rng = np.random.default_rng([radiograph.body, 0])
    u = rng.uniform
    portable = radiograph.view == "AP"
    half_width, tall = u(0.29, 0.40), u(0.94, 1.06)
    depth = u(-0.012, 0.012) - 0.022 * portable  # a portable film is taken in shallower inspiration

    lungs = {}
    for side in SIDES:
        outline = _LUNG + rng.normal(0, 0.006, _LUNG.shape)
        outline[_DOME, 1] += u(0.000, 0.035) * (side == LEFT) + u(-0.02, 0.02) + depth
        curve = spline(outline * (1, tall), closed=True)
        lungs[side] = curve * (side * half_width / curve[:, 0].max(), 1)

    lowest, highest = CARDIOTHORACIC[radiograph.shows("Cardiomegaly")]
    rank = u(0.2, 1.0) if portable else u(0.0, 0.8)  # nearer the tube, the heart of a portable film looks larger
    heart_width = 2 * half_width * (lowest + rank * (highest - lowest))
    medial = lungs[LEFT][lungs[LEFT][:, 0] < 0.32 * half_width, 1].max()
    heart_top, heart_base = u(-0.10, -0.03), medial + u(0.00, 0.02)
    heart = spline(_HEART + rng.normal(0, 0.008, _HEART.shape), closed=True)
    heart[:, 0] *= heart_width / np.ptp(heart[:, 0])
    shift = u(-0.13, 0.13) * half_width  # so neither border alone tells the heart's size
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

    behind, front = _ribs(rng, half_width, tall, lungs)
    scapulae, humeri = _arms(rng, half_width, portable)
    return Anatomy(
        half_width=half_width, heart_width=heart_width, lungs=lungs, heart=heart, mediastinum=mediastinum, hila=hila,
        ribs_behind=behind, ribs_front=front,
        clavicles=_clavicles(rng, half_width), scapulae=scapulae, humeri=humeri,
        vertebrae=_vertebrae(u(0.062, 0.074)), airway=_airway(rng, hila), skin=_skin(half_width, u(1.14, 1.24)),
        breasts=_breasts(rng, half_width) if radiograph.sex == "F" else [],
    )  # fmt: skip


def _ribs(rng: np.random.Generator, half_width: float, tall: float, lungs: dict[int, Points]) -> tuple[Points, Points]:
    """Outlines of posterior and anterior ribs: the two halves of tilted rings seen from the front."""
    start = (np.linspace(-0.425, 0.215, _RIBS) + rng.uniform(-0.012, 0.012)) * tall
    fall = np.linspace(0.055, 0.15, _RIBS) * rng.uniform(0.85, 1.15)
    descent = np.linspace(0.07, 0.15, _RIBS) * rng.uniform(0.85, 1.15)
    reach = []
    for side in SIDES:
        lung = lungs[side] * (side, 1)
        wall = lung[lung[:, 1].argmin() : lung[:, 0].argmax() + 1]
        reach.append(side * np.maximum(np.interp(start + fall, wall[:, 1], wall[:, 0]) + 0.004, 0.42 * half_width))
    reach = np.stack(reach)[..., None]
    behind = fall[:, None] * (1 - np.cos(_BEHIND)) - 0.015 * np.sin(2 * _BEHIND) + start[:, None]
    front = (start + fall)[:, None] - descent[:, None] * np.cos(_FRONT)
    front, foremost = front[:_RIBS_TO_STERNUM], reach[:, :_RIBS_TO_STERNUM]
    behind = np.stack([reach * np.sin(_BEHIND), np.stack([behind, behind])], axis=-1).reshape(-1, len(_BEHIND), 2)
    front = np.stack([foremost * np.sin(_FRONT), np.stack([front, front])], axis=-1).reshape(-1, len(_FRONT), 2)
    width = rng.uniform(0.018, 0.023)
    return outline(behind, width), outline(front, 1.15 * width)


def _clavicles(rng: np.random.Generator, half_width: float) -> list[Points]:
    """Outlines of the clavicles: two flat S, thick at the sternum."""
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


def _arms(rng: np.random.Generator, half_width: float, portable: bool) -> tuple[list[Points], list[Points]]:
    """Outlines of shoulder blades and humeri; on a portable film the blades overlie the lungs."""
    inward = rng.uniform(0.06, 0.14) if portable else rng.uniform(-0.06, 0.03)
    blade = spline(_BLADE - (inward, 0), closed=True) * (half_width, 1)
    humerus = spline(_HUMERUS, closed=True, samples=3) * (half_width, 1) + (0, rng.uniform(-0.02, 0.02))
    return [blade * (side, 1) for side in SIDES], [humerus * (side, 1) for side in SIDES]


def _vertebrae(pitch: float) -> list[Points]:
    """Outlines of the vertebral bodies: rounded boxes, waisted a little."""
    t = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    box = np.stack(
        [np.sign(np.cos(t)) * np.abs(np.cos(t)) ** 0.45, np.sign(np.sin(t)) * np.abs(np.sin(t)) ** 0.4], axis=1
    )
    box[:, 0] *= 0.92 + 0.08 * box[:, 1] ** 2
    return [box * (0.036 + 0.008 * (y + 0.5), 0.40 * pitch) + (0, y) for y in np.arange(-0.62, 0.62, pitch)]


def _airway(rng: np.random.Generator, hila: dict[int, Points]) -> list[Points]:
    """Centre lines of the trachea and the two main bronchi."""
    carina = np.array([rng.uniform(-0.012, 0.002), rng.uniform(-0.125, -0.095)])
    trachea = spline(np.stack([(0.002, -0.62), (0.003, -0.36), carina - (0.002, 0.11), carina]), samples=4)
    return [trachea, *(np.stack([carina, carina + 0.75 * (hila[side] - carina)]) for side in SIDES)]


def _skin(half_width: float, girth: float) -> Points:
    """Outline of neck, shoulders and trunk."""
    wall = girth * half_width
    left = np.array([
        (0.095, -0.70), (0.100, -0.46), (0.150, -0.440), (0.30, -0.405), (0.44, -0.360), (0.56, -0.28), (0.66, -0.05),
        (0.70, 0.40), (0.66, 0.70), (wall + 0.07, 0.60), (wall + 0.045, 0.30), (wall + 0.03, 0.10), (wall + 0.01, 0.12),
        (wall, 0.25), (wall + 0.005, 0.45), (wall + 0.01, 0.72),
    ])  # fmt: skip
    return np.concatenate([left, left[::-1] * (-1, 1)])


def _breasts(rng: np.random.Generator, half_width: float) -> list[Points]:
    """Outlines of the breasts over the lower lungs."""
    x, y, wide, high = (
        rng.uniform(0.55, 0.68),
        rng.uniform(0.08, 0.14),
        rng.uniform(0.40, 0.52),
        rng.uniform(0.11, 0.17),
    )
    return [ellipse((side * x * half_width, y), (wide * half_width, high), -0.25 * side) for side in SIDES]


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
