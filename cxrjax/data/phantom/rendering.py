"""From a description to pixels: grey images and masks of the findings, at any size.

What is soft (tissue, lungs, bones) is drawn on grids of fixed size and enlarged or averaged; what is fine (vessels,
edges, lines, texture, noise) is drawn at the image's own size. So every size shows the same picture.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, UInt8

from cxrjax.data.phantom import lesions
from cxrjax.data.phantom.anatomy import SIDES, Anatomy, anatomy, vessels
from cxrjax.data.phantom.drawing import MESH_DENSITY, Film, Layer, Points, band, ellipse, grain, mesh
from cxrjax.data.phantom.population import Radiograph
from cxrjax.errors import CxrError
from cxrjax.findings import PHANTOM

COARSE, SOFT = 64, 256  # pixels of the grids on which tissue, and lungs and bones, are drawn
_UPRIGHT = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
_CONTRAST = 0.6 * 255  # grey levels before the film's curve of a contrast of 1 in aerated lung
Grey = Float32[np.ndarray, "size size"]


@dataclass(frozen=True)
class Exposure:
    """How one image was taken: pose, tube and film; nothing of it depends on the findings."""

    pose: Float[np.ndarray, "2 3"]
    gain: float
    gamma: float
    noise: float
    uneven: Float32[np.ndarray, "4 4"]
    grain_origin: tuple[int, int]
    electrodes: list[Points]
    marker: tuple[str, float, float]
    gastric_bubble: Points | None
    collimator: Points | None


def exposure(radiograph: Radiograph) -> Exposure:
    """The circumstances of a radiograph: a function of its exposure's seed and its view."""
    rng = np.random.default_rng([radiograph.exposure, 2])
    portable = radiograph.view == "AP"
    zoom, angle = rng.uniform(0.90, 1.06) if portable else rng.uniform(0.86, 1.02), np.deg2rad(rng.uniform(-6, 6))
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    shift = rng.uniform(-0.035, 0.035, 2)
    electrodes = [
        ellipse((rng.uniform(-0.42, 0.42), rng.uniform(-0.36, 0.25)), (0.0115, 0.0115), points=16)
        for _ in range(rng.integers(0, 5) if portable else rng.integers(0, 2))
    ]
    side = SIDES[rng.integers(2)]
    marker = ("L" if side > 0 else "R", side * rng.uniform(0.38, 0.44), rng.uniform(-0.44, -0.36))
    bubble = rng.uniform((0.16, 0.27), (0.22, 0.31)), rng.uniform((0.04, 0.02), (0.08, 0.04))
    inset = rng.uniform(0.0, 0.035, 4)
    field = np.array([
        (-0.5 + inset[0], -0.5 + inset[1]), (0.5 - inset[2], -0.5 + inset[1]), (0.5 - inset[2], 0.5 - inset[3]),
        (-0.5 + inset[0], 0.5 - inset[3]),
    ])  # fmt: skip
    return Exposure(
        pose=np.array([[c, -s, shift[0]], [s, c, shift[1]]]),
        gain=rng.uniform(0.90, 1.15), gamma=rng.uniform(0.80, 1.25), noise=rng.uniform(3.0, 6.5) * (1.3 if portable else 1),
        uneven=rng.normal(0, 6, (4, 4)).astype(np.float32), grain_origin=(int(rng.integers(512)), int(rng.integers(512))),
        electrodes=electrodes, marker=marker, gastric_bubble=ellipse(*bubble) if rng.random() < 0.6 else None,
        collimator=field if rng.random() < 0.4 else None,
    )  # fmt: skip


