"""From a description to pixels: grey images and masks of the findings, at any size.

What is soft (tissue, lungs, bones) is drawn on grids of fixed size and enlarged or averaged; what is fine (vessels,
edges, lines, texture, noise) is drawn at the image's own size. So every size shows the same picture. Layers are
summed as grey levels of attenuation, then developed by the film's curve.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, UInt8

from cxrjax.data.phantom import lesions
from cxrjax.data.phantom.anatomy import LEFT, RIGHT, SIDES, Anatomy, Vessels, anatomy, vessels
from cxrjax.data.phantom.drawing import MESH_DENSITY, Film, Layer, Points, ellipse, grain, mesh
from cxrjax.data.phantom.population import Radiograph
from cxrjax.errors import CxrError
from cxrjax.findings import PHANTOM

_LETTERS = {
    1: [np.array([(-0.5, -1.0), (-0.5, 1.0), (0.6, 1.0)])],
    -1: [
        np.array([(-0.5, 1.0), (-0.5, -1.0), (0.2, -1.0), (0.55, -0.75), (0.55, -0.3), (0.2, 0.0), (-0.5, 0.0)]),
        np.array([(0.1, 0.0), (0.6, 1.0)]),
    ],
}  # L on the patient's left, R on the right


@dataclass(frozen=True)
class Exposure:
    """The circumstances of one image.

    Attributes:
      pose: affine map (2x3) from the patient's to the image's coordinates.
      gain: factor on the dose that reaches the film.
      gamma: exponent of the film's curve.
      noise: standard deviation of the quantum noise in grey levels at 1024 pixels.
      uneven: grey levels of a smooth field over the image.
      grain_origin: where the noise is cut from its bank.
      electrodes: outlines, in the patient's coordinates.
      marker: strokes of the side letter, in the image's coordinates.
      gastric_bubble: outline of the air in the stomach; None where it does not show.
      collimator: left, top, right and bottom of the exposed field in the image's coordinates; None for the whole.
    """

    pose: Float[np.ndarray, "2 3"]
    gain: float
    gamma: float
    noise: float
    uneven: Float32[np.ndarray, "4 4"]
    grain_origin: tuple[int, int]
    electrodes: list[Points]
    marker: list[Points]
    gastric_bubble: Points | None
    collimator: tuple[float, float, float, float] | None


def exposure(radiograph: Radiograph) -> Exposure:
    """The circumstances of a radiograph: a function of its exposure's seed and its view."""
    rng = np.random.default_rng([radiograph.exposure, 2])
    portable = radiograph.view == "AP"
    zoom = rng.uniform(0.90, 1.06) if portable else rng.uniform(0.86, 1.02)
    angle = np.deg2rad(rng.uniform(-6, 6))
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    pose = np.array([[c, -s, rng.uniform(-0.035, 0.035)], [s, c, rng.uniform(-0.035, 0.035)]])
    electrodes = [
        ellipse((rng.uniform(-0.42, 0.42), rng.uniform(-0.36, 0.25)), (0.0095, 0.0095), points=16)
        for _ in range(rng.integers(0, 4) if portable else rng.integers(0, 2))
    ]
    side = SIDES[rng.integers(2)]
    place = (side * rng.uniform(0.38, 0.44), rng.uniform(-0.44, -0.36))
    stomach = (rng.uniform(0.16, 0.22), rng.uniform(0.27, 0.31))
    bubble = ellipse(stomach, (rng.uniform(0.04, 0.08), rng.uniform(0.02, 0.04)))
    left, top, right, bottom = rng.uniform(0.465, 0.5, 4).tolist()
    return Exposure(
        pose=pose,
        gain=rng.uniform(0.90, 1.15),
        gamma=rng.uniform(0.80, 1.25),
        noise=rng.uniform(3.0, 6.5) * (1.3 if portable else 1.0),
        uneven=rng.normal(0, 6, (4, 4)).astype(np.float32),
        grain_origin=(int(rng.integers(512)), int(rng.integers(512))),
        electrodes=electrodes,
        marker=[0.03 * letter + place for letter in _LETTERS[side]],
        gastric_bubble=bubble if rng.random() < 0.6 else None,
        collimator=(-left, -top, right, bottom) if rng.random() < 0.4 else None,
    )


