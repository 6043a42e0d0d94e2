"""Few arrays instead of many: to hand one to a call costs the host some microseconds, however small it is.

Of the 612 arrays of DenseNet121's training state 485 are running statistics, scales and biases, which hold 2 % of the
network's values. For accelerators they travel as two vectors, which the jitted step takes apart.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

Holder = TypeVar("Holder", bound=Any)
"""What has `params` and `stats`: a `TrainState`, a `Network`."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """How the dicts are built. Equal ones are one object, so comparing two, at each call, is one `is`."""

    structure: Any
    lengths: tuple[tuple[str, int] | None, ...]  # of each leaf that is a vector, with its type


@cache
def _layout(structure: Any, lengths: tuple[tuple[str, int] | None, ...]) -> _Layout:
    return _Layout(structure, lengths)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatTree:
    """Nested dicts of arrays, of which those of one axis are one vector for each type, and the others as they were."""

    vectors: dict[str, Array]
    others: list[Array]
    layout: _Layout = field(metadata={"static": True})

    @classmethod
    def of(cls, tree: Any) -> "FlatTree":
        """The dicts as few arrays."""
        leaves, structure = jax.tree.flatten(tree)
        vectors, others = dict[str, list[Array]](), []
        for leaf in leaves:
            (vectors.setdefault(str(leaf.dtype), []) if leaf.ndim == 1 else others).append(leaf)
        lengths = tuple((str(leaf.dtype), leaf.size) if leaf.ndim == 1 else None for leaf in leaves)
        return cls(_joined(vectors), others, _layout(structure, lengths))

    def tree(self) -> Any:
        """The dicts."""
        pieces = {name: iter(cut) for name, cut in _cut(self.vectors, self.layout).items()}
        others = iter(self.others)
        leaves = [next(pieces[each[0]]) if each else next(others) for each in self.layout.lengths]
        return self.layout.structure.unflatten(leaves)


@jax.jit
def _joined(vectors: dict[str, list[Array]]) -> dict[str, Array]:
    return {name: jnp.concatenate(pieces) for name, pieces in vectors.items()}


@partial(jax.jit, static_argnums=1)
def _cut(vectors: dict[str, Array], layout: _Layout) -> dict[str, list[Array]]:
    ends = {name: np.cumsum([each[1] for each in layout.lengths if each and each[0] == name]) for name in vectors}
    return {name: jnp.split(vector, ends[name][:-1].tolist()) for name, vector in vectors.items()}


def pack(of: Holder) -> Holder:
    """The same with its parameters and statistics as few arrays."""
    return dataclasses.replace(of, params=FlatTree.of(of.params), stats=FlatTree.of(of.stats))


def pack_for(of: Holder, mesh: Mesh) -> Holder:
    """The same as a mesh's devices take it: packed, but on CPUs as it is.

    There XLA compiles equal kernels once, and those that cut a vector at different places are not equal: ResNet50's
    step took 15 instead of 9 s of CPU time to compile (an H200's, DenseNet121, 54 instead of 51).
    """
    return of if mesh.devices.flat[0].platform == "cpu" else pack(of)


def unpack(of: Holder) -> Holder:
    """The same with nested dicts; as it is where it has them."""
    return dataclasses.replace(of, params=of.params.tree(), stats=of.stats.tree()) if is_packed(of) else of


def is_packed(of: Any) -> bool:
    """Whether its parameters and statistics are few arrays."""
    return isinstance(of.params, FlatTree)