def render(radiograph: Radiograph, size: int) -> UInt8[np.ndarray, "size size"]:
    """Draw a radiograph.

    The same description and size give the same bytes in every process; other sizes give the same picture.

    Args:
      radiograph: what to draw.
      size: pixels along each side, at least 16.

    Returns:
      Grey image: air dark, bone and fluid bright.

    Raises:
      CxrError: if `size` is below 16.
    """
    _check(size)
    shape, taken = anatomy(radiograph), exposure(radiograph)
    findings = _Findings(radiograph, shape)
    soft, fine = Film(SOFT, taken.pose), Film(size, taken.pose)

    aeration = _aeration(soft, shape, findings)
    grey = _tissue(Film(COARSE, taken.pose), shape, taken)
    cv2.scaleAdd(aeration.astype(np.float32), -78 / 255, grey, grey)
    _add_bones(grey, soft, shape)
    _add_opacities(grey, soft, findings)

    grey, air = _resize(grey, size), _resize(aeration, size)
    cv2.accumulate(_vessels(fine, shape, radiograph.body, air, findings), grey)
    _add_edges(grey, fine, shape)
    if findings.reticulation:
        _add_mesh(grey, soft, findings.reticulation, aeration)
    _add_lines(grey, fine, findings, taken)
    return _developed(grey, taken)


def masks(radiograph: Radiograph, size: int) -> dict[str, Bool[np.ndarray, "size size"]]:
    """Where each finding that is truly present lies.

    Cardiomegaly is the heart's shadow, pleural effusion the fluid, pneumothorax the air between lung and chest
    wall, reticulation its region within the lungs, support devices their lines, 1.2 % of the image wide.

    Args:
      radiograph: what is drawn.
      size: pixels along each side, at least 16.

    Raises:
      CxrError: if `size` is below 16.
    """
    _check(size)
    shape = anatomy(radiograph)
    film, found = Film(size, exposure(radiograph).pose), _Findings(radiograph, shape)
    heart = film.inside([shape.heart])
    result = {}
    if radiograph.shows("Cardiomegaly"):
        result["Cardiomegaly"] = heart
    if found.effusion:
        fluid = [film.inside([shape.lungs[s]]) & film.inside([below]) for s, below in found.effusion.below.items()]
        result["Pleural Effusion"] = np.bitwise_or.reduce(fluid) & ~heart
    if found.mass:
        result["Mass"] = film.inside(spot.outline for spot in found.mass)
    if found.nodules:
        result["Nodule"] = film.inside(spot.outline for spot in found.nodules)
    if found.pneumothorax:
        lung = film.inside([shape.lungs[found.pneumothorax.side]])
        result["Pneumothorax"] = lung & ~film.inside([found.pneumothorax.collapsed])
    if found.reticulation:
        net = film.inside(found.reticulation.outlines) & film.inside(shape.lungs.values())
        result["Reticulation"] = net & ~heart & ~film.inside([shape.mediastinum])
    if found.devices:
        courses = [film.pixels(device.line) for device in found.devices]
        lines = [np.rint(course / 64).astype(np.int32) for course in courses]
        result["Support Devices"] = cv2.polylines(film.blank(), lines, False, 255, max(1, round(0.012 * size)))
    return {finding: result[finding] > 0 for finding in PHANTOM if finding in result}


class _Findings:
    """All findings of a radiograph; None or empty where absent."""

    def __init__(self, radiograph: Radiograph, shape: Anatomy):
        self.effusion = lesions.effusion(radiograph, shape)
        self.mass = lesions.mass(radiograph, shape)
        self.nodules = lesions.nodules(radiograph, shape)
        self.pneumothorax = lesions.pneumothorax(radiograph, shape)
        self.reticulation = lesions.reticulation(radiograph, shape)
        self.devices = lesions.devices(radiograph, shape)


def _check(size: int) -> None:
    if size < 16:
        raise CxrError(f"phantom: an image needs at least 16 pixels along each side, got {size}")


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < len(image) else cv2.INTER_CUBIC)


def _aeration(film: Film, shape: Anatomy, findings: _Findings) -> Layer:
    """How much of the way through the chest is air: the lungs less heart, great vessels and fluid."""
    layer = film.fill(film.blank(), shape.lungs.values(), 255)
    if findings.effusion:
        film.fill(layer, findings.effusion.below.values(), 14)  # outside the lungs it is overwritten below
        outside = film.fill(film.blank(), shape.lungs.values(), 255)
        layer = cv2.min(layer, outside)
    film.fill(layer, [shape.mediastinum], 20)
    film.fill(layer, [shape.heart], 26)
    return film.smooth(layer, 0.0035)


