"""Where each finding lies and how strong it is: a function of the study's seed and the patient's shapes."""

from dataclasses import dataclass

import numpy as np

from cxrjax.data.phantom.anatomy import LEFT, SIDES, Anatomy
from cxrjax.data.phantom.drawing import Points, ellipse, spline
from cxrjax.data.phantom.population import Radiograph
from cxrjax.findings import PHANTOM

LINE_WIDTH = 1 / 256
"""Width of the pleural line and of tubes, in image widths: lost by 64 pixels, crisp from 256 on."""


@dataclass(frozen=True)
class Effusion:
    """Fluid in the lower pleural space: the part of the lungs below a meniscus (outlines, by side)."""

    below: dict[int, Points]


@dataclass(frozen=True)
class Opacity:
    """A dense spot, as a mass or a nodule: its outline and its contrast (share of the grey range)."""

    outline: Points
    contrast: float


@dataclass(frozen=True)
class Pneumothorax:
    """Air between chest wall and lung: its outline, the pleural line, the line's contrast."""

    air: Points
    line: Points
    contrast: float


@dataclass(frozen=True)
class Reticulation:
    """A region filled with a fine net: outlines, contrast, and where in the bank of texture it is cut."""

    outlines: list[Points]
    contrast: float
    origin: tuple[float, float]


@dataclass(frozen=True)
class Device:
    """A catheter, tube or lead: its course and contrast."""

    line: Points
    contrast: float


@dataclass(frozen=True)
class Findings:
    """All findings of a radiograph but cardiomegaly, which is the shape of the heart; None or empty where absent."""

    effusion: Effusion | None
    mass: list[Opacity]
    nodules: list[Opacity]
    pneumothorax: Pneumothorax | None
    reticulation: Reticulation | None
    devices: list[Device]


def findings(radiograph: Radiograph, shape: Anatomy) -> Findings:
    """The findings that a radiograph shows; each is drawn of its own random numbers, so none influences another."""
    return Findings(
        effusion=_effusion(radiograph, shape),
        mass=_mass(radiograph, shape),
        nodules=_nodules(radiograph, shape),
        pneumothorax=_pneumothorax(radiograph, shape),
        reticulation=_reticulation(radiograph, shape),
        devices=_devices(radiograph, shape),
    )


def _rng(radiograph: Radiograph, finding: str) -> np.random.Generator | None:
    """The finding's own random numbers; None where it is absent."""
    if not radiograph.shows(finding):
        return None
    return np.random.default_rng([radiograph.disease, PHANTOM.index(finding)])


def _effusion(radiograph: Radiograph, shape: Anatomy) -> Effusion | None:
    """Fluid on one side, in a quarter of cases on both; highest at the chest wall."""
    rng = _rng(radiograph, "Pleural Effusion")
    if rng is None:
        return None
    sides = SIDES if rng.random() < 0.25 else (SIDES[rng.integers(2)],)
    below = {}
    for side in sides:
        height = rng.uniform(0.09, 0.22)
        base = shape.lungs[side][:, 1].max()
        x = np.array([-0.1, 0.12, 0.35, 0.60, 0.80, 0.95, 1.15]) * side * shape.half_width
        rise = np.array([0.35, 0.35, 0.37, 0.43, 0.56, 0.82, 1.15])
        meniscus = spline(np.stack([x, shape.dome(side) - height * rise], axis=1))
        meniscus[:, 1] = np.minimum(meniscus[:, 1], base)
        below[side] = np.concatenate([meniscus, [(1.2 * side, 0.7), (-0.1 * side, 0.7)]])
    return Effusion(below)


def _place(rng: np.random.Generator, shape: Anatomy, margin: float) -> np.ndarray:
    """A point in aerated lung, `margin` away from heart and chest wall where there is room."""
    side, y = SIDES[rng.integers(2)], rng.uniform(-0.26, 0.15)
    inner, wall = shape.span(side, y)
    inner, wall = inner + 0.02 + margin, wall - 0.01 - margin
    middle = (inner + wall) / 2
    return np.array([side * rng.uniform(min(inner, middle), max(wall, middle)), y])


def _mass(radiograph: Radiograph, shape: Anatomy) -> list[Opacity]:
    """One lobulated mass, 7 to 10 % of the image's width; none where absent."""
    rng = _rng(radiograph, "Mass")
    if rng is None:
        return []
    radius = rng.uniform(0.07, 0.10) / 2
    centre = _place(rng, shape, radius)
    outline = ellipse((0, 0), (radius, radius * rng.uniform(0.8, 1.1)), rng.uniform(0, np.pi), points=9)
    outline = spline(outline * rng.uniform(0.86, 1.14, (9, 1)), closed=True)
    return [Opacity(centre + outline, rng.uniform(0.26, 0.38))]


