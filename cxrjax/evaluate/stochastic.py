"""Monte Carlo dropout: many passes over the same images, in which dropout alone is random (Gal & Ghahramani, 2016)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, UInt8

from cxrjax.data.pipeline import Examples
from cxrjax.errors import CxrError
from cxrjax.models.inputs import prepare
from cxrjax.models.network import Network
from cxrjax.parallel.mesh import batch_shardings, replicated
from cxrjax.train.inference import PredictStep, logits_of


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
    """Logits of T passes with the head's dropout active; features are computed once, batch norm is as at inference.

    Pass t of the n-th example draws its dropout from `split(fold_in(key(seed), n), T)[t]`, so the result does not
    depend on batches or devices.

    Args:
      network: whose head has dropout.
      examples: N records.
      mesh: where batches are placed.
      size: side of the images in px.
      batch: images at once, over all devices.
      passes: T, at least 2.
      seed: of the dropout.
      threads: decoding threads.
      advance: told how many images each batch had.

    Raises:
      CxrError: the head has no dropout, so that all passes are alike.
    """
    if passes < 2:
        raise CxrError(f"passes={passes}: one pass says nothing of how much they differ; give 2 or more")
    jitted, key = _make_step(mesh, passes), jax.random.key(seed)
    done = 0

    def step(network: Network, images: Array) -> Array:
        nonlocal done
        first, done = np.int32(done), done + len(images)  # batches come in order
        return jitted(network, images, key, first)

    logits = logits_of(network, examples, step, mesh, size=size, batch=batch, threads=threads, advance=advance)
    if (logits == logits[:, :1]).all():
        raise CxrError(
            "all stochastic passes are alike: the network's head has no dropout; train it with model.options.dropout"
        )
    return logits.swapaxes(0, 1)


def _make_step(mesh: jax.sharding.Mesh, passes: int) -> Callable[..., jax.Array]:
    """The jitted step `(network, images, key, number of the first image) -> logits f32[B, T, K]`."""

    def step(
        network: Network, images: UInt8[Array, "B H W 1"], key: PRNGKeyArray, first: Int[Array, ""]
    ) -> Float[Array, "B T K"]:
        model = network.model()
        features = model.features(prepare(images, network.inputs, network.dtype))

        def of_image(features: dict[str, Array], number: Int[Array, ""]) -> Float[Array, "T K"]:
            single = {name: maps[None] for name, maps in features.items()}
            keys = jax.random.split(jax.random.fold_in(key, number), passes)
            return jax.vmap(lambda key: model.head(single, key=key)[0])(keys)

        return jax.vmap(of_image)(dict(features), first + jnp.arange(len(images), dtype=jnp.int32))

    whole = replicated(mesh)
    return jax.jit(step, in_shardings=(whole, batch_shardings(mesh).image, whole, whole), out_shardings=whole)


def make_pooled_step(mesh: jax.sharding.Mesh) -> PredictStep:
    """The jitted step `(network, images uint8[B,H,W,1]) -> f32[B,C]`: the mean over space of the last feature maps."""

    def step(network: Network, images: UInt8[Array, "B H W 1"]) -> Float32[Array, "B C"]:
        maps = network.model().features(prepare(images, network.inputs, network.dtype))["final"]
        return maps.astype(jnp.float32).mean((1, 2))

    whole = replicated(mesh)
    return jax.jit(step, in_shardings=(whole, batch_shardings(mesh).image), out_shardings=whole)
