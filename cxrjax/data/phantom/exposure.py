"""How one image was taken: pose, tube, film and what lay on the skin; nothing of it depends on the findings."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from cxrjax.data.phantom.anatomy import SIDES
from cxrjax.data.phantom.drawing import Points, ellipse
from cxrjax.data.phantom.population import Radiograph

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
