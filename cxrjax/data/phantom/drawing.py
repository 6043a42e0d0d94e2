"""Sub-pixel drawing in unit coordinates: curves, a canvas with lines of known width, and banks of noise.

A point is (x, y) in image widths, with the origin at the centre of the image and y downwards, so shapes do not depend
on the image size. Layers are uint8 grids on which OpenCV draws with anti-aliasing in fixed point.
"""

import functools
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int, Int8, UInt8

Points = Float[np.ndarray, "... n 2"]
Layer = UInt8[np.ndarray, "size size"]

_SHIFT = 6  # fractional bits of OpenCV's fixed-point coordinates
_THICKNESSES = (1, 2, 3, 5, 7, 9, 11, 13, 15, 19, 23, 27, 31)  # nominal line thicknesses of OpenCV to choose from


@functools.lru_cache(maxsize=256)
def _catmull_rom(points: int, samples: int, closed: bool) -> Float[np.ndarray, "m n"]:
    """Return the matrix from control points to the points of their Catmull-Rom spline."""
    segments = points if closed else points - 1
    t = np.arange(samples) / samples
    weights = 0.5 * np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], axis=1
    )
    matrix = np.zeros((segments * samples + (not closed), points))
    for segment in range(segments):
        for k in range(4):
            control = segment + k - 1
            control = control % points if closed else min(max(control, 0), points - 1)
            matrix[segment * samples : (segment + 1) * samples, control] += weights[:, k]
    if not closed:
        matrix[-1, -1] = 1
    return matrix


def spline(points: Points, *, closed: bool = False, samples: int = 6) -> Points:
    """Return a smooth curve through control points (Catmull-Rom), with `samples` points per segment."""
    return _catmull_rom(points.shape[-2], samples, closed) @ points


@functools.lru_cache(maxsize=1)
def _measure_line_widths() -> Float[np.ndarray, " thicknesses"]:
    """Measure the width in px of a line of each thickness: its total light across, divided by its brightness.

    OpenCV's anti-aliased lines are wider than nominal, by an amount that depends on its version.
    """
    widths = []
    for thickness in _THICKNESSES:
        layer = np.zeros((96, 96), np.uint8)
        ends = np.array([[-2000, 800], [8200, 5200]], np.int32)  # an oblique line across all columns
        cv2.polylines(layer, [ends], False, 255, thickness, cv2.LINE_AA, _SHIFT)
        slope = (ends[1, 1] - ends[0, 1]) / (ends[1, 0] - ends[0, 0])
        widths.append(layer[:, 32:64].sum() / 255 / 32 * np.cos(np.arctan(slope)))
    return np.array(widths)


