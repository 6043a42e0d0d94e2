"""Monte Carlo dropout: many passes over the same images, in which dropout alone is random (Gal & Ghahramani, 2016)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, Shaped, UInt8

from cxrjax.data.pipeline import Examples
from cxrjax.distributed.mesh import batch_shardings, replicated, with_mesh
from cxrjax.errors import CxrError
from cxrjax.models.input_spec import prepare
from cxrjax.models.network import Network
from cxrjax.train.state import unflatten_params
from cxrjax.train.forward import PredictStep, predict_logits


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
    jitted, key = make_step(mesh, passes), jax.device_put(jax.random.key(seed), replicated(mesh))
    done = 0

    def step(network: Network, images: Array) -> Any:
        nonlocal done
        numbers, done = np.arange(done, done + len(images), dtype=np.int32), done + len(images)  # batches come in order
        return jitted(network, images, key, numbers)[1]

    logits = predict_logits(network, examples, step, mesh, size=size, batch=batch, threads=threads, advance=advance)
    if (logits == logits[:, :1]).all():
        raise CxrError(
            "all stochastic passes are alike: the network's head has no dropout; train it with model.options.dropout"
        )
    return logits.swapaxes(0, 1)


def make_step(mesh: jax.sharding.Mesh, passes: int) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """The jitted step `(network, images, key, numbers i32[B]) -> logits f32[B, K], those of T passes f32[B, T, K]`.

    Images are grey, uint8[B, H, W, 1], or prepared already, floats [B, H, W, C]. A number says which dropout the passes
    of its image draw. With T = 0 there are none, and no dropout is drawn.
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

        def of_image(features: dict[str, Array], number: Int[Array, ""]) -> Float[Array, "T K"]:
            single = {name: maps[None] for name, maps in features.items()}
            keys = jax.random.split(jax.random.fold_in(key, number), passes)
            return jax.vmap(lambda key: model.head(single, key=key)[0])(keys)

        return logits, jax.vmap(of_image)(dict(features), numbers)

    whole, image = replicated(mesh), batch_shardings(mesh).image
    return jax.jit(with_mesh(mesh, step), in_shardings=(whole, image, whole, whole), out_shardings=whole)


def has_dropout(network: Network, size: tuple[int, int]) -> bool:
    """Whether the head's logits depend on a random key; nothing is computed.

    Args:
      network: of any family.
      size: height and width of images that it takes, in px; without any the answer is no.
    """
    if not all(size):
        return False
    images = jax.ShapeDtypeStruct((1, *size, network.input_spec.channels), network.dtype)
    maps = jax.eval_shape(lambda network, images: dict(network.model().features(images)), network, images)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda key, network, maps: network.model().head(maps, key=key))(key, network, maps).jaxpr
    read = {id(atom) for atom in jaxpr.outvars}  # what the logits are made of; a head may compute more
    for equation in reversed(jaxpr.eqns):
        if any(id(atom) in read for atom in equation.outvars):
            read |= {id(atom) for atom in equation.invars}
    return id(jaxpr.invars[0]) in read


def make_pooled_step(mesh: jax.sharding.Mesh) -> PredictStep:
    """The jitted step `(network, images uint8[B,H,W,1]) -> f32[B,C]`: the mean over space of the last feature maps."""

    def step(network: Network, images: UInt8[Array, "B H W 1"]) -> Float32[Array, "B C"]:
        maps = unflatten_params(network).model().features(prepare(images, network.input_spec, network.dtype))["final"]
        return maps.astype(jnp.float32).mean((1, 2))

    whole, image = replicated(mesh), batch_shardings(mesh).image
    return jax.jit(with_mesh(mesh, step), in_shardings=(whole, image), out_shardings=whole)
