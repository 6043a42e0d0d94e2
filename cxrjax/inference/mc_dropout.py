"""Monte Carlo dropout: passes with random dropout masks, and the uncertainty they show (Gal & Ghahramani, 2016)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, PRNGKeyArray, Shaped, UInt8
from scipy.special import entr

from cxrjax.data.pipeline import Examples
from cxrjax.distributed.mesh import batch_shardings, replicated, with_mesh
from cxrjax.errors import CxrError
from cxrjax.jaxprs import needed_inputs
from cxrjax.models.input_spec import prepare
from cxrjax.models.network import Network
from cxrjax.train.experiment import PredictStep, predict_logits
from cxrjax.train.state import unflatten_params


def stochastic_logits(
    network: Network,
    examples: Examples,
    mesh: jax.sharding.Mesh,
    *,
    size: int,
    batch: int,
    passes: int = 100,
    seed: int = 0,
    threads: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> Float32[np.ndarray, "T N K"]:
    """Return the logits of T passes with the head's dropout active; features are computed once, in evaluation mode.

    Pass t of the n-th example draws its dropout masks from `split(fold_in(key(seed), n), T)[t]`, so the result does not
    depend on batches or devices.

    Args:
      network: its head must have dropout.
      examples: N records.
      mesh: devices.
      size: side of the images, px.
      batch: images per batch, over all devices.
      passes: T, at least 2.
      seed: seed of the dropout.
      threads: decoding threads.
      advance: called with the number of images of each batch.

    Raises:
      CxrError: the head has no dropout, so that all passes are equal.
    """
    if passes < 2:
        raise CxrError(f"passes must be 2 or more, not {passes}: uncertainty is the spread over passes")
    jitted, key = make_step(mesh, passes), jax.device_put(jax.random.key(seed), replicated(mesh))
    done = 0

    def step(network: Network, images: Array) -> Any:
        nonlocal done
        numbers, done = np.arange(done, done + len(images), dtype=np.int32), done + len(images)  # batches come in order
        return jitted(network, images, key, numbers)[1]

    logits = predict_logits(network, examples, step, mesh, size=size, batch=batch, threads=threads, advance=advance)
    if (logits == logits[:, :1]).all():
        raise CxrError(
            "all stochastic passes are equal: the network's head has no dropout; train it with model.options.dropout"
        )
    return logits.swapaxes(0, 1)


def make_step(mesh: jax.sharding.Mesh, passes: int) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """Return the jitted step `(network, images, key, numbers i32[B]) -> logits f32[B, K], f32[B, T, K] of T passes`.

    Images are grey, uint8[B, H, W, 1], or prepared, floats [B, H, W, C]. `numbers` selects the random dropout masks of
    each image. With T = 0 there are no passes.
    """

    def step(
        network: Network, images: Shaped[Array, "B H W C"], key: PRNGKeyArray, numbers: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K"], Float[Array, "B T K"] | None]:
        model = unflatten_params(network).model()
        grey = images.dtype == jnp.uint8
        features = model.features(prepare(images, network.input_spec, network.dtype) if grey else images)
        logits = model.head(features)
        if not passes:
            return logits, None

        def run_passes(features: dict[str, Array], number: Int[Array, ""]) -> Float[Array, "T K"]:
            single = {name: maps[None] for name, maps in features.items()}
            keys = jax.random.split(jax.random.fold_in(key, number), passes)
            return jax.vmap(lambda key: model.head(single, key=key)[0])(keys)

        return logits, jax.vmap(run_passes)(dict(features), numbers)

    whole, image = replicated(mesh), batch_shardings(mesh).image
    return jax.jit(with_mesh(mesh, step), in_shardings=(whole, image, whole, whole), out_shardings=whole)


def has_dropout(network: Network, size: tuple[int, int]) -> bool:
    """Return whether the head's logits depend on a random key, without computing them.

    Args:
      network: any network.
      size: height and width of images that it takes, px; if either is 0, the answer is no.
    """
    if not all(size):
        return False
    images = jax.ShapeDtypeStruct((1, *size, network.input_spec.channels), network.dtype)
    maps = jax.eval_shape(lambda network, images: dict(network.model().features(images)), network, images)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda key, network, maps: network.model().head(maps, key=key))(key, network, maps).jaxpr
    return needed_inputs(jaxpr)[0]


def make_pooled_step(mesh: jax.sharding.Mesh) -> PredictStep:
    """Return the jitted step `(network, images uint8[B,H,W,1]) -> f32[B,C]`: spatial means of the last map."""

    def step(network: Network, images: UInt8[Array, "B H W 1"]) -> Float32[Array, "B C"]:
        maps = unflatten_params(network).model().features(prepare(images, network.input_spec, network.dtype))["final"]
        return maps.astype(jnp.float32).mean((1, 2))

    whole, image = replicated(mesh), batch_shardings(mesh).image
    return jax.jit(with_mesh(mesh, step), in_shardings=(whole, image), out_shardings=whole)


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Summary of T passes over N images and K findings.

    Attributes:
      passes: T.
      mean: f64[N, K], the mean probability over the passes.
      std: f64[N, K], standard deviation over the passes (divided by T, not T - 1); 0 to 0.5.
      entropy: f64[N, K] in nats, of the mean: the total uncertainty. [N, 1] for exclusive classes.
      mutual_information: as `entropy`, its epistemic part, on which the passes disagree: entropy of the mean minus mean
        of the entropies; 0 to `entropy`. The rest is aleatoric: noise in the images or labels.
    """

    passes: int
    mean: Float64[np.ndarray, "N K"]
    std: Float64[np.ndarray, "N K"]
    entropy: Float64[np.ndarray, "N k"]
    mutual_information: Float64[np.ndarray, "N k"]

    @property
    def per_image(self) -> Float64[np.ndarray, " N"]:
        """The uncertainty of each image: the mean over findings of their standard deviations."""
        return self.std.mean(axis=1)