def _tissue(film: Film, shape: Anatomy, taken: Exposure) -> Grey:
    """Air, trunk, abdomen, great vessels, heart and hila, on the soft grid."""
    w = shape.half_width
    dome = (shape.dome(SIDES[0]) + shape.dome(SIDES[1])) / 2
    bulk = np.array([(-1.1 * w, dome + 0.05), (1.1 * w, dome + 0.05), (1.2 * w, 0.8), (-1.2 * w, 0.8)])
    spine = np.array([(-0.045, -0.7), (0.045, -0.7), (0.055, 0.8), (-0.055, 0.8)])
    hila = [ellipse(hilum + (0, 0.015), (0.032, 0.055), -0.35 * side) for side, hilum in shape.hila.items()]
    parts = (
        ([shape.skin], 112, 0.012), ([bulk], 36, 0.05), ([spine], 20, 0.016), ([shape.mediastinum], 16, 0.014),
        ([shape.heart], 30, 0.030), (hila, 22, 0.016), (shape.arms[1::3] + shape.arms[2::3], 22, 0.02),
    )  # fmt: skip
    total = film.blank(8)
    for contours, value, blur in parts:
        cv2.add(total, film.smooth(film.fill(film.blank(), contours, value), blur), total)
    if taken.gastric_bubble is not None:
        cv2.subtract(total, film.smooth(film.fill(film.blank(), [taken.gastric_bubble], 30), 0.008), total)
    grey = cv2.resize(total.astype(np.float32), (SOFT, SOFT), interpolation=cv2.INTER_CUBIC)
    return cv2.add(grey, cv2.resize(taken.uneven, (SOFT, SOFT), interpolation=cv2.INTER_CUBIC))


def _add_bones(grey: Grey, film: Film, shape: Anatomy) -> None:
    """Ribs, clavicles, arms, vertebrae and breasts brighten, the airway darkens."""
    lower, upper = band(np.concatenate([shape.ribs_behind]), shape.rib_width)
    behind = np.concatenate([lower, upper[:, ::-1]], axis=1)
    lower, upper = band(shape.ribs_front, 1.15 * shape.rib_width)
    front = np.concatenate([lower, upper[:, ::-1]], axis=1)
    airway = film.stroke(film.blank(), shape.airway[:1], 0.030, 255)
    film.stroke(airway, shape.airway[1:], 0.020, 190)
    layers = [
        (film.fill(film.blank(), behind, 255), 17, 0.0025), (film.fill(film.blank(), front, 255), 13, 0.003),
        (film.fill(film.blank(), shape.clavicles, 255), 24, 0.003), (film.fill(film.blank(), shape.vertebrae, 255), 13, 0.004),
        (film.fill(film.blank(), shape.arms, 255), 18, 0.004), (airway, -26, 0.005),
    ]  # fmt: skip
    if shape.breasts:
        layers.append((film.fill(film.blank(), shape.breasts, 255), 17, 0.006))
    for layer, value, blur in layers:
        cv2.scaleAdd(film.smooth(layer, blur).astype(np.float32), value / 255, grey, grey)


def _add_opacities(grey: Grey, film: Film, findings: _Findings) -> None:
    """Masses and nodules brighten."""
    for spots, blur in ((findings.mass, 0.004), (findings.nodules, 0.003)):
        if spots:
            layer = film.blank()
            for spot in spots:
                film.fill(layer, [spot.outline], spot.contrast * 255)
            cv2.scaleAdd(film.smooth(layer, blur).astype(np.float32), _CONTRAST / 255, grey, grey)


def _vessels(film: Film, shape: Anatomy, seed: int, air: Layer, findings: _Findings) -> Layer:
    """The lung's vessels, where there is air around them and no pneumothorax."""
    layer = film.blank()
    for lines, width, light in reversed(vessels(shape, seed)):
        film.stroke(layer, lines, width, 0.45 * light)
    layer = cv2.multiply(film.smooth(layer, 0.0012), air, scale=1 / 255)
    if findings.pneumothorax:
        lung = film.fill(film.blank(), [shape.lungs[findings.pneumothorax.side]], 255)
        film.fill(lung, [findings.pneumothorax.collapsed], 0)
        layer = cv2.subtract(layer, lung)
    return layer


