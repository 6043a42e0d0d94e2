"""One step, pure: `(state, batch) -> (state, metrics)`; nothing in it waits for the host."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from cxrjax.distributed.mesh import batch_shardings, replicated, with_mesh
from cxrjax.models.network import Network
from cxrjax.train.flat_params import is_packed, pack, unpack
from cxrjax.train.losses import Loss, masked_bce
from cxrjax.train.state import TrainState
from cxrjax.train.trainable import TrainableParams, all_trainable

Metrics = dict[str, jax.Array]
Placed = Any  # a Batch whose fields lie on the devices


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    accumulate: int = 1,
    trainable: TrainableParams | None = None,
    loss: Loss = masked_bce,
    alternating: bool = False,
) -> Callable[[TrainState, Placed], tuple[TrainState, Metrics]]:
    """The jitted training step; it donates the state it is given. Of a packed state it makes a packed one.

    The batch is the effective one: it is cut into `accumulate` parts that pass one after the other, and the
    gradient is that of the mean of `loss` over the whole. Batch statistics are those of each part (over all devices),
    and running statistics are updated once a part. `learning` says which parameters learn and how fast; all at one
    rate by default. What is frozen costs no gradient and no optimiser state.

    A network of several heads minimises the sum of their losses; with `alternating`, one head's at each step in turn.

    Metrics: `loss`, `gradient_norm`, `rate`, each f32[].
    """
    trainable = trainable or all_trainable(network)

    def loss_of(
        params: Any, frozen: Any, stats: Any, part: Placed, key: jax.Array, about: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, Any]:
        number, total = about
        model = dataclasses.replace(network, params=trainable.join(params, frozen), stats=stats)
        outputs, stats = model.outputs(
            part.image, train=True, key=key, backbone_in_training=trainable.backbone_in_training
        )
        costs = jnp.stack(
            [loss(logits, part.label, part.label_mask, part.example_mask)[0] for logits in outputs.values()]
        )
        if alternating:
            costs = jnp.where(jnp.arange(len(costs)) == number % len(costs), costs, 0)
        return costs.sum() / total.astype(costs.dtype), stats

    def changed(state: TrainState, batch: Placed) -> tuple[TrainState, Metrics]:
        params, frozen = trainable.split(state.params)
        about = (
            state.step,
            jnp.maximum(jnp.sum(loss.counts(batch.label_mask, batch.example_mask), dtype=jnp.float32), 1.0),
        )
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulate)

        def part_step(carry: tuple, part_and_key: tuple) -> tuple[tuple, None]:
            gradient, stats, cost = carry
            part, key = part_and_key
            (part_cost, stats), part_gradient = jax.value_and_grad(loss_of, has_aux=True)(
                params, frozen, stats, part, key, about
            )
            return (jax.tree.map(jnp.add, gradient, part_gradient), stats, cost + part_cost.astype(cost.dtype)), None

        zero = jnp.zeros((), jnp.float32)
        if accumulate == 1:
            (cost, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
                params, frozen, state.stats, batch, keys[0], about
            )
        else:
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            start = (jax.tree.map(jnp.zeros_like, params), state.stats, zero)
            (gradient, stats, cost), _ = jax.lax.scan(part_step, start, (parts, keys))

        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
            rate = (schedule(state.step) * state.rate_factor).astype(jnp.float32)
            direction, optimizer_state = optimizer.update(gradient, state.optimizer, params)
        params = jax.tree.map(lambda p, d: p - rate.astype(p.dtype) * d, params, trainable.scale(direction))
        params = trainable.join(params, frozen)
        metrics = {
            "loss": cost.astype(jnp.float32),
            # As one vector, which a flattened optimiser takes too: else each parameter costs two small kernels.
            "gradient_norm": jnp.linalg.norm(ravel_pytree(gradient)[0]).astype(jnp.float32),
            "rate": rate,
        }
        state = dataclasses.replace(state, step=state.step + 1, params=params, stats=stats, optimizer=optimizer_state)
        return state, metrics

    def step(state: TrainState, batch: Placed) -> tuple[TrainState, Metrics]:
        after, metrics = changed(unpack(state), batch)
        return pack(after) if is_packed(state) else after, metrics

    whole = replicated(mesh)
    return jax.jit(
        with_mesh(mesh, step),
        donate_argnums=0,
        in_shardings=(whole, batch_shardings(mesh)),
        out_shardings=(whole, whole),
    )


@cache
def make_predict_step(mesh: Mesh) -> Callable[[Network, Any], jax.Array]:
    """The jitted evaluation step: `(network, images uint8[B,H,W,1]) -> logits f32[B,K]` on every device.

    One for each mesh, so that what it compiled serves all who predict with the same network in this process; the
    network may be packed.
    """

    def predict(network: Network, image: jax.Array) -> jax.Array:
        return unpack(network).apply(image, train=False)[0]

    whole = replicated(mesh)
    return jax.jit(
        with_mesh(mesh, predict), in_shardings=(whole, batch_shardings(mesh).image), out_shardings=whole
    )
