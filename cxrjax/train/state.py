"""What a run is at one moment: one pytree for the devices, one small record for the host."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from cxrjax.models.network import Network
from cxrjax.train.trainable import TrainableParams, all_trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything the step changes. `params` and `stats` are plain nested dicts, replicated over the mesh."""

    step: Int[Array, ""]
    params: Any
    stats: Any
    optimizer: Any
    rate_factor: Float[Array, ""]  # lowered by the plateau schedule
    key: UInt32[Array, " 2"]  # of dropout; folded with the step

    @classmethod
    def create(
        cls, network: Network, optimizer: optax.GradientTransformation, seed: int, trainable: TrainableParams | None = None
    ) -> "TrainState":
        """The state before the first step; it shares no array with the network, since the step donates it.

        The optimiser keeps moments of the parameters that learn only.
        """

        @jax.jit  # as one program: an array at a time, each shape would be compiled by itself
        def begin(params: Any, stats: Any) -> Any:
            params, stats = jax.tree.map(jnp.copy, (params, stats))
            return params, stats, optimizer.init((trainable or all_trainable(network)).split(params)[0])

        params, stats, moments = begin(network.params, network.stats)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            stats=stats,
            optimizer=moments,
            rate_factor=jnp.ones((), jnp.float32),
            key=jax.random.PRNGKey(seed),
        )

    def network(self, like: Network) -> Network:
        """The network with this state's parameters and statistics."""
        return dataclasses.replace(like, params=self.params, stats=self.stats)


@dataclasses.dataclass
class Progress:
    """Where the loop stands: saved as JSON beside the state, so that a resumed run goes on exactly.

    `step` counts optimiser steps, and is also the loader's position: batch k feeds step k.
    """

    step: int = 0
    validated: int = 0  # epochs whose validation is done
    loss_sum: float = 0.0  # over this epoch's steps
    rate: float = 0.0  # of the last step
    best: float | None = None  # of the watched metric
    best_step: int = 0
    since_best: int = 0  # epochs
    lowest_loss: float | None = None  # of validation, for the plateau
    since_lowest: int = 0  # epochs
    stopped_early: bool = False
    seconds: float = 0.0  # of training, over all starts
    stepped: float = 0.0  # seconds of them in steps, but for the first of each start
    waited: float = 0.0  # seconds of those without a batch

    @property
    def data_wait(self) -> float | None:
        """The share of the steps' time in which no batch was there; None where none was measured."""
        return self.waited / self.stepped if self.waited else None
