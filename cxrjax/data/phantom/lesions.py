"""Position and contrast of each finding, from the study's seed and the patient's anatomy."""

from dataclasses import dataclass

import numpy as np

from cxrjax.data.phantom.anatomy import LEFT, SIDES, Anatomy
from cxrjax.data.phantom.drawing import Points, ellipse, spline
from cxrjax.data.phantom.population import Radiograph
from cxrjax.findings import PHANTOM

LINE_WIDTH = 1 / 256
"""Width of the pleural line and of tubes in image widths: invisible at 64 px, sharp from 256 px."""


@dataclass(frozen=True)
class Opacity:
    """A mass, a nodule (outline) or a device (line), with its contrast as a fraction of the grey range."""

    points: Points
    contrast: float


@dataclass(frozen=True)
class Pneumothorax:
    """Air between chest wall and lung: its outline, and the pleural line with its contrast."""

    air: Points
    line: Points
    contrast: float


@dataclass(frozen=True)
class Reticulation:
    """Regions with a fine net: outlines, contrast, and the origin of their cut from the texture bank."""

    outlines: list[Points]
    contrast: float
    origin: tuple[float, float]


@dataclass(frozen=True)
class Findings:
    """All findings except cardiomegaly, which is a shape of the heart; None or empty if absent.

    The effusion is fluid in the lungs below a meniscus: outlines by side.
    """

    effusion: dict[int, Points] | None
    mass: list[Opacity]
    nodules: list[Opacity]
    pneumothorax: Pneumothorax | None
    reticulation: Reticulation | None
    devices: list[Opacity]


def make_findings(radiograph: Radiograph, anatomy: Anatomy) -> Findings:
    """Make the findings of a radiograph, each from its own random numbers, so that none influences another."""
    return Findings(
        effusion=_make_effusion(radiograph, anatomy),
        mass=_make_mass(radiograph, anatomy),
        nodules=_make_nodules(radiograph, anatomy),
        pneumothorax=_make_pneumothorax(radiograph, anatomy),
        reticulation=_make_reticulation(radiograph, anatomy),
        devices=_make_devices(radiograph, anatomy),
    )


def _rng(radiograph: Radiograph, finding: str) -> np.random.Generator | None:
    """Return the finding's random generator; None if the finding is absent."""
    if not radiograph.shows(finding):
        return None
    return np.random.default_rng([radiograph.disease, PHANTOM.index(finding)])


def _make_effusion(radiograph: Radiograph, anatomy: Anatomy) -> dict[int, Points] | None:
    """Make fluid on one side, in a quarter of cases on both, highest at the chest wall."""
    rng = _rng(radiograph, "Pleural Effusion")
    if rng is None:
        return None
    sides = SIDES if rng.random() < 0.25 else (SIDES[rng.integers(2)],)
    below = {}
    for side in sides:
        height = rng.uniform(0.09, 0.22)
        base = anatomy.lungs[side][:, 1].max()
        x = np.array([-0.1, 0.12, 0.35, 0.60, 0.80, 0.95, 1.15]) * side * anatomy.half_width
        rise = np.array([0.35, 0.35, 0.37, 0.43, 0.56, 0.82, 1.15])
        meniscus = spline(np.stack([x, anatomy.dome(side) - height * rise], axis=1))
        meniscus[:, 1] = np.minimum(meniscus[:, 1], base)
        below[side] = np.concatenate([meniscus, [(1.2 * side, 0.7), (-0.1 * side, 0.7)]])
    return below


def _sample_position(rng: np.random.Generator, anatomy: Anatomy, margin: float) -> np.ndarray:
    """Sample a point in aerated lung, `margin` away from heart and chest wall if there is room."""
    side, y = SIDES[rng.integers(2)], rng.uniform(-0.26, 0.15)
    inner, wall = anatomy.span(side, y)
    inner, wall = inner + 0.02 + margin, wall - 0.01 - margin
    middle = (inner + wall) / 2
    return np.array([side * rng.uniform(min(inner, middle), max(wall, middle)), y])


def _make_mass(radiograph: Radiograph, anatomy: Anatomy) -> list[Opacity]:
    """Make one lobulated mass, 7 to 10 % of the image's width."""
    rng = _rng(radiograph, "Mass")
    if rng is None:
        return []
    radius = rng.uniform(0.07, 0.10) / 2
    centre = _sample_position(rng, anatomy, radius)
    outline = ellipse((0, 0), (radius, radius * rng.uniform(0.8, 1.1)), rng.uniform(0, np.pi), points=9)
    outline = spline(outline * rng.uniform(0.86, 1.14, (9, 1)), closed=True)
    return [Opacity(centre + outline, rng.uniform(0.26, 0.38))]


