"""The jitted training and evaluation steps: pure functions that never wait for the host."""

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
from cxrjax.train.losses import Loss, masked_bce
from cxrjax.train.optimizer import TrainableParams, all_trainable
from cxrjax.train.state import TrainState, flatten_params, is_flat, unflatten_params

Metrics = dict[str, jax.Array]
DeviceBatch = Any  # a Batch whose fields are on the devices


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    accumulation_steps: int = 1,
    trainable: TrainableParams | None = None,
    loss: Loss = masked_bce,
    alternating: bool = False,
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """Return the jitted step `(state, batch) -> (state, metrics)`. It donates the state; a flat state stays flat.

    Args:
      network: its parameters and statistics are ignored.
      optimizer: gives the direction; the learning rate is applied here.
      schedule: learning rate of each step.
      mesh: devices.
      accumulation_steps: the batch is split into this many microbatches, processed in sequence. The gradient is that
        of the mean of `loss` over the whole batch. Batch statistics are per microbatch (over all devices), and running
        statistics are updated once per microbatch.
      trainable: which parameters to train, with which factors; by default all. Frozen ones cost no gradient and no
        optimizer state.
      loss: minimised; for a network with several heads, the sum of the heads' losses.
      alternating: minimise only one head's loss in each step, in turn.

    Returns:
      The step; its metrics are `loss`, `gradient_norm` and `learning_rate`, each f32[].
    """
    trainable = trainable or all_trainable(network)

    def microbatch_loss(
        params: Any, frozen: Any, stats: Any, batch: DeviceBatch, key: jax.Array, step: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return the microbatch's share of the mean loss, and the updated statistics."""
        model = dataclasses.replace(network, params=trainable.join(params, frozen), stats=stats)
        outputs, stats = model.outputs(
            batch.image, train=True, key=key, backbone_in_training=trainable.backbone_in_training
        )
        losses = jnp.stack(
            [loss(logits, batch.label, batch.label_mask, batch.example_mask)[0] for logits in outputs.values()]
        )
        if alternating:
            losses = jnp.where(jnp.arange(len(losses)) == step % len(losses), losses, 0)
        return losses.sum() / count.astype(losses.dtype), stats

    def update(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        params, frozen = trainable.split(state.params)
        count = jnp.maximum(jnp.sum(loss.counts(batch.label_mask, batch.example_mask), dtype=jnp.float32), 1.0)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulation_steps)

        def loss_and_gradient(stats: Any, microbatch: DeviceBatch, key: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
            function = jax.value_and_grad(microbatch_loss, has_aux=True)
            return function(params, frozen, stats, microbatch, key, state.step, count)

        def accumulate(carry: tuple, microbatch_and_key: tuple) -> tuple[tuple, None]:
            gradient, stats, total = carry
            (value, stats), new = loss_and_gradient(stats, *microbatch_and_key)
            return (jax.tree.map(jnp.add, gradient, new), stats, total + value.astype(total.dtype)), None

        if accumulation_steps == 1:
            (value, stats), gradient = loss_and_gradient(state.stats, batch, keys[0])
        else:
            split = lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
            zero = (jax.tree.map(jnp.zeros_like, params), state.stats, jnp.zeros((), jnp.float32))
            (gradient, stats, value), _ = jax.lax.scan(accumulate, zero, (jax.tree.map(split, batch), keys))

        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
            learning_rate = (schedule(state.step) * state.lr_factor).astype(jnp.float32)
            direction, optimizer_state = optimizer.update(gradient, state.optimizer, params)
        params = jax.tree.map(lambda p, d: p - learning_rate.astype(p.dtype) * d, params, trainable.scale(direction))
        metrics = {
            "loss": value.astype(jnp.float32),
            # As one vector, which a flattened optimizer needs too: otherwise each parameter costs two small kernels.
            "gradient_norm": jnp.linalg.norm(ravel_pytree(gradient)[0]).astype(jnp.float32),
            "learning_rate": learning_rate,
        }
        params = trainable.join(params, frozen)
        state = dataclasses.replace(state, step=state.step + 1, params=params, stats=stats, optimizer=optimizer_state)
        return state, metrics

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        new_state, metrics = update(unflatten_params(state), batch)
        return flatten_params(new_state) if is_flat(state) else new_state, metrics

    replicas = replicated(mesh)
    return jax.jit(
        with_mesh(mesh, step),
        donate_argnums=0,
        in_shardings=(replicas, batch_shardings(mesh)),
        out_shardings=(replicas, replicas),
    )


@cache
def make_predict_step(mesh: Mesh) -> Callable[[Network, Any], jax.Array]:
    """Return the jitted step `(network, images uint8[B,H,W,1]) -> logits f32[B,K]`, replicated on every device.

    Cached by mesh, so that everything in this process shares its compilations. The network may be flat.
    """

    def predict(network: Network, image: jax.Array) -> jax.Array:
        return unflatten_params(network).apply(image, train=False)[0]

    replicas = replicated(mesh)
    return jax.jit(
        with_mesh(mesh, predict), in_shardings=(replicas, batch_shardings(mesh).image), out_shardings=replicas
    )