class Canvas:
    """A grid of size x size px, on which a patient in a given pose is drawn.

    The pose is an affine map from the patient's to the image's unit coordinates.
    """

    def __init__(self, size: int, pose: Float[np.ndarray, "2 3"]):
        self.size = size
        self._linear = pose[:, :2].T * size * 2**_SHIFT
        self._offset = ((pose[:, 2] + 0.5) * size - 0.5) * 2**_SHIFT

    def blank(self, value: int = 0) -> Layer:
        """Return a new layer with one grey level."""
        return np.full((self.size, self.size), value, np.uint8)

    def pixels(self, points: Points) -> Int[np.ndarray, "... n 2"]:
        """Convert the patient's coordinates to OpenCV's fixed-point pixel coordinates."""
        return np.rint(points @ self._linear + self._offset).astype(np.int32)

    def _to_pixels(self, lines: Points | Iterable[Points]) -> Sequence[Int[np.ndarray, "n 2"]]:
        """Convert several lines to pixel coordinates, an array of them at once."""
        return list(self.pixels(lines)) if isinstance(lines, np.ndarray) else [self.pixels(line) for line in lines]

    def fill(self, layer: Layer, contours: Iterable[Points], value: float) -> Layer:
        """Fill each contour with `value`, anti-aliased."""
        for contour in self._to_pixels(contours):
            cv2.fillPoly(layer, [contour], float(value), cv2.LINE_AA, _SHIFT)
        return layer

    def stroke(
        self, layer: Layer, lines: Points | Sequence[Points], width: float, value: float, *, closed: bool = False
    ) -> Layer:
        """Draw lines, or the edges of closed contours, with a width in image widths.

        A line narrower than OpenCV's thinnest is drawn fainter instead, so its total light is the same at every size.
        """
        widths = _measure_line_widths()
        target = width * self.size
        k = int(np.argmax(1.5 * widths >= target)) if 1.5 * widths[-1] >= target else len(widths) - 1
        strength = value * min(target / widths[k], 1.5)
        cv2.polylines(layer, self._to_pixels(lines), closed, min(strength, 255.0), _THICKNESSES[k], cv2.LINE_AA, _SHIFT)
        return layer

    def inside(self, contours: Iterable[Points]) -> Layer:
        """Return a hard mask (0 or 255) of the union of contours, each with at least one pixel."""
        layer = self.blank()
        for contour in self._to_pixels(contours):
            cv2.fillPoly(layer, [contour], 255.0, cv2.LINE_8, _SHIFT)
        return layer

    def trace(self, lines: Sequence[Points], width: float) -> Layer:
        """Return a hard mask (0 or 255) of lines with a width in image widths, at least one pixel."""
        pixels = [np.rint(line / 2**_SHIFT).astype(np.int32) for line in self._to_pixels(lines)]
        return cv2.polylines(self.blank(), pixels, False, 255, max(1, round(width * self.size)))

    def smooth(self, layer: Layer, sigma: float) -> Layer:
        """Blur a layer with a Gaussian of `sigma` image widths, unless that is below a third of a pixel."""
        pixels = sigma * self.size
        return cv2.GaussianBlur(layer, (0, 0), pixels) if pixels > 1 / 3 else layer


def ellipse(
    centre: Sequence[float] | np.ndarray, radii: Sequence[float], angle: float = 0.0, points: int = 28
) -> Points:
    """Return the outline of an ellipse rotated by `angle` radians."""
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = radii[0] * np.cos(t), radii[1] * np.sin(t)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([centre[0] + c * x - s * y, centre[1] + s * x + c * y], axis=1)


def outline(lines: Points, width: float | Float[np.ndarray, "n 1"]) -> Points:
    """Return the outline of a band around each line: down one edge and back up the other."""
    along = np.empty_like(lines)
    along[..., 1:-1, :] = lines[..., 2:, :] - lines[..., :-2, :]
    along[..., 0, :], along[..., -1, :] = lines[..., 1, :] - lines[..., 0, :], lines[..., -1, :] - lines[..., -2, :]
    normal = along[..., ::-1] * (-0.5, 0.5) * width / np.hypot(along[..., :1], along[..., 1:])
    return np.concatenate([lines - normal, (lines + normal)[..., ::-1, :]], axis=-2)


@functools.lru_cache(maxsize=1)
def noise_bank() -> Int8[np.ndarray, "bank bank"]:
    """Return a bank of white noise with standard deviation 32, from which quantum noise is cut."""
    noise = np.random.default_rng(20180829).standard_normal((1536, 1536), np.float32) * 32
    return noise.clip(-127, 127).astype(np.int8)


MESH_DENSITY = 512  # pixels of the texture bank per image width
MESH_PERIOD = 6 / 256  # distance of the ridges in image widths


@functools.lru_cache(maxsize=1)
def mesh_texture() -> Float32[np.ndarray, "bank bank"]:
    """Return a tileable bank of reticular texture: a net of bright ridges about `MESH_PERIOD` apart.

    It consists of the zero crossings of band-passed noise, high-passed so that averaging over a few periods leaves
    nothing; mean 0, standard deviation 1.
    """
    side = 1024
    rng = np.random.default_rng(20201103)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * MESH_DENSITY * MESH_PERIOD
    noise = np.fft.rfft2(rng.standard_normal((side, side)))
    waves = np.fft.irfft2(noise * np.exp(-0.5 * ((frequency - 0.62) / 0.13) ** 2), s=(side, side))
    ridges = np.exp(-np.abs(waves / waves.std()) * 2)
    high_pass = np.exp(-((0.92 / np.maximum(frequency, 1e-6)) ** 6))
    texture = np.fft.irfft2(np.fft.rfft2(ridges) * high_pass, s=(side, side))
    return (texture / texture.std()).astype(np.float32)
