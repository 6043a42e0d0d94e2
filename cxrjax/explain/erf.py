"""Effective receptive fields: which pixels the features in the centre of the image really listen to.

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
from cxrjax.explain.inputs import batches, checked, feature_map, on, shares, spread
from cxrjax.models.input_spec import prepare
from cxrjax.models.layers import param_dtype
from cxrjax.models.network import Network

Estimator = Literal["exact", "probe", "sum"]
Moment = Literal["square", "absolute", "mean"]
TWO_SIGMA = 0.9545


@dataclass(frozen=True)
class ERF:
    """An effective receptive field and its size.

    Attributes:
      map: not negative; in (features per grey value, black 0 to white 1) squared where the moment is `square`.
      area_fraction: of the image, the area that holds `mass` of the map; see `size_of`.
      diameter: of the disc of that area, px.
      mass: share of the map's sum.
      estimator: as asked for; so are `moment` and `layer`.
      moment: likewise.
      layer: name of the feature map.
      position: row and column in the feature map.
      channels: of the feature map.
      images: how many.
      passes: backward passes per image.
    """

    map: Float[np.ndarray, "H W"]
    area_fraction: float
    diameter: float
    mass: float
    estimator: str
    moment: str
    layer: str
    position: tuple[int, int]
    channels: int
    images: int
    passes: int  # backward passes per image


def measure(
    network: Network,
    images: UInt8[np.ndarray, "N H W 1"],
    *,
    estimator: Estimator = "probe",
    probes: int = 16,
    moment: Moment = "square",
    layer: str | None = None,
    translate: float = 0.25,
    mass: float = TWO_SIGMA,
    seed: int = 0,
    batch_size: int = 1,
    parallel: int | None = None,
    mesh: Mesh | None = None,
    advance: Callable[[int], None] | None = None,
) -> ERF:
    """The effective receptive field of the central position of a feature map, the network in evaluation mode.

    Equation 1: ERF(p, q) = 1/(K N) sum over channels k and images i of (d f^k(x_i, u, v) / d x_i(p, q))^2, with
    (u, v) the centre (h // 2, w // 2) of the map. x_i(p, q) is the grey value between black 0 and white 1, before it is
    normalised and repeated to the network's channels. The gradient passes through the network's compute type and is
    summed in float32 over what runs side by side, in float64 over the rest.

    Args:
      network: a trained network.
      images: grey images of the size the network is used at.
      estimator: `exact`: one backward pass per channel. `probe`: passes of the channels' sum under random signs; their
        mean square is unbiased for `exact`. `sum`: one pass, of the channels' plain sum ("one gradient per image");
        with the moment `square` it also counts the products of different channels, so it estimates something else.
      probes: random passes per image, for `probe`.
      moment: `square` is equation 1. `absolute` is the mean absolute gradient. `mean` is the absolute value of the mean
        gradient, as Luo et al. have it, where opposite signs cancel.
      layer: name of the feature map; the last by default.
      translate: images are shifted at random by up to this part of their sides, rows and columns alike; what comes in
        is black.
      mass: the share of the map that its size holds; 0.9545 is two sigma.
      seed: of the shifts and the random signs.
      batch_size: images side by side on a device, or on the devices that share their rows.
      parallel: backward passes of each image side by side; memory grows with `batch_size * parallel`. By default as
        many as make 2^20 pixels: 16 for one image of 256 x 256, and 1 from 1024 x 1024 on.
      mesh: devices among which images and their rows are split, where the network lies; default one device.
      advance: told how many backward passes were done, each time some were; there are `passes` per image in all
        (see `console.progress_bar`).

    Raises:
      CxrError: an option out of range, no such feature map, wrong images, or a gradient that is zero everywhere.
    """
    _check(estimator, probes, moment, translate, mass)
    images = checked(images)
    name, shape = feature_map(network, images, layer)
    channels, position = shape[3], (shape[1] // 2, shape[2] // 2)
    passes = {"exact": channels, "probe": probes, "sum": 1}[estimator]
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    data, space = shares(mesh)
    side_by_side = min(parallel or max(2**20 * space // (batch_size * images[0].size), 1), passes)
    total = np.zeros(images.shape[1:3], np.float64)
    for batch, index in batches(images, batch_size * data):
        shifted = spread(mesh, translated(batch, translate, rng))
        for start in range(0, passes, side_by_side):
            numbers = np.arange(start, start + side_by_side, dtype=np.int32)
            numbers[numbers >= passes] = -1  # so that the last chunk has the size of the others
            with on(mesh):
                part = _moments(network, shifted, index, numbers, key, layer=name, estimator=estimator, moment=moment)
            total += np.asarray(part)
            if advance is not None:
                advance(int((index >= 0).sum() * (numbers >= 0).sum()))
    # Each pass of `probe` estimates the whole sum over channels; the passes of `exact` are its terms.
    terms = channels * len(images) * (probes if estimator == "probe" else 1)
    field = np.abs(total) / terms
    area, diameter = size_of(field, mass)
    return ERF(field, area, diameter, mass, estimator, moment, name, position, channels, len(images), passes)


def size_of(field: Float[np.ndarray, "H W"], mass: float = TWO_SIGMA) -> tuple[float, float]:
    """Size of the smallest set of pixels that holds `mass` of a map: highest pixels first.

    Args:
      field: a map without negative values.
      mass: share of the sum, above 0 and at most 1. An isotropic Gaussian's area is 2 pi sigma^2 ln(1/(1 - mass)).

    Returns:
      The set's area as a fraction of the map's, and the diameter of the disc of that area in px, 2 sqrt(area / pi).

    Raises:
      CxrError: a map that is negative, not finite or zero everywhere, or `mass` out of range.
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


def translated(
    images: UInt8[np.ndarray, "N H W 1"], fraction: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "N H W 1"]:
    """Each image shifted by whole pixels, uniform up to `fraction` of its height and width; what comes in is black."""
    height, width = images.shape[1:3]
    limits = int(height * fraction), int(width * fraction)
    shifted = np.zeros_like(images)
    for target, image in zip(shifted, images, strict=True):
        dy, dx = (int(rng.integers(-limit, limit + 1)) for limit in limits)
        target[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = image[
            max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
        ]
    return shifted


@partial(jax.jit, static_argnames=("layer", "estimator", "moment"))
def _moments(
    network: Network,
    images: UInt8[Array, "B H W 1"],
    index: Int32[Array, " B"],
    numbers: Int32[Array, " P"],
    key: PRNGKeyArray,
    *,
    layer: str,
    estimator: Estimator,
    moment: Moment,
) -> Float[Array, "H W"]:
    """Sum over images and over backward passes, of these numbers, of the gradient's moment; -1 counts as none.

    A loop over all passes within the compiled function would spare the forward pass of each call, but the CPU runs
    convolutions in compiled loops many times slower.
    """
    wide = param_dtype(network.dtype)
    prepared = prepare(images, network.input_spec, network.dtype)
    black, white = prepare(jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1), network.input_spec, wide)
    contrast = (white - black)[None]  # what one unit of grey is in each channel

    def at_centre(grey: Float[Array, "B H W 1"]) -> Float[Array, "B K"]:
        """Central features of the images plus `grey`, which is zero: it is there to be differentiated by."""
        maps = network.model().features(prepared + (grey * contrast).astype(network.dtype))[layer]
        return maps[:, maps.shape[1] // 2, maps.shape[2] // 2].astype(wide)

    features, backward = jax.vjp(at_centre, jnp.zeros(images.shape, wide))

    def gradient(number: Int32[Array, ""]) -> Float[Array, "B H W 1"]:
        """The gradient of the combination of channels that makes up pass `number`."""
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

    terms = {"square": jnp.square, "absolute": jnp.abs, "mean": lambda g: g}[moment](jax.vmap(gradient)(numbers))
    return terms.sum((0, 1, 4))


def _check(estimator: str, probes: int, moment: str, translate: float, mass: float) -> None:
    if estimator not in get_args(Estimator):
        raise CxrError(f"no estimator {estimator!r}; choose one of {', '.join(get_args(Estimator))}")
    if moment not in get_args(Moment):
        raise CxrError(f"no moment {moment!r}; choose one of {', '.join(get_args(Moment))}")
    if estimator == "probe" and moment != "square":
        raise CxrError(f"random signs estimate squares only: for the moment {moment!r} use the estimator exact or sum")
    if probes < 1 or not 0 <= translate < 1 or not 0 < mass <= 1:
        raise CxrError(
            f"out of range: probes ({probes}) must be at least 1, translate ({translate}) in [0, 1), "
            f"mass ({mass}) above 0 and at most 1"
        )


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
