"""Render the grey image and the masks of a radiograph at any size.

Soft structures (tissue, lungs, bones) are drawn on grids of fixed size and resized; fine ones (vessels, edges, lines,
texture, noise) are drawn at the image size. So every size shows the same image. Layers are summed as attenuation in
grey levels and then mapped by the film's characteristic curve.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, UInt8

from cxrjax.data.phantom import lesions
from cxrjax.data.phantom.anatomy import LEFT, RIGHT, SIDES, Anatomy, Vessels, make_anatomy, make_vessels
from cxrjax.data.phantom.drawing import MESH_DENSITY, Canvas, Layer, Points, ellipse, mesh_texture, noise_bank
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
    """Pose, exposure and accessories of one image.

    Attributes:
      pose: affine map (2x3) from the patient's to the image's unit coordinates.
      gain: factor on the dose.
      gamma: exponent of the film's characteristic curve.
      noise: standard deviation of the quantum noise in grey levels at 1024 px.
      uneven: grey levels of a smooth field over the image.
      noise_origin: row and column of the cut from the noise bank.
      electrodes: outlines in the patient's coordinates.
      marker: strokes of the side letter in the image's coordinates.
      gastric_bubble: outline of the air in the stomach, if visible.
      collimator: left, top, right and bottom of the exposed field in the image's coordinates; None if uncollimated.
    """

    pose: Float[np.ndarray, "2 3"]
    gain: float
    gamma: float
    noise: float
    uneven: Float32[np.ndarray, "4 4"]
    noise_origin: tuple[int, int]
    electrodes: list[Points]
    marker: list[Points]
    gastric_bubble: Points | None
    collimator: tuple[float, float, float, float] | None


def make_exposure(radiograph: Radiograph) -> Exposure:
    """Make the exposure of a radiograph from its seed and its view."""
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
    marker = (side * rng.uniform(0.38, 0.44), rng.uniform(-0.44, -0.36))
    stomach = (rng.uniform(0.16, 0.22), rng.uniform(0.27, 0.31))
    bubble = ellipse(stomach, (rng.uniform(0.04, 0.08), rng.uniform(0.02, 0.04)))
    left, top, right, bottom = rng.uniform(0.465, 0.5, 4).tolist()
    return Exposure(
        pose=pose,
        gain=rng.uniform(0.90, 1.15),
        gamma=rng.uniform(0.80, 1.25),
        noise=rng.uniform(3.0, 6.5) * (1.3 if portable else 1.0),
        uneven=rng.normal(0, 6, (4, 4)).astype(np.float32),
        noise_origin=(int(rng.integers(512)), int(rng.integers(512))),
        electrodes=electrodes,
        marker=[0.03 * letter + marker for letter in _LETTERS[side]],
        gastric_bubble=bubble if rng.random() < 0.6 else None,
        collimator=(-left, -top, right, bottom) if rng.random() < 0.4 else None,
    )


Grey = Float32[np.ndarray, "size size"]

COARSE, SOFT = 64, 256  # grid sizes in px for tissue, and for lungs and bones
_CONTRAST = 255  # grey levels before the curve that become about the whole range in aerated lung
_UPRIGHT = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def render(radiograph: Radiograph, size: int) -> UInt8[np.ndarray, "size size"]:
    """Render a radiograph of size x size px; deterministic, and the same image at every size.

    Raises:
      CxrError: `size` is below 16.
    """
    anatomy, exposure, findings = _make_scene(radiograph, size)
    soft_canvas, fine_canvas = Canvas(SOFT, exposure.pose), Canvas(size, exposure.pose)

    aeration = _draw_aeration(soft_canvas, anatomy, findings)
    grey = _draw_tissue(Canvas(COARSE, exposure.pose), anatomy, exposure)
    cv2.scaleAdd(aeration.astype(np.float32), -80 / 255, grey, grey)
    _add_bones(grey, soft_canvas, anatomy, aeration)
    _add_opacities(grey, soft_canvas, findings, exposure)
    trunks, twigs = make_vessels(anatomy, radiograph.body)
    cv2.accumulate(soft_canvas.smooth(_draw_vessels(soft_canvas, trunks, aeration, findings), 0.0022), grey)

    grey, air = _resize(grey, size), _resize(aeration, size)
    cv2.accumulate(_draw_vessels(fine_canvas, twigs, air, findings), grey)
    cv2.accumulate(_draw_cortex(fine_canvas, anatomy, air), grey)
    if findings.reticulation:
        _add_mesh(grey, soft_canvas, findings.reticulation, aeration)
    cv2.accumulate(_draw_lines(fine_canvas, findings, exposure), grey)
    return _develop(grey, exposure)


def render_masks(radiograph: Radiograph, size: int) -> dict[str, Bool[np.ndarray, "size size"]]:
    """Render the masks of the findings that are truly present, in the order of `PHANTOM`.

    The mask of cardiomegaly is the heart's shadow, of pleural effusion the fluid, of pneumothorax the air between lung
    and chest wall, of reticulation its region within the lungs, of support devices lines 1.2 % of the image wide.

    Raises:
      CxrError: `size` is below 16.
    """
    anatomy, exposure, findings = _make_scene(radiograph, size)
    canvas = Canvas(size, exposure.pose)
    heart = canvas.inside([anatomy.heart])
    masks = {}
    if radiograph.shows("Cardiomegaly"):
        masks["Cardiomegaly"] = heart
    if findings.effusion:
        fluid = [canvas.inside([anatomy.lungs[s]]) & canvas.inside([below]) for s, below in findings.effusion.items()]
        masks["Pleural Effusion"] = np.bitwise_or.reduce(fluid) & ~heart
    if findings.mass:
        masks["Mass"] = canvas.inside(spot.points for spot in findings.mass)
    if findings.nodules:
        masks["Nodule"] = canvas.inside(spot.points for spot in findings.nodules)
    if findings.pneumothorax:
        masks["Pneumothorax"] = canvas.inside([findings.pneumothorax.air])
    if findings.reticulation:
        net = canvas.inside(findings.reticulation.outlines) & canvas.inside(anatomy.lungs.values())
        masks["Reticulation"] = net & ~heart & ~canvas.inside([anatomy.mediastinum])
    if findings.devices:
        masks["Support Devices"] = canvas.trace([device.points for device in findings.devices], 0.012)
    return {finding: masks[finding] > 0 for finding in PHANTOM if finding in masks}


def _make_scene(radiograph: Radiograph, size: int) -> tuple[Anatomy, Exposure, lesions.Findings]:
    if size < 16:
        raise CxrError(f"phantom: the image size must be at least 16 px, got {size}")
    anatomy = make_anatomy(radiograph)
    return anatomy, make_exposure(radiograph), lesions.make_findings(radiograph, anatomy)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < len(image) else cv2.INTER_CUBIC)


def _draw_aeration(canvas: Canvas, anatomy: Anatomy, findings: lesions.Findings) -> Layer:
    """Draw the aerated fraction along each ray: the lungs without heart, great vessels and fluid."""
    lungs = canvas.fill(canvas.blank(), anatomy.lungs.values(), 255)
    layer = lungs
    if findings.effusion:
        layer = cv2.min(lungs, canvas.fill(canvas.blank(255), findings.effusion.values(), 12))
    canvas.fill(layer, [anatomy.mediastinum], 20)
    canvas.fill(layer, [anatomy.heart], 26)
    return canvas.smooth(layer, 0.0035)


def _draw_tissue(canvas: Canvas, anatomy: Anatomy, exposure: Exposure) -> Grey:
    """Draw trunk, abdomen, spine, great vessels, heart, hila, arms and breasts on a coarse grid and resize."""
    width, top = anatomy.half_width, (anatomy.dome(RIGHT) + anatomy.dome(LEFT)) / 2 + 0.05
    abdomen = np.array([(-1.1 * width, top), (1.1 * width, top), (1.2 * width, 0.8), (-1.2 * width, 0.8)])
    spine = np.array([(-0.045, -0.7), (0.045, -0.7), (0.055, 0.8), (-0.055, 0.8)])
    hila = [
        ellipse(centre + np.array([0.01 * side, 0.012]), (0.026, 0.05), -0.4 * side)
        for side, centre in anatomy.hila.items()
    ]
    total = canvas.blank(8)
    for blur, shapes in (
        (0.012, [([anatomy.skin], 112)]),
        (0.016, [([spine], 20), ([anatomy.mediastinum], 14), (hila, 20), (anatomy.humeri, 20), (anatomy.breasts, 15)]),
        (0.030, [([anatomy.heart], 30)]),
        (0.050, [([abdomen], 36)]),
    ):
        layer = canvas.blank()
        for contours, value in shapes:
            cv2.add(layer, canvas.fill(canvas.blank(), contours, value), layer)
        cv2.add(total, canvas.smooth(layer, blur), total)
    if exposure.gastric_bubble is not None:
        cv2.subtract(total, canvas.smooth(canvas.fill(canvas.blank(), [exposure.gastric_bubble], 30), 0.008), total)
    grey = cv2.resize(total.astype(np.float32), (SOFT, SOFT), interpolation=cv2.INTER_CUBIC)
    return cv2.add(grey, cv2.resize(exposure.uneven, (SOFT, SOFT), interpolation=cv2.INTER_CUBIC))


def _add_bones(grey: Grey, canvas: Canvas, anatomy: Anatomy, aeration: Layer) -> None:
    """Add ribs, clavicles, arms and vertebrae, and subtract the airway."""
    bones = _shade(aeration, canvas.fill(canvas.blank(), anatomy.posterior_ribs, 4 * 20))
    cv2.add(bones, _shade(aeration, canvas.fill(canvas.blank(), anatomy.anterior_ribs, 4 * 13)), bones)
    others = ((anatomy.clavicles, 24), (anatomy.vertebrae, 7), (anatomy.scapulae, 12), (anatomy.humeri, 12))
    for contours, value in others:
        cv2.add(bones, canvas.fill(canvas.blank(), contours, 4 * value), bones)
    cv2.scaleAdd(canvas.smooth(bones, 0.003).astype(np.float32), 1 / 4, grey, grey)
    airway = canvas.stroke(canvas.blank(), anatomy.airway[:1], 0.030, 255)
    canvas.stroke(airway, anatomy.airway[1:], 0.020, 190)
    cv2.scaleAdd(canvas.smooth(airway, 0.005).astype(np.float32), -26 / 255, grey, grey)


def _shade(air: Layer, layer: Layer) -> Layer:
    """Attenuate a layer outside the lungs: full over aerated lung, three tenths over heart and abdomen."""
    return cv2.multiply(layer, cv2.convertScaleAbs(air, alpha=0.7, beta=77), scale=1 / 255)


def _add_opacities(grey: Grey, canvas: Canvas, findings: lesions.Findings, exposure: Exposure) -> None:
    """Add masses, nodules and electrodes."""
    cv2.accumulate(canvas.fill(canvas.blank(), exposure.electrodes, 40), grey)
    for spots, blur in ((findings.mass, 0.004), (findings.nodules, 0.003)):
        if spots:
            layer = canvas.blank()
            for spot in spots:
                canvas.fill(layer, [spot.points], spot.contrast * 255)
            cv2.scaleAdd(canvas.smooth(layer, blur).astype(np.float32), _CONTRAST / 255, grey, grey)


def _draw_vessels(canvas: Canvas, tree: Vessels, air: Layer, findings: lesions.Findings) -> Layer:
    """Draw vessels of the lung where they are surrounded by air, but not in a pneumothorax."""
    layer = canvas.blank()
    for lines, width, contrast in tree:
        canvas.stroke(layer, lines, width, contrast * _CONTRAST)
    layer = cv2.multiply(layer, air, scale=1 / 255)
    if findings.pneumothorax:
        canvas.fill(layer, [findings.pneumothorax.air], 0)
    return layer


def _draw_cortex(canvas: Canvas, anatomy: Anatomy, air: Layer) -> Layer:
    """Draw the cortex of the bones: thin bright edges."""
    layer = canvas.blank()
    canvas.stroke(layer, anatomy.posterior_ribs, 0.0022, 20, closed=True)
    canvas.stroke(layer, anatomy.anterior_ribs, 0.0022, 17, closed=True)
    layer = _shade(air, layer)
    others = ((anatomy.clavicles, 24), (anatomy.scapulae, 14), (anatomy.humeri, 9), (anatomy.vertebrae, 5))
    for contours, value in others:
        canvas.stroke(layer, contours, 0.003, value, closed=True)
    return layer


def _add_mesh(grey: Grey, canvas: Canvas, reticulation: lesions.Reticulation, aeration: Layer) -> None:
    """Add the texture of reticulation where its region is aerated."""
    amount = canvas.smooth(canvas.fill(canvas.blank(), reticulation.outlines, 255), 0.02)
    amount = _resize(cv2.multiply(amount, aeration, scale=1 / 255), len(grey)).astype(np.float32)
    top, left = (int(offset * MESH_DENSITY) for offset in reticulation.origin)
    texture = _resize(mesh_texture()[top : top + MESH_DENSITY, left : left + MESH_DENSITY], len(grey))
    cv2.scaleAdd(cv2.multiply(amount, texture), reticulation.contrast * _CONTRAST / 255, grey, grey)


def _draw_lines(canvas: Canvas, findings: lesions.Findings, exposure: Exposure) -> Layer:
    """Draw the pleural line, tubes, the rims of electrodes and the side marker."""
    layer = canvas.stroke(canvas.blank(), exposure.electrodes, 0.004, 45, closed=True)
    for device in findings.devices:
        canvas.stroke(layer, [device.points], lesions.LINE_WIDTH, device.contrast * _CONTRAST)
    if findings.pneumothorax:
        contrast = findings.pneumothorax.contrast * _CONTRAST
        canvas.stroke(layer, [findings.pneumothorax.line], lesions.LINE_WIDTH, contrast)
    return Canvas(canvas.size, _UPRIGHT).stroke(layer, exposure.marker, 0.006, 150)


def _develop(grey: Grey, exposure: Exposure) -> Layer:
    """Apply noise, the film's curve and the collimator."""
    size = len(grey)
    noise = exposure.noise * min(1, size / 1024) / 32  # larger pixels are less noisy
    image = cv2.addWeighted(grey, 1, _cut_noise(size, exposure.noise_origin), noise, 0, dtype=cv2.CV_8U)
    dose = np.arange(256) / 255 * exposure.gain
    curve = ((1 - np.exp(-2 * dose)) / (1 - np.exp(-2))) ** exposure.gamma
    image = cv2.LUT(image, np.rint(255 * curve).clip(0, 255).astype(np.uint8))
    if exposure.collimator is not None:
        left, top, right, bottom = exposure.collimator
        across, down = _coverage(size, left, right), _coverage(size, top, bottom)
        image = cv2.multiply(image, np.rint(255 * np.outer(down, across)).astype(np.uint8), scale=1 / 255)
    return image


def _coverage(size: int, start: float, end: float) -> Float[np.ndarray, " size"]:
    """Return the fraction of each pixel of a row between two positions, with a minimum for scattered radiation."""
    edge = (np.arange(size + 1) / size - 0.5).clip(start, end)
    return np.maximum(np.diff(edge) * size, 0.06)


def _cut_noise(size: int, origin: tuple[int, int]) -> Int8[np.ndarray, "size size"]:
    """Cut a window from the noise bank, which is tiled for larger images."""
    bank = noise_bank()
    repeats = -(-(size + 512) // len(bank))
    bank = np.tile(bank, (repeats, repeats)) if repeats > 1 else bank
    return bank[origin[0] : origin[0] + size, origin[1] : origin[1] + size]