Grey = Float32[np.ndarray, "size size"]

COARSE, SOFT = 64, 256  # pixels of the grids on which tissue, and lungs and bones, are drawn
_CONTRAST = 255  # grey levels before the film's curve that become, in aerated lung, about the whole range
_UPRIGHT = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


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
    shape, taken, findings = _described(radiograph, size)
    soft, fine = Film(SOFT, taken.pose), Film(size, taken.pose)

    aeration = _aeration(soft, shape, findings)
    grey = _tissue(Film(COARSE, taken.pose), shape, taken)
    cv2.scaleAdd(aeration.astype(np.float32), -80 / 255, grey, grey)
    _add_bones(grey, soft, shape, aeration)
    _add_opacities(grey, soft, findings, taken)
    trunks, twigs = vessels(shape, radiograph.body)
    cv2.accumulate(soft.smooth(_vessels(soft, trunks, aeration, findings), 0.0022), grey)

    grey, air = _resize(grey, size), _resize(aeration, size)
    cv2.accumulate(_vessels(fine, twigs, air, findings), grey)
    cv2.accumulate(_edges(fine, shape, air), grey)
    if findings.reticulation:
        _add_mesh(grey, soft, findings.reticulation, aeration)
    cv2.accumulate(_lines(fine, findings, taken), grey)
    return _developed(grey, taken)


def masks(radiograph: Radiograph, size: int) -> dict[str, Bool[np.ndarray, "size size"]]:
    """Where each finding that is truly present lies.

    Cardiomegaly is the heart's shadow, pleural effusion the fluid, pneumothorax the air between lung and chest
    wall, reticulation its region within the lungs, support devices their lines, 1.2 % of the image wide.

    Args:
      radiograph: what is drawn.
      size: pixels along each side, at least 16.

    Returns:
      A mask for each finding of `PHANTOM` that is present, in that order.

    Raises:
      CxrError: if `size` is below 16.
    """
    shape, taken, found = _described(radiograph, size)
    film = Film(size, taken.pose)
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
        result["Pneumothorax"] = film.inside([found.pneumothorax.air])
    if found.reticulation:
        net = film.inside(found.reticulation.outlines) & film.inside(shape.lungs.values())
        result["Reticulation"] = net & ~heart & ~film.inside([shape.mediastinum])
    if found.devices:
        result["Support Devices"] = film.trace([device.line for device in found.devices], 0.012)
    return {finding: result[finding] > 0 for finding in PHANTOM if finding in result}


def _described(radiograph: Radiograph, size: int) -> tuple[Anatomy, Exposure, lesions.Findings]:
    if size < 16:
        raise CxrError(f"phantom: an image needs at least 16 pixels along each side, got {size}")
    shape = anatomy(radiograph)
    return shape, exposure(radiograph), lesions.findings(radiograph, shape)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < len(image) else cv2.INTER_CUBIC)


def _aeration(film: Film, shape: Anatomy, findings: lesions.Findings) -> Layer:
    """How much of the way through the chest is air: the lungs less heart, great vessels and fluid."""
    lungs = film.fill(film.blank(), shape.lungs.values(), 255)
    layer = lungs
    if findings.effusion:
        layer = cv2.min(lungs, film.fill(film.blank(255), findings.effusion.below.values(), 12))
    film.fill(layer, [shape.mediastinum], 20)
    film.fill(layer, [shape.heart], 26)
    return film.smooth(layer, 0.0035)