def _make_nodules(radiograph: Radiograph, anatomy: Anatomy) -> list[Opacity]:
    """Make two to five round nodules, 2.5 to 4 % of the image's width."""
    rng = _rng(radiograph, "Nodule")
    if rng is None:
        return []
    spots = []
    for _ in range(rng.integers(2, 6)):
        radius = rng.uniform(0.025, 0.04) / 2
        outline = ellipse(
            _sample_position(rng, anatomy, radius), (radius, radius * rng.uniform(0.85, 1.0)), rng.uniform(0, np.pi), 16
        )
        spots.append(Opacity(outline, rng.uniform(0.30, 0.42)))
    return spots


def _make_pneumothorax(radiograph: Radiograph, anatomy: Anatomy) -> Pneumothorax | None:
    """Collapse a lung away from the chest wall, most at the apex; its edge is a thin line."""
    rng = _rng(radiograph, "Pneumothorax")
    if rng is None:
        return None
    side = SIDES[rng.integers(2)]
    lung, hilum = anatomy.lungs[side], anatomy.hila[side]
    collapse, down = rng.uniform(0.16, 0.34), rng.uniform(0.10, 0.22)
    lateral = np.clip((side * lung[:, 0] / anatomy.half_width - 0.30) / 0.30, 0, 1)
    upper = np.clip((down - lung[:, 1]) / 0.25, 0, 1)
    shrink = collapse * lateral * upper
    collapsed = lung + (hilum - lung) * shrink[:, None]
    separated = _longest_run(shrink > 0.01)
    line = collapsed[separated]
    return Pneumothorax(np.concatenate([lung[separated], line[::-1]]), line, rng.uniform(0.40, 0.55))


def _longest_run(chosen: np.ndarray) -> np.ndarray:
    """Return the indices of the longest run of true values on a closed curve, in order."""
    start = int(np.argmin(chosen))  # start outside a run
    order = np.roll(np.arange(len(chosen)), -start)
    runs = np.split(order, np.flatnonzero(np.diff(chosen[order].astype(int))) + 1)
    return max((run for run in runs if chosen[run[0]]), key=len)


def _make_reticulation(radiograph: Radiograph, anatomy: Anatomy) -> Reticulation | None:
    """Make a net of fine lines in the middle and lower zone of one lung or both."""
    rng = _rng(radiograph, "Reticulation")
    if rng is None:
        return None
    sides = SIDES if rng.random() < 0.5 else (SIDES[rng.integers(2)],)
    outlines = []
    for side in sides:
        centre = (side * rng.uniform(0.5, 0.7) * anatomy.half_width, rng.uniform(-0.02, 0.12))
        outlines.append(ellipse(centre, (rng.uniform(0.10, 0.16), rng.uniform(0.13, 0.22)), rng.uniform(-0.4, 0.4)))
    return Reticulation(outlines, rng.uniform(0.065, 0.095), (rng.uniform(), rng.uniform()))


def _make_devices(radiograph: Radiograph, anatomy: Anatomy) -> list[Opacity]:
    """Make one or two of: jugular catheter, subclavian catheter, gastric tube, chest tube, pacing lead."""
    rng = _rng(radiograph, "Support Devices")
    if rng is None:
        return []
    side, tip, dome = SIDES[rng.integers(2)], rng.uniform(-0.08, 0.03), anatomy.dome(LEFT)
    cava, stomach = (-0.15, tip), [(0.08, dome), (0.25, dome + 0.07), (0.48, dome + 0.10)]
    courses = (  # x in half-widths of the thorax
        [(-0.26, -0.60), (-0.22, -0.40), (-0.13, -0.25), (-0.14, tip - 0.08), cava],
        [(1.35 * side, -0.20), (0.9 * side, -0.285), (0.45 * side, -0.285), (0.10 * side, -0.23), (-0.12, -0.17), cava],
        [(0.05, -0.60), (0.04, -0.30), (0.06, 0.00), *stomach],
        [(1.4 * side, 0.20), (1.0 * side, 0.12), (0.78 * side, -0.02), (0.6 * side, -0.20), (0.45 * side, -0.29)],
        [(0.9, -0.22), (0.6, -0.27), (0.1, -0.24), (-0.13, -0.15), (-0.16, -0.02), (-0.08, 0.11), (0.15, 0.17),
         (0.4, 0.16)],
    )  # fmt: skip
    contrast = rng.uniform(0.45, 0.60)
    lines = []
    for k in rng.choice(len(courses), size=rng.integers(1, 3), replace=False):
        course = np.array(courses[k]) * (anatomy.half_width, 1)
        lines.append(Opacity(spline(course + rng.normal(0, 0.008, course.shape), samples=8), contrast))
    return lines
