"""Operations on feature maps whose rows are sharded over the mesh axis `space`."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Maps = Float[Array, "B H W C"]


def constrain_rows(operation: Callable[..., Maps]) -> Callable[..., Maps]:
    """Decorate an operation that changes the number of rows of its first argument, so that rows stay evenly sharded.

    Where `space` divides the rows of both the input and the result, each device holds an equal shard of both.
    Otherwise every device holds all rows: XLA's partitioner would shard them unevenly, and the gradients of strided
    convolutions are then silently wrong (jaxlib 0.10.2: 72 rows over 8 devices, 64 rows halved four times), although
    the maps are right. This concerns only the small maps late in a network.

    Without a mesh, or with one device per image, the operation is unchanged.
    """

    @wraps(operation)
    def constrained(maps: Maps, *args: Any, **options: Any) -> Maps:
        space, batch_axis = _space_size(), _batch_axis(maps)
        if space == 1:
            return operation(maps, *args, **options)
        result = jax.eval_shape(lambda maps: operation(maps, *args, **options), maps)
        is_even = maps.shape[1] % space == result.shape[1] % space == 0
        spec = P(batch_axis or P.UNCONSTRAINED, "space" if is_even else None)
        maps = jax.lax.with_sharding_constraint(maps, spec)
        return jax.lax.with_sharding_constraint(operation(maps, *args, **options), spec)

    return constrained


def map_row_shards(operation: Callable[..., Maps]) -> Callable[..., Maps]:
    """Decorate `operation(*maps, num_shards=n)`, so that each device runs it on its own rows.

    Where `space` divides the rows of all maps, each device passes its shards and gets those of the others with
    `ring_shift`. Otherwise each device passes whole maps, with `num_shards=1`.
    """

    @wraps(operation)
    def mapped(*maps: Maps) -> Maps:
        space, batch_axis = _space_size(), _batch_axis(maps[0])
        if space == 1 or any(array.shape[1] % space for array in maps):
            return operation(*maps, num_shards=1)
        spec = P(batch_axis, "space")
        return jax.shard_map(partial(operation, num_shards=space), in_specs=spec, out_specs=spec)(*maps)

    return mapped


def ring_shift(arrays: Any, num_shards: int, *, reverse: bool = False) -> Any:
    """Return the arrays of the previous device in the ring over `space`, or of the next one if `reverse`."""
    if num_shards == 1:
        return arrays
    ring = [(device, (device + (-1 if reverse else 1)) % num_shards) for device in range(num_shards)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, "space", ring), arrays)


@map_row_shards
def upsample_bilinear_2x(maps: Maps, *, num_shards: int) -> Maps:
    """Double height and width, as bilinear `jax.image.resize` does, but exchange only the outermost rows."""
    first, last = maps[:, :1], maps[:, -1:]
    above, below = first, last
    if num_shards > 1:
        device = jax.lax.axis_index("space")
        above = jnp.where(device == 0, first, ring_shift(last, num_shards))
        below = jnp.where(device == num_shards - 1, last, ring_shift(first, num_shards, reverse=True))
    rows = _interpolate_2x(jnp.concatenate([above, maps, below], axis=1), 1)
    return _interpolate_2x(jnp.concatenate([rows[:, :, :1], rows, rows[:, :, -1:]], axis=2), 2)


def _interpolate_2x(maps: Maps, axis: int) -> Maps:
    """Return two values for each but the outermost: a quarter of the way to the previous, and to the next one."""
    before, here, after = (
        jax.lax.slice_in_dim(maps, start, maps.shape[axis] - 2 + start, axis=axis) for start in range(3)
    )
    pairs = jnp.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis=axis + 1)
    return pairs.reshape(*here.shape[:axis], 2 * here.shape[axis], *here.shape[axis + 1 :])


def weighted_row_sums(maps: Maps, weights: Float[Array, "B S H"]) -> Float[Array, "B S W C"]:
    """Return S weighted sums over the rows of each image, whole on each device.

    The devices exchange partial sums only, where XLA's partitioner would gather the rows.
    """

    def sums(maps: Maps, weights: Float[Array, "B S H"]) -> Float[Array, "B S W C"]:
        return jnp.einsum("bhwc,bsh->bswc", maps, weights, precision="highest")

    space, batch_axis = _space_size(), _batch_axis(maps)
    if space == 1 or maps.shape[1] % space:
        return sums(maps, weights)
    specs = P(batch_axis, "space"), P(batch_axis, None, "space")
    return jax.shard_map(lambda *shards: jax.lax.psum(sums(*shards), "space"), in_specs=specs, out_specs=P(batch_axis))(
        maps, weights
    )


def _space_size() -> int:
    """Number of devices that share an image on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("space", 1)


def _batch_axis(maps: Maps) -> str | None:
    """The axis of the current mesh that divides the batch, or None."""
    return None if len(maps) % jax.sharding.get_abstract_mesh().shape.get("data", 1) else "data"