def _nodules(radiograph: Radiograph, shape: Anatomy) -> list[Opacity]:
    """Two to five round nodules, 2.5 to 4 % of the image's width; none where absent."""
    rng = _rng(radiograph, "Nodule")
    if rng is None:
        return []
    spots = []
    for _ in range(rng.integers(2, 6)):
        radius = rng.uniform(0.025, 0.04) / 2
        outline = ellipse(
            _place(rng, shape, radius), (radius, radius * rng.uniform(0.85, 1.0)), rng.uniform(0, np.pi), 16
        )
        spots.append(Opacity(outline, rng.uniform(0.30, 0.42)))
    return spots


def _pneumothorax(radiograph: Radiograph, shape: Anatomy) -> Pneumothorax | None:
    """The lung drawn off the chest wall, most at the apex; its edge is a thin line."""
    rng = _rng(radiograph, "Pneumothorax")
    if rng is None:
        return None
    side = SIDES[rng.integers(2)]
    lung, hilum = shape.lungs[side], shape.hila[side]
    collapse, down = rng.uniform(0.16, 0.34), rng.uniform(0.10, 0.22)
    lateral = np.clip((side * lung[:, 0] / shape.half_width - 0.30) / 0.30, 0, 1)
    upper = np.clip((down - lung[:, 1]) / 0.25, 0, 1)
    shrink = collapse * lateral * upper
    collapsed = lung + (hilum - lung) * shrink[:, None]
    parted = _longest_run(shrink > 0.01)
    line = collapsed[parted]
    return Pneumothorax(np.concatenate([lung[parted], line[::-1]]), line, rng.uniform(0.40, 0.55))


def _longest_run(chosen: np.ndarray) -> np.ndarray:
    """Indices of the longest run of true values on a closed curve, in its order."""
    start = int(np.argmin(chosen))  # begin outside a run
    order = np.roll(np.arange(len(chosen)), -start)
    runs = np.split(order, np.flatnonzero(np.diff(chosen[order].astype(int))) + 1)
    return max((run for run in runs if chosen[run[0]]), key=len)


def _reticulation(radiograph: Radiograph, shape: Anatomy) -> Reticulation | None:
    """A net of fine lines over the middle and lower zone of one lung or both."""
    rng = _rng(radiograph, "Reticulation")
    if rng is None:
        return None
    sides = SIDES if rng.random() < 0.5 else (SIDES[rng.integers(2)],)
    outlines = []
    for side in sides:
        centre = (side * rng.uniform(0.5, 0.7) * shape.half_width, rng.uniform(-0.02, 0.12))
        outlines.append(ellipse(centre, (rng.uniform(0.10, 0.16), rng.uniform(0.13, 0.22)), rng.uniform(-0.4, 0.4)))
    return Reticulation(outlines, rng.uniform(0.065, 0.095), (rng.uniform(), rng.uniform()))


def _devices(radiograph: Radiograph, shape: Anatomy) -> list[Device]:
    """One or two of: jugular catheter, subclavian catheter, gastric tube, chest tube, pacing lead."""
    rng = _rng(radiograph, "Support Devices")
    if rng is None:
        return []
    side, tip, dome = SIDES[rng.integers(2)], rng.uniform(-0.08, 0.03), shape.dome(LEFT)
    cava, stomach = (-0.15, tip), [(0.08, dome), (0.25, dome + 0.07), (0.48, dome + 0.10)]
    courses = (  # x over the thorax's half-width
        [(-0.26, -0.60), (-0.22, -0.40), (-0.13, -0.25), (-0.14, tip - 0.08), cava],
        [(1.35 * side, -0.20), (0.9 * side, -0.285), (0.45 * side, -0.285), (0.10 * side, -0.23), (-0.12, -0.17), cava],
        [(0.05, -0.60), (0.04, -0.30), (0.06, 0.00), *stomach],
        [(1.4 * side, 0.20), (1.0 * side, 0.12), (0.78 * side, -0.02), (0.6 * side, -0.20), (0.45 * side, -0.29)],
        [
            (0.9, -0.22),
            (0.6, -0.27),
            (0.1, -0.24),
            (-0.13, -0.15),
            (-0.16, -0.02),
            (-0.08, 0.11),
            (0.15, 0.17),
            (0.4, 0.16),
        ],
    )
    contrast = rng.uniform(0.45, 0.60)
    lines = []
    for k in rng.choice(len(courses), size=rng.integers(1, 3), replace=False):
        course = np.array(courses[k]) * (shape.half_width, 1)
        lines.append(Device(spline(course + rng.normal(0, 0.008, course.shape), samples=8), contrast))
    return lines