def uncertainty_threshold(validation: Float64[np.ndarray, " N"], share: float = 0.1) -> float:
    """Return the smallest threshold that at most this share of the validation images exceeds.

    Raises:
      CxrError: there are no images.
    """
    if not len(validation):
        raise CxrError("uncertainty: there are no validation images to choose a threshold on")
    return float(np.quantile(validation, 1 - share, method="inverted_cdf"))


def summarize_passes(passes: Iterable[Float[np.ndarray, "N K"]], *, exclusive: bool = False) -> Uncertainty:
    """Summarize stochastic passes with running sums, in memory independent of T.

    Args:
      passes: probabilities 0 to 1 of the same images, pass by pass: an array [T, N, K] or any iterable.
      exclusive: whether the K probabilities of an image are of exclusive classes and sum to 1, or are independent.

    Raises:
      CxrError: there are no passes, they differ in shape, or a value is not a probability.
    """
    count, mean, squares, entropies = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for probability in passes:
        p = np.asarray(probability, np.float64)
        if p.ndim != 2 or (count and p.shape != mean.shape):
            expected = f"the first has {mean.shape}" if count else "give images x findings"
            raise CxrError(f"uncertainty: pass {count + 1} has shape {p.shape}; {expected}")
        if not ((p >= 0) & (p <= 1)).all():
            row, k = np.argwhere(~((p >= 0) & (p <= 1)))[0]
            where = f"pass {count + 1}, image {row + 1}, finding {k + 1}"
            raise CxrError(f"uncertainty: {where}: {p[row, k]} is not a probability")
        if not count:
            mean, squares, entropies = np.zeros_like(p), np.zeros_like(p), np.zeros_like(_entropy(p, exclusive))
        count += 1
        step = p - mean  # Welford's update: plain sums of squares would cancel
        mean = mean + step / count
        squares = squares + step * (p - mean)
        entropies = entropies + _entropy(p, exclusive)
    if not count:
        raise CxrError("uncertainty: there are no passes")
    mean = np.clip(mean, 0, 1)
    entropy = _entropy(mean, exclusive)
    mutual_information = np.clip(entropy - entropies / count, 0, entropy)
    return Uncertainty(count, mean, np.sqrt(squares / count), entropy, mutual_information)


def _entropy(p: Float64[np.ndarray, "N K"], exclusive: bool) -> Float64[np.ndarray, "N k"]:
    return entr(p).sum(axis=1, keepdims=True) if exclusive else entr(p) + entr(1 - p)