def _tissue(film: Film, shape: Anatomy, taken: Exposure) -> Grey:
    """Air, trunk, abdomen, spine, great vessels, heart, hila, arms and breasts, drawn coarsely, on the soft grid."""
    wide, top = shape.half_width, (shape.dome(RIGHT) + shape.dome(LEFT)) / 2 + 0.05
    bulk = np.array([(-1.1 * wide, top), (1.1 * wide, top), (1.2 * wide, 0.8), (-1.2 * wide, 0.8)])
    spine = np.array([(-0.045, -0.7), (0.045, -0.7), (0.055, 0.8), (-0.055, 0.8)])
    hila = [
        ellipse(centre + np.array([0.01 * side, 0.012]), (0.026, 0.05), -0.4 * side)
        for side, centre in shape.hila.items()
    ]
    total = film.blank(8)
    for blur, parts in (
        (0.012, [([shape.skin], 112)]),
        (0.016, [([spine], 20), ([shape.mediastinum], 14), (hila, 20), (shape.humeri, 20), (shape.breasts, 15)]),
        (0.030, [([shape.heart], 30)]),
        (0.050, [([bulk], 36)]),
    ):
        layer = film.blank()
        for contours, value in parts:
            cv2.add(layer, film.fill(film.blank(), contours, value), layer)
        cv2.add(total, film.smooth(layer, blur), total)
    if taken.gastric_bubble is not None:
        cv2.subtract(total, film.smooth(film.fill(film.blank(), [taken.gastric_bubble], 30), 0.008), total)
    grey = cv2.resize(total.astype(np.float32), (SOFT, SOFT), interpolation=cv2.INTER_CUBIC)
    return cv2.add(grey, cv2.resize(taken.uneven, (SOFT, SOFT), interpolation=cv2.INTER_CUBIC))


def _add_bones(grey: Grey, film: Film, shape: Anatomy, aeration: Layer) -> None:
    """Ribs, clavicles, arms and vertebrae brighten, the airway darkens."""
    bones = _through(aeration, film.fill(film.blank(), shape.ribs_behind, 4 * 20))
    cv2.add(bones, _through(aeration, film.fill(film.blank(), shape.ribs_front, 4 * 13)), bones)
    for contours, value in ((shape.clavicles, 24), (shape.vertebrae, 7), (shape.scapulae, 12), (shape.humeri, 12)):
        cv2.add(bones, film.fill(film.blank(), contours, 4 * value), bones)
    cv2.scaleAdd(film.smooth(bones, 0.003).astype(np.float32), 1 / 4, grey, grey)
    airway = film.stroke(film.blank(), shape.airway[:1], 0.030, 255)
    film.stroke(airway, shape.airway[1:], 0.020, 190)
    cv2.scaleAdd(film.smooth(airway, 0.005).astype(np.float32), -26 / 255, grey, grey)


def _through(air: Layer, layer: Layer) -> Layer:
    """A layer as it shows through: whole over aerated lung, three tenths of it over heart and abdomen."""
    return cv2.multiply(layer, cv2.convertScaleAbs(air, alpha=0.7, beta=77), scale=1 / 255)


def _add_opacities(grey: Grey, film: Film, findings: lesions.Findings, taken: Exposure) -> None:
    """Masses, nodules and electrodes brighten."""
    cv2.accumulate(film.fill(film.blank(), taken.electrodes, 40), grey)
    for spots, blur in ((findings.mass, 0.004), (findings.nodules, 0.003)):
        if spots:
            layer = film.blank()
            for spot in spots:
                film.fill(layer, [spot.outline], spot.contrast * 255)
            cv2.scaleAdd(film.smooth(layer, blur).astype(np.float32), _CONTRAST / 255, grey, grey)


def _vessels(film: Film, tree: Vessels, air: Layer, findings: lesions.Findings) -> Layer:
    """Vessels of the lung, where there is air around them and no pneumothorax."""
    layer = film.blank()
    for lines, width, contrast in tree:
        film.stroke(layer, lines, width, contrast * _CONTRAST)
    layer = cv2.multiply(layer, air, scale=1 / 255)
    if findings.pneumothorax:
        film.fill(layer, [findings.pneumothorax.air], 0)
    return layer


