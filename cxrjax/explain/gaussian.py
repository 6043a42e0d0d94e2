"""The Gaussian that describes an effective receptive field: by its moments, and by least squares.

Luo et al., "Understanding the effective receptive field in deep convolutional neural networks" (2016), find gradients
to fall off like a Gaussian from the centre; their squares, which equation 1 averages, then do with sigma / sqrt(2).
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import optimize

from cxrjax.errors import CxrError

_SIDE = 256  # pixels of a larger map are averaged in blocks before the fit
_NARROWEST = 0.3  # px, the sigma that a fit starts from at least


@dataclass(frozen=True)
class Gaussian:
    """A two-dimensional Gaussian in the frame of a map, in px.

    Attributes:
      row: of the centre; 0 is the middle of the first row.
      column: likewise.
      major: standard deviation along the longer axis.
      minor: along the shorter one.
      angle: of the longer axis, in degrees from the direction of rising columns towards that of rising rows, in
        (-90, 90].
      explained: share of the map's variance over its pixels that the Gaussian explains; 1 is a perfect fit.
    """

    row: float
    column: float
    major: float
    minor: float
    angle: float
    explained: float

    def diameter(self, mass: float) -> float:
        """Of the disc that is as large as the ellipse which holds `mass` of the Gaussian, px."""
        return 2 * math.sqrt(2 * self.major * self.minor * -math.log1p(-mass)) if mass < 1 else math.inf


def by_moments(field: Float[np.ndarray, "H W"]) -> Gaussian:
    """The Gaussian with the map's mean and covariance, the map taken for a density on the centres of its pixels.

    Far pixels weigh by their squared distance, so that faint tails make it wide. `explained` is for the amplitude that
    explains most, and may be below 0.

    Raises:
      CxrError: a map that is negative, not finite or zero everywhere.
    """
    field = _checked(field)
    rows, columns = np.indices(field.shape, np.float64)
    share = field / field.sum()
    centre = np.array([(share * axis).sum() for axis in (rows, columns)])
    away = np.stack([rows - centre[0], columns - centre[1]], -1)
    covariance = np.einsum("hw,hwi,hwj->ij", share, away, away)
    if np.linalg.det(covariance) <= 0:  # on one line
        return _gaussian(centre, covariance, math.nan)
    shape = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", away, np.linalg.inv(covariance), away))
    return _gaussian(centre, covariance, _explained(field, shape * (field * shape).sum() / (shape**2).sum()))


def fitted(field: Float[np.ndarray, "H W"]) -> Gaussian:
    """The Gaussian nearest to the map, in the mean square over its pixels; amplitude, centre and both axes are free.

    It follows the bulk and leaves out faint tails, so it is narrower than `by_moments` where there are some. Maps of
    more than 256 px a side are averaged in blocks first, which is allowed for.

    Raises:
      CxrError: as in `by_moments`.
    """
    field = _checked(field)
    block = math.ceil(max(field.shape) / _SIDE)
    small = _averaged(field, block) / field.max()
    start = by_moments(small)
    rows, columns = np.indices(small.shape, np.float64)

    def shape(parameters: np.ndarray) -> np.ndarray:
        """A Gaussian of precision L L', L lower triangular with a positive diagonal."""
        amplitude, row, column, first, mixed, second = parameters
        dy, dx = rows - row, columns - column
        across, along = math.exp(first) * dy + mixed * dx, math.exp(second) * dx
        return amplitude * np.exp(-0.5 * (across**2 + along**2))

    begin = -math.log(max(math.sqrt(start.major * start.minor), _NARROWEST))
    peak = np.unravel_index(small.argmax(), small.shape)
    guess = np.array([small.max(), *peak, begin, 0.0, begin])
    result = optimize.least_squares(lambda parameters: (shape(parameters) - small).ravel(), guess, x_scale="jac")
    _, row, column, first, mixed, second = result.x
    lower = np.array([[math.exp(first), 0], [mixed, math.exp(second)]])
    covariance = np.linalg.inv(lower @ lower.T) * block**2 - np.eye(2) * (block**2 - 1) / 12  # a block's own variance
    centre = np.array([row, column]) * block + (block - 1) / 2
    return _gaussian(centre, covariance, _explained(small, shape(result.x)))


def _checked(field: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    field = np.asarray(field, np.float64)
    if not np.isfinite(field).all() or (field < 0).any() or not field.any():
        raise CxrError("a Gaussian describes a map that is finite, not negative, and not zero everywhere")
    return field


def _averaged(field: Float[np.ndarray, "H W"], block: int) -> Float[np.ndarray, "h w"]:
    """Means of blocks of block x block pixels; what does not fill a block at the lower and right edge is left out."""
    height, width = (side // block for side in field.shape)
    return field[: height * block, : width * block].reshape(height, block, width, block).mean((1, 3))


def _explained(field: np.ndarray, model: np.ndarray) -> float:
    spread = ((field - field.mean()) ** 2).sum()
    return float(1 - ((field - model) ** 2).sum() / spread) if spread else math.nan


def _gaussian(centre: np.ndarray, covariance: np.ndarray, explained: float) -> Gaussian:
    variances, axes = np.linalg.eigh(covariance)
    minor, major = np.sqrt(np.maximum(variances, 0))
    dy, dx = axes[:, 1]
    angle = 90 - (90 - math.degrees(math.atan2(dy, dx))) % 180  # an axis has no sign
    return Gaussian(float(centre[0]), float(centre[1]), float(major), float(minor), angle, explained)
