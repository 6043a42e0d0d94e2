"""From config to optax: Adam and kin, clipping, and the rate's course over the steps."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

if TYPE_CHECKING:  # a step can be measured where configs cannot be read
    from cxrjax.config import Config


def schedule(config: "Config", steps: int) -> optax.Schedule:
    """The learning rate at each step.

    `constant` and `plateau` hold `rate` after the warm-up (the plateau's factor lives in the state, since it
    depends on the validation loss); `cosine` falls to 0 at `steps`.
    """
    warmup = round(config.warmup_fraction * steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: "Config") -> optax.GradientTransformation:
    """Gradients to directions of unit rate; the step multiplies them by the rate of the hour.

    Moments are held as one vector each: every array of the state costs some microseconds a step to hand over, and
    they would be two thirds of them.
    """
    clip = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    if config.name == "sgd":
        return optax.chain(*clip, as_one_vector(optax.trace(config.beta1)))
    adam = as_one_vector(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    decay = [optax.add_decayed_weights(config.weight_decay, mask=_matrices)] if config.name == "adamw" else []
    return optax.chain(*clip, adam, *decay)


def as_one_vector(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of all gradients as one vector: `optax.flatten`, but for how TPUs take the result apart."""

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(ravel_pytree(params)[0])

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        vector = None if params is None else ravel_pytree(params)[0]
        changed, state = inner.update(ravel_pytree(updates)[0], state, vector)
        return _parts(changed, updates), state

    return optax.GradientTransformation(init, update)


def _parts(vector: Any, like: Any) -> Any:
    """The vector in pieces of these shapes.

    TPUs' compiler would shape the whole vector like a piece, then cut: 14 findings as the last axis take 128 places.
    """
    leaves, tree = jax.tree.flatten(like)
    pieces = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1].tolist())
    pieces = jax.lax.platform_dependent(pieces, tpu=jax.lax.optimization_barrier, default=lambda pieces: pieces)
    return tree.unflatten([piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)])


def _matrices(params: optax.Params) -> optax.Params:
    """Weight decay spares biases and norms: what has fewer than two axes."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