def _edges(film: Film, shape: Anatomy, air: Layer) -> Layer:
    """The cortex of the bones: thin brighter edges."""
    layer = film.blank()
    film.stroke(layer, shape.ribs_behind, 0.0022, 20, closed=True)
    film.stroke(layer, shape.ribs_front, 0.0022, 17, closed=True)
    layer = _through(air, layer)
    for contours, value in ((shape.clavicles, 24), (shape.scapulae, 14), (shape.humeri, 9), (shape.vertebrae, 5)):
        film.stroke(layer, contours, 0.003, value, closed=True)
    return layer


def _add_mesh(grey: Grey, film: Film, found: lesions.Reticulation, aeration: Layer) -> None:
    """Reticulation: texture of mean zero, where the region is aerated."""
    amount = film.smooth(film.fill(film.blank(), found.outlines, 255), 0.02)
    amount = _resize(cv2.multiply(amount, aeration, scale=1 / 255), len(grey)).astype(np.float32)
    top, left = (int(part * MESH_DENSITY) for part in found.origin)
    texture = _resize(mesh()[top : top + MESH_DENSITY, left : left + MESH_DENSITY], len(grey))
    cv2.scaleAdd(cv2.multiply(amount, texture), found.contrast * _CONTRAST / 255, grey, grey)


def _lines(film: Film, findings: lesions.Findings, taken: Exposure) -> Layer:
    """The pleural line, tubes, the electrodes' rims and the side marker."""
    layer = film.stroke(film.blank(), taken.electrodes, 0.004, 45, closed=True)
    for device in findings.devices:
        film.stroke(layer, [device.line], lesions.LINE_WIDTH, device.contrast * _CONTRAST)
    if findings.pneumothorax:
        contrast = findings.pneumothorax.contrast * _CONTRAST
        film.stroke(layer, [findings.pneumothorax.line], lesions.LINE_WIDTH, contrast)
    return Film(film.size, _UPRIGHT).stroke(layer, taken.marker, 0.006, 150)


def _developed(grey: Grey, taken: Exposure) -> Layer:
    """Noise, the film's curve, the collimator's border."""
    size = len(grey)
    noise = taken.noise * min(1, size / 1024) / 32  # what a larger pixel collects is noisy in proportion less
    image = cv2.addWeighted(grey, 1, _grain(size, taken.grain_origin), noise, 0, dtype=cv2.CV_8U)
    dose = np.arange(256) / 255 * taken.gain
    curve = ((1 - np.exp(-2 * dose)) / (1 - np.exp(-2))) ** taken.gamma
    image = cv2.LUT(image, np.rint(255 * curve).clip(0, 255).astype(np.uint8))
    if taken.collimator is not None:
        left, top, right, bottom = taken.collimator
        across, down = _covered(size, left, right), _covered(size, top, bottom)
        image = cv2.multiply(image, np.rint(255 * np.outer(down, across)).astype(np.uint8), scale=1 / 255)
    return image


def _covered(size: int, start: float, end: float) -> Float[np.ndarray, " size"]:
    """How much of each pixel of a row lies between two places, at least a little: scattered rays blacken no border."""
    edge = (np.arange(size + 1) / size - 0.5).clip(start, end)
    return np.maximum(np.diff(edge) * size, 0.06)


def _grain(size: int, origin: tuple[int, int]) -> Int8[np.ndarray, "size size"]:
    """A window of the bank of noise, which repeats where the image is larger."""
    bank = grain()
    repeats = -(-(size + 512) // len(bank))
    bank = np.tile(bank, (repeats, repeats)) if repeats > 1 else bank
    return bank[origin[0] : origin[0] + size, origin[1] : origin[1] + size]
