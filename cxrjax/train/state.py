"""Training state: one pytree on the devices (and its flat form), one small record on the host."""

import dataclasses
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from cxrjax.models.network import Network
from cxrjax.train.optimizer import TrainableParams, all_trainable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes. `params` and `stats` are nested dicts, replicated over the mesh."""

    step: Int[Array, ""]
    params: Any
    stats: Any
    optimizer: Any
    lr_factor: Float[Array, ""]  # lowered by the plateau schedule
    key: UInt32[Array, " 2"]  # for dropout; folded with the step

    @classmethod
    def create(
        cls,
        network: Network,
        optimizer: optax.GradientTransformation,
        seed: int,
        trainable: TrainableParams | None = None,
    ) -> "TrainState":
        """Return the state before the first step. It copies the network's arrays, since the step donates them.

        The optimizer holds moments of the trainable parameters only.
        """

        @jax.jit  # one program: otherwise every array shape compiles its own
        def init(params: Any, stats: Any) -> Any:
            params, stats = jax.tree.map(jnp.copy, (params, stats))
            return params, stats, optimizer.init((trainable or all_trainable(network)).split(params)[0])

        params, stats, moments = init(network.params, network.stats)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            stats=stats,
            optimizer=moments,
            lr_factor=jnp.ones((), jnp.float32),
            key=jax.random.PRNGKey(seed),
        )

    def network(self, network: Network) -> Network:
        """Return the network with this state's parameters and statistics."""
        return dataclasses.replace(network, params=self.params, stats=self.stats)


@dataclass
class Progress:
    """The loop's position, saved as JSON beside the state so that a resumed run continues exactly.

    `step` counts optimizer steps and is also the loader's position: batch k feeds step k.
    """

    step: int = 0
    validated_epochs: int = 0
    loss_sum: float = 0.0  # over this epoch's steps
    learning_rate: float = 0.0  # of the last step
    best: float | None = None  # of the monitored metric
    best_step: int = 0
    epochs_since_best: int = 0
    lowest_loss: float | None = None  # of validation, for the plateau schedule
    epochs_since_lowest: int = 0
    stopped_early: bool = False
    seconds: float = 0.0  # of training, over all restarts
    step_seconds: float = 0.0  # of which in steps, except the first after each start
    wait_seconds: float = 0.0  # of which without a batch

    @property
    def data_wait_fraction(self) -> float | None:
        """The fraction of the steps' time spent waiting for data; None if not measured."""
        return self.wait_seconds / self.step_seconds if self.wait_seconds else None


# Passing an array to a jitted call costs the host some microseconds, however small it is. Of the 612 arrays of
# DenseNet121's training state, 485 are running statistics, scales and biases with 2 % of the values. On accelerators
# they are passed as two vectors, which the jitted step splits again.

Tree = TypeVar("Tree", bound=Any)
"""A dataclass with `params` and `stats`: a `TrainState` or a `Network`."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """The structure of a flattened tree. Equal layouts are one object, so comparing them in each call is cheap."""

    structure: Any
    vectors: tuple[tuple[str, int] | None, ...]  # dtype and length of each leaf that is a vector


@cache
def _layout(structure: Any, vectors: tuple[tuple[str, int] | None, ...]) -> _Layout:
    return _Layout(structure, vectors)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatTree:
    """Nested dicts of arrays with all vectors of one dtype concatenated; other arrays stay as they are."""

    vectors: dict[str, Array]
    others: list[Array]
    layout: _Layout = field(metadata={"static": True})

    @classmethod
    def from_tree(cls, tree: Any) -> "FlatTree":
        """Flatten nested dicts."""
        leaves, structure = jax.tree.flatten(tree)
        vectors, others = dict[str, list[Array]](), []
        for leaf in leaves:
            (vectors.setdefault(str(leaf.dtype), []) if leaf.ndim == 1 else others).append(leaf)
        lengths = tuple((str(leaf.dtype), leaf.size) if leaf.ndim == 1 else None for leaf in leaves)
        return cls(_concatenate(vectors), others, _layout(structure, lengths))

    def to_tree(self) -> Any:
        """Return the nested dicts."""
        vectors = {dtype: iter(pieces) for dtype, pieces in _split(self.vectors, self.layout).items()}
        others = iter(self.others)
        leaves = [next(vectors[vector[0]]) if vector else next(others) for vector in self.layout.vectors]
        return self.layout.structure.unflatten(leaves)


@jax.jit
def _concatenate(vectors: dict[str, list[Array]]) -> dict[str, Array]:
    return {dtype: jnp.concatenate(pieces) for dtype, pieces in vectors.items()}


@partial(jax.jit, static_argnums=1)
def _split(vectors: dict[str, Array], layout: _Layout) -> dict[str, list[Array]]:
    lengths = {dtype: [vector[1] for vector in layout.vectors if vector and vector[0] == dtype] for dtype in vectors}
    return {dtype: jnp.split(vector, np.cumsum(lengths[dtype])[:-1].tolist()) for dtype, vector in vectors.items()}


def flatten_params(tree: Tree) -> Tree:
    """Flatten the parameters and statistics."""
    return dataclasses.replace(tree, params=FlatTree.from_tree(tree.params), stats=FlatTree.from_tree(tree.stats))


def flatten_for_mesh(tree: Tree, mesh: Mesh) -> Tree:
    """Flatten the parameters and statistics, except for a mesh of CPUs.

    There XLA compiles equal kernels once, and kernels that slice a vector at different offsets are not equal:
    ResNet50's step took 15 instead of 9 s of CPU time to compile (an H200's, DenseNet121, 54 instead of 51).
    """
    return tree if mesh.devices.flat[0].platform == "cpu" else flatten_params(tree)


def unflatten_params(tree: Tree) -> Tree:
    """Return the tree with nested dicts; unchanged if it has them."""
    if not is_flat(tree):
        return tree
    return dataclasses.replace(tree, params=tree.params.to_tree(), stats=tree.stats.to_tree())


def is_flat(tree: Any) -> bool:
    """Return whether parameters and statistics are flattened."""
    return isinstance(tree.params, FlatTree)
