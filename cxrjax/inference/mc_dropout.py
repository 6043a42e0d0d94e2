"""Monte Carlo dropout: repeated passes over the same images with random dropout masks (Gal & Ghahramani, 2016)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, Shaped, UInt8

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