def _add_edges(grey: Grey, film: Film, shape: Anatomy) -> None:
    """The cortex of ribs, clavicles and shoulder blades: thin brighter edges."""
    layer = film.blank()
    for line, width in ((shape.ribs_behind, shape.rib_width), (shape.ribs_front, 1.15 * shape.rib_width)):
        lower, upper = band(line, width)
        film.stroke(layer, [*lower, *upper], 0.0022, 22)
    closed = [
        np.concatenate([outline, outline[:1]]) for outline in (*shape.clavicles, *shape.arms[::3], *shape.arms[1::3])
    ]
    film.stroke(layer, closed, 0.003, 30)
    plates = [np.concatenate([outline, outline[:1]]) for outline in shape.vertebrae]
    film.stroke(layer, plates, 0.002, 15)
    cv2.accumulate(layer, grey)


def _add_mesh(grey: Grey, film: Film, found: lesions.Reticulation, aeration: Layer) -> None:
    """Reticulation: texture of mean zero, where the region is aerated."""
    amount = film.smooth(film.fill(film.blank(), found.outlines, 255), 0.02)
    amount = _resize(cv2.multiply(amount, aeration, scale=1 / 255).astype(np.float32), len(grey))
    top, left = (int(part * MESH_DENSITY) for part in found.origin)
    texture = _resize(mesh()[top : top + MESH_DENSITY, left : left + MESH_DENSITY], len(grey))
    cv2.scaleAdd(cv2.multiply(amount, texture), found.contrast * _CONTRAST / 255, grey, grey)


def _add_lines(grey: Grey, film: Film, findings: _Findings, taken: Exposure) -> None:
    """The pleural line, tubes, electrodes and the side marker."""
    layer = film.blank()
    for electrode in taken.electrodes:
        film.fill(layer, [electrode], 60)
        film.stroke(layer, [np.concatenate([electrode, electrode[:1]])], 0.004, 45)
    thin = [(found.line, found.contrast) for found in findings.devices]
    if findings.pneumothorax:
        thin.append((findings.pneumothorax.line, findings.pneumothorax.contrast))
    for line, contrast in thin:
        film.stroke(layer, [line], lesions.LINE_WIDTH, contrast * _CONTRAST)
    letter, x, y = taken.marker
    upright = Film(film.size, _UPRIGHT)
    upright.stroke(layer, [stroke * 0.03 + (x, y) for stroke in _LETTERS[letter]], 0.006, 150)
    cv2.accumulate(layer, grey)


_LETTERS = {
    "L": [np.array([(-0.5, -1.0), (-0.5, 1.0), (0.6, 1.0)])],
    "R": [np.array([(-0.5, 1.0), (-0.5, -1.0), (0.2, -1.0), (0.55, -0.75), (0.55, -0.3), (0.2, 0.0), (-0.5, 0.0)]),
          np.array([(0.1, 0.0), (0.6, 1.0)])],
}  # fmt: skip


def _developed(grey: Grey, taken: Exposure) -> Layer:
    """Noise, the film's curve, the collimator's border."""
    size = len(grey)
    image = cv2.addWeighted(
        grey, 1, _grain(size, taken.grain_origin), taken.noise * min(1, size / 1024) / 32, 0, dtype=cv2.CV_8U
    )
    dose = np.arange(256) / 255 * taken.gain
    curve = ((1 - np.exp(-2 * dose)) / (1 - np.exp(-2))) ** taken.gamma
    image = cv2.LUT(image, np.rint(255 * curve).clip(0, 255).astype(np.uint8))
    if taken.collimator is not None:
        upright = Film(size, _UPRIGHT)
        field = upright.fill(upright.blank(12), [taken.collimator], 255)
        image = cv2.multiply(image, field, scale=1 / 255)
    return image


def _grain(size: int, origin: tuple[int, int]) -> Int8[np.ndarray, "size size"]:
    """A window of the bank of noise, which repeats where the image is larger."""
    bank = grain()
    repeats = -(-(size + 512) // len(bank))
    bank = np.tile(bank, (repeats, repeats)) if repeats > 1 else bank
    return bank[origin[0] : origin[0] + size, origin[1] : origin[1] + size]
