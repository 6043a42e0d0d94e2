"""Effective receptive fields: how strongly each pixel influences the central position of a feature map.

Haque et al., "Effect of image resolution on automated classification of chest X-rays", equation 1, after Luo et al.,
"Understanding the effective receptive field in deep convolutional neural networks" (2016).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8
from scipy import optimize

from cxrjax.errors import CxrError
from cxrjax.explain.inputs import batches, check_images, feature_map, mesh_shape, put_images, use_mesh
from cxrjax.models.input_spec import prepare
from cxrjax.models.layers import param_dtype
from cxrjax.models.network import Network

Estimator = Literal["exact", "probe", "sum"]
TWO_SIGMA = 0.9545


@dataclass(frozen=True)
class ERF:
    """An effective receptive field and its size.

    Attributes:
      map: not negative; (features per grey value, black 0 to white 1) squared.
      area_fraction: fraction of the image area that holds `mass` of the map, see `erf_size`.
      diameter: diameter of the disc of that area, px.
      mass: fraction of the map's sum.
      layer: name of the feature map.
      position: row and column in the feature map.
      channels: channels of the feature map.
      passes: backward passes per image.
    """

    map: Float[np.ndarray, "H W"]
    area_fraction: float
    diameter: float
    mass: float
    layer: str
    position: tuple[int, int]
    channels: int
    passes: int


def measure(
    network: Network,
    images: UInt8[np.ndarray, "N H W 1"],
    *,
    estimator: Estimator = "probe",
    probes: int = 16,
    layer: str | None = None,
    translate: float = 0.25,
    mass: float = TWO_SIGMA,
    seed: int = 0,
    batch_size: int = 1,
    parallel: int | None = None,
    mesh: Mesh | None = None,
    advance: Callable[[int], None] | None = None,
) -> ERF:
    """Measure the effective receptive field of a feature map's central position, with the network in evaluation mode.

    Equation 1: ERF(p, q) = 1/(K N) sum over channels k and images i of (d f^k(x_i, u, v) / d x_i(p, q))^2, with
    (u, v) the centre (h // 2, w // 2) of the map. x_i(p, q) is the grey value between black 0 and white 1, before it is
    normalised and repeated to the network's channels. The gradient has the network's compute type; it is summed in
    float32 over passes that run in parallel and in float64 over the rest.

    Args:
      network: a trained network.
      images: grey images of the size that the network is used at.
      estimator: `exact`: one backward pass per channel. `probe`: passes of the channels' sum with random signs, whose
        mean square is an unbiased estimate of `exact`. `sum`: one pass of the channels' plain sum ("one gradient per
        image"), whose square includes products of different channels, so it estimates another quantity.
      probes: random passes per image, for `probe`.
      layer: name of the feature map; default: the last.
      translate: images are shifted at random, vertically and horizontally, by up to this fraction of their sides and
        filled with black.
      mass: fraction of the map's sum that its size refers to; 0.9545 is two sigma.
      seed: seed of the shifts and the random signs.
      batch_size: images per batch on each device, or on each group of devices that shares the rows of an image.
      parallel: backward passes per image that run in parallel; memory grows with `batch_size * parallel`. Default: as
        many as make 2^20 pixels: 16 for one image of 256 x 256, and 1 from 1024 x 1024.
      mesh: devices over which images and their rows are sharded, and where the network is; default: one device.
      advance: called with the number of finished backward passes; there are `passes` per image.

    Raises:
      CxrError: an option is out of range, the feature map does not exist, the images have a wrong format, or the
        gradient is zero everywhere.
    """
    _check(estimator, probes, translate, mass)
    images = check_images(images)
    name, shape = feature_map(network, images, layer)
    channels, position = shape[3], (shape[1] // 2, shape[2] // 2)
    passes = {"exact": channels, "probe": probes, "sum": 1}[estimator]
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    data, space = mesh_shape(mesh)
    chunk = min(parallel or max(2**20 * space // (batch_size * images[0].size), 1), passes)
    total = np.zeros(images.shape[1:3], np.float64)
    for batch, index in batches(images, batch_size * data):
        shifted = put_images(mesh, random_shift(batch, translate, rng))
        for start in range(0, passes, chunk):
            numbers = np.arange(start, start + chunk, dtype=np.int32)
            numbers[numbers >= passes] = -1  # padding: all chunks have one size
            with use_mesh(mesh):
                sums = _squared_gradients(network, shifted, index, numbers, key, layer=name, estimator=estimator)
            total += np.asarray(sums)
            if advance is not None:
                advance(int((index >= 0).sum() * (numbers >= 0).sum()))
    # Each pass of `probe` estimates the whole sum over channels; the passes of `exact` are its terms.
    terms = channels * len(images) * (probes if estimator == "probe" else 1)
    field = total / terms
    area, diameter = erf_size(field, mass)
    return ERF(field, area, diameter, mass, name, position, channels, passes)


def erf_size(field: Float[np.ndarray, "H W"], mass: float = TWO_SIGMA) -> tuple[float, float]:
    """Return the size of the smallest set of pixels that holds a fraction `mass` (above 0 to 1) of a map's sum.

    It is the set's area as a fraction of the map's, and the diameter of the disc of that area in px, 2 sqrt(area / pi).
    For an isotropic Gaussian the area is 2 pi sigma^2 ln(1/(1 - mass)).

    Raises:
      CxrError: the map is negative, not finite or zero everywhere, or `mass` is out of range.
    """
    field = np.asarray(field, np.float64)
    if not 0 < mass <= 1:
        raise CxrError(f"mass must be above 0 and at most 1, not {mass}")
    if not np.isfinite(field).all() or (field < 0).any():
        raise CxrError("a receptive field must be finite and not negative everywhere: are the weights finite?")
    if not field.any():
        raise CxrError("the receptive field is zero everywhere: no gradient reaches the image (all units dead?)")
    ordered = np.sort(field, axis=None)[::-1]
    held = np.cumsum(ordered / ordered[0])
    pixels = int(np.searchsorted(held, mass * held[-1] * (1 - 1e-12))) + 1
    return pixels / field.size, 2 * np.sqrt(pixels / np.pi)


def random_shift(
    images: UInt8[np.ndarray, "N H W 1"], fraction: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "N H W 1"]:
    """Shift each image by whole pixels, uniformly up to `fraction` of its height and width, and fill with black."""
    height, width = images.shape[1:3]
    limits = int(height * fraction), int(width * fraction)
    shifted = np.zeros_like(images)
    for target, image in zip(shifted, images, strict=True):
        dy, dx = (int(rng.integers(-limit, limit + 1)) for limit in limits)
        target[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = image[
            max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
        ]
    return shifted


@partial(jax.jit, static_argnames=("layer", "estimator"))
def _squared_gradients(
    network: Network,
    images: UInt8[Array, "B H W 1"],
    index: Int32[Array, " B"],
    numbers: Int32[Array, " P"],
    key: PRNGKeyArray,
    *,
    layer: str,
    estimator: Estimator,
) -> Float[Array, "H W"]:
    """Sum squared gradients over images (`index`) and backward passes (`numbers`), where -1 is padding.

    A compiled loop over all passes would save the forward pass of each call, but XLA runs convolutions inside loops
    many times slower on CPUs.
    """
    wide = param_dtype(network.dtype)
    prepared = prepare(images, network.input_spec, network.dtype)
    black, white = prepare(jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1), network.input_spec, wide)
    contrast = (white - black)[None]  # of one unit of grey, per input channel

    def at_centre(grey: Float[Array, "B H W 1"]) -> Float[Array, "B K"]:
        """Return the central features of the images plus `grey`, which is zero and only there for its gradient."""
        maps = network.model().features(prepared + (grey * contrast).astype(network.dtype))[layer]
        return maps[:, maps.shape[1] // 2, maps.shape[2] // 2].astype(wide)

    features, backward = jax.vjp(at_centre, jnp.zeros(images.shape, wide))

    def gradient(number: Int32[Array, ""]) -> Float[Array, "B H W 1"]:
        """Return the gradient of the combination of channels of pass `number`."""
        if estimator == "exact":
            one = jax.nn.one_hot(number, features.shape[1], dtype=jnp.int32)
            chosen = jnp.broadcast_to(one, features.shape)
        elif estimator == "probe":
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), number))(index)
            chosen = jax.vmap(lambda key: jax.random.rademacher(key, features.shape[1:], jnp.int32))(keys)
        else:
            chosen = jnp.ones(features.shape, jnp.int32)
        used = (index >= 0) & (number >= 0)
        return backward(jnp.where(used[:, None], chosen, 0).astype(wide))[0]

    return jnp.square(jax.vmap(gradient)(numbers)).sum((0, 1, 4))


def _check(estimator: str, probes: int, translate: float, mass: float) -> None:
    if estimator not in get_args(Estimator):
        raise CxrError(f"no estimator {estimator!r}; choose one of {', '.join(get_args(Estimator))}")
    if probes < 1 or not 0 <= translate < 1 or not 0 < mass <= 1:
        raise CxrError(
            f"out of range: probes ({probes}) must be at least 1, translate ({translate}) in [0, 1), "
            f"mass ({mass}) above 0 and at most 1"
        )


_SIDE = 256  # larger maps are averaged in blocks before the fit
_SMALLEST_SIGMA = 0.3  # px, initial value of a fit


@dataclass(frozen=True)
class Gaussian:
    """A two-dimensional Gaussian fitted to a map; lengths in px.

    Attributes:
      row, column: of the centre; 0 is the middle of the first row or column.
      major, minor: standard deviations along the longer and the shorter axis.
      angle: angle of the longer axis, in degrees from increasing columns towards increasing rows, in (-90, 90].
      explained: fraction of the map's variance over its pixels that the Gaussian explains; 1 is a perfect fit.
    """

    row: float
    column: float
    major: float
    minor: float
    angle: float
    explained: float

    def diameter(self, mass: float) -> float:
        """Return the diameter, px, of the disc with the area of the ellipse that holds `mass` of the Gaussian."""
        return 2 * math.sqrt(2 * self.major * self.minor * -math.log1p(-mass)) if mass < 1 else math.inf


def fit_moments(field: Float[np.ndarray, "H W"]) -> Gaussian:
    """Fit a Gaussian by moments: the mean and covariance of the map, taken as a density at its pixel centres.

    Pixels weigh by their squared distance, so faint tails widen the Gaussian. `explained` is for the best amplitude;
    it may be negative.

    Raises:
      CxrError: the map is negative, not finite or zero everywhere.
    """
    field = _check_field(field)
    rows, columns = np.indices(field.shape, np.float64)
    share = field / field.sum()
    centre = np.array([(share * axis).sum() for axis in (rows, columns)])
    away = np.stack([rows - centre[0], columns - centre[1]], -1)
    covariance = np.einsum("hw,hwi,hwj->ij", share, away, away)
    if np.linalg.det(covariance) <= 0:  # on one line
        return _gaussian(centre, covariance, math.nan)
    shape = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", away, np.linalg.inv(covariance), away))
    return _gaussian(centre, covariance, _explained(field, shape * (field * shape).sum() / (shape**2).sum()))


def fit_least_squares(field: Float[np.ndarray, "H W"]) -> Gaussian:
    """Fit a Gaussian by least squares over the pixels; amplitude, centre and both axes are free.

    Faint tails have little influence, so it is narrower than that of `fit_moments` if there are some. Maps of more than
    256 px a side are averaged in blocks first; the result is corrected for this.

    Raises:
      CxrError: see `fit_moments`.
    """
    field = _check_field(field)
    block = math.ceil(max(field.shape) / _SIDE)
    small = _block_means(field, block) / field.max()
    start = fit_moments(small)
    rows, columns = np.indices(small.shape, np.float64)

    def shape(parameters: np.ndarray) -> np.ndarray:
        """Return a Gaussian of precision L L', with L lower triangular with a positive diagonal."""
        amplitude, row, column, first, mixed, second = parameters
        dy, dx = rows - row, columns - column
        across, along = math.exp(first) * dy + mixed * dx, math.exp(second) * dx
        return amplitude * np.exp(-0.5 * (across**2 + along**2))

    log_scale = -math.log(max(math.sqrt(start.major * start.minor), _SMALLEST_SIGMA))
    peak = np.unravel_index(small.argmax(), small.shape)
    guess = np.array([small.max(), *peak, log_scale, 0.0, log_scale])
    result = optimize.least_squares(lambda parameters: (shape(parameters) - small).ravel(), guess, x_scale="jac")
    _, row, column, first, mixed, second = result.x
    lower = np.array([[math.exp(first), 0], [mixed, math.exp(second)]])
    covariance = np.linalg.inv(lower @ lower.T) * block**2 - np.eye(2) * (block**2 - 1) / 12  # a block's own variance
    centre = np.array([row, column]) * block + (block - 1) / 2
    return _gaussian(centre, covariance, _explained(small, shape(result.x)))


def _check_field(field: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    field = np.asarray(field, np.float64)
    if not np.isfinite(field).all() or (field < 0).any() or not field.any():
        raise CxrError("a Gaussian can only be fitted to a map that is finite, not negative, and not zero everywhere")
    return field


def _block_means(field: Float[np.ndarray, "H W"], block: int) -> Float[np.ndarray, "h w"]:
    """Return means of blocks of block x block pixels; incomplete blocks at the lower and right edges are left out."""
    height, width = (side // block for side in field.shape)
    return field[: height * block, : width * block].reshape(height, block, width, block).mean((1, 3))


def _explained(field: np.ndarray, model: np.ndarray) -> float:
    total = ((field - field.mean()) ** 2).sum()
    return float(1 - ((field - model) ** 2).sum() / total) if total else math.nan


def _gaussian(centre: np.ndarray, covariance: np.ndarray, explained: float) -> Gaussian:
    variances, axes = np.linalg.eigh(covariance)
    minor, major = np.sqrt(np.maximum(variances, 0))
    dy, dx = axes[:, 1]
    angle = 90 - (90 - math.degrees(math.atan2(dy, dx))) % 180  # an axis has no sign
    return Gaussian(float(centre[0]), float(centre[1]), float(major), float(minor), angle, explained)
