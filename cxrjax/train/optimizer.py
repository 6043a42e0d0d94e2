"""From config to optax: optimizer, learning-rate schedule, and which parameters are trained, and how fast."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.flatten_util import ravel_pytree

from cxrjax.errors import CxrError
from cxrjax.models.network import Network

if TYPE_CHECKING:  # a step can be measured where configs cannot be read
    from cxrjax.config import Config


def schedule(config: "Config", steps: int) -> optax.Schedule:
    """Return the learning rate at each step.

    `constant` and `plateau` hold the learning rate after the warm-up (the plateau factor is part of the state, because
    it depends on the validation loss); `cosine` falls to 0 at `steps`.
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
    """Return a transformation of gradients into updates for learning rate 1; the step scales them.

    Each moment is one vector: passing an array of the state to a step costs some microseconds, and moments would be two
    thirds of the arrays.
    """
    clip = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    if config.name == "sgd":
        return optax.chain(*clip, as_one_vector(optax.trace(config.beta1)))
    adam = as_one_vector(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    decay = [optax.add_decayed_weights(config.weight_decay, mask=_matrices)] if config.name == "adamw" else []
    return optax.chain(*clip, adam, *decay)


def as_one_vector(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a transformation to all gradients as one vector: `optax.flatten` with a split that suits TPUs."""

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(ravel_pytree(params)[0])

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        vector = None if params is None else ravel_pytree(params)[0]
        changed, state = inner.update(ravel_pytree(updates)[0], state, vector)
        return _unravel(changed, updates), state

    return optax.GradientTransformation(init, update)


def _unravel(vector: Any, like: Any) -> Any:
    """The vector as a tree of arrays with the shapes of `like`.

    Without the barrier, XLA for TPUs lays out the whole vector like a piece and pads 14 findings to 128 lanes.
    """
    leaves, tree = jax.tree.flatten(like)
    pieces = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1].tolist())
    pieces = jax.lax.platform_dependent(pieces, tpu=jax.lax.optimization_barrier, default=lambda pieces: pieces)
    return tree.unflatten([piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)])


def _matrices(params: optax.Params) -> optax.Params:
    """The mask of weight decay, which skips biases and norms: arrays with fewer than two axes."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


Path = tuple[Any, ...]
HEAD = "classifier"
BACKBONE = "backbone"  # stands for every module but the head


@dataclass(frozen=True)
class TrainableParams:
    """The trained part of a network.

    Attributes:
      multipliers: factor on the learning rate of each trained parameter, by its path in the nested dicts.
      backbone_in_training: whether features are computed as in training (batch statistics, stochastic depth); False
        leaves running statistics unchanged and computes features as at inference.
    """

    multipliers: Mapping[Path, float]
    backbone_in_training: bool = True

    @classmethod
    def from_config(cls, network: Network, config: "Config") -> "TrainableParams":
        """Return what a config trains of a network.

        Args:
          network: owner of the parameters.
          config: `train.freeze`, `train.batch_norm` and `optimizer.lr_multipliers` are read.

        Raises:
          CxrError: the network has no such module, or everything is frozen.
        """
        from cxrjax.config import flatten

        frozen = config.train.freeze
        multipliers = flatten(config.optimizer.lr_multipliers)
        paths: Any = list(flatten_dict(network.params))
        for key, names in (("train.freeze", frozen), ("optimizer.lr_multipliers", multipliers)):
            _check_modules(key, names, paths)
        trained = {
            path: _multiplier(path, multipliers) for path in paths if not any(_within(path, name) for name in frozen)
        }
        if not trained:
            raise CxrError(f"config key train.freeze = {config.train.freeze!r} leaves nothing to train")
        auto = BACKBONE not in frozen
        return cls(trained, {"auto": auto, "batch": True, "frozen": False}[config.train.batch_norm])

    def frozen_modules(self, params: Any) -> list[str]:
        """Return the top-level modules of which nothing is trained."""
        return [str(name) for name in params if not any(path[0] == name for path in self.multipliers)]

    def split(self, params: Any) -> tuple[Any, Any]:
        """Split nested parameters into trained and frozen ones."""
        flat: Any = flatten_dict(params)
        trained = {path: array for path, array in flat.items() if path in self.multipliers}
        frozen = {path: array for path, array in flat.items() if path not in self.multipliers}
        return unflatten_dict(trained), unflatten_dict(frozen)

    def join(self, trained: Any, frozen: Any) -> Any:
        """The inverse of `split`."""
        return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))

    def scale(self, updates: Any) -> Any:
        """Multiply the update of each trained parameter by its learning-rate multiplier."""
        flat: Any = flatten_dict(updates)
        return unflatten_dict(
            {path: d if self.multipliers[path] == 1 else d * jnp.asarray(self.multipliers[path], d.dtype)
             for path, d in flat.items()}
        )  # fmt: skip


def all_trainable(network: Network) -> TrainableParams:
    """Return that all parameters are trained at the same learning rate."""
    return TrainableParams(dict.fromkeys(flatten_dict(network.params), 1.0))


def _within(path: Path, name: str) -> bool:
    """Whether a parameter lies in a module, named by its dotted path."""
    if name == BACKBONE:
        return path[0] != HEAD
    parts = name.split(".")
    return list(map(str, path[: len(parts)])) == parts


def _multiplier(path: Path, multipliers: Mapping[str, float]) -> float:
    """The multiplier of the most specific module that holds the parameter; "backbone" is the least specific."""
    names = [name for name in multipliers if _within(path, name)]
    return multipliers[max(names, key=lambda name: 0 if name == BACKBONE else name.count(".") + 1)] if names else 1.0


def _check_modules(key: str, names: Iterable[str], paths: list[Path]) -> None:
    for name in names:
        if not any(_within(path, name) for path in paths):
            modules = [BACKBONE, *dict.fromkeys(str(path[0]) for path in paths)]
            near = get_close_matches(name, modules, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise CxrError(
                f"config key {key} names {name}, which this network does not have: {hint}"
                f"Its modules are {', '.join(modules)}; name modules inside them by dotted paths"
            )
