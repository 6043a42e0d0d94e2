"""Where the rows of feature maps lie on a mesh whose `space` axis shares the rows of an image."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Maps = Float[Array, "B H W C"]


def constrain_rows(operation: Callable[..., Maps]) -> Callable[..., Maps]:
    """An operation that changes the rows of maps, its first argument, laid out on the mesh it is traced for.

    Where `space` divides the rows that it takes and those that it gives, each device holds its share of both. Else each
    holds them whole: XLA's partitioner would split them unevenly, and then the gradients of strided convolutions are
    wrong, without a word (jaxlib 0.10.2: 72 rows over 8 devices, 64 rows halved four times), although the maps
    themselves are right. In networks that halve their maps again and again those are the small ones.

    Without a mesh, or with one device for each image, it is the operation.
    """

    @wraps(operation)
    def laid_out(maps: Maps, *args: Any, **options: Any) -> Maps:
        space, images = _space(), _images(maps)
        if space == 1:
            return operation(maps, *args, **options)
        result = jax.eval_shape(lambda maps: operation(maps, *args, **options), maps)
        even = maps.shape[1] % space == result.shape[1] % space == 0
        where = P(images or P.UNCONSTRAINED, "space" if even else None)
        maps = jax.lax.with_sharding_constraint(maps, where)
        return jax.lax.with_sharding_constraint(operation(maps, *args, **options), where)

    return laid_out


def shared(operation: Callable[..., Maps]) -> Callable[..., Maps]:
    """An operation on several maps that works on shares of their rows, `operation(*maps, shares=devices)`.

    Where `space` divides all their rows, each device calls it on its own shares, and `ring_shift` brings it those of
    the others; else each calls it on whole maps, with `shares=1`.
    """

    @wraps(operation)
    def on_each_device(*maps: Maps) -> Maps:
        space, images = _space(), _images(maps[0])
        if space == 1 or any(each.shape[1] % space for each in maps):
            return operation(*maps, shares=1)
        share = P(images, "space")
        return jax.shard_map(partial(operation, shares=space), in_specs=share, out_specs=share)(*maps)

    return on_each_device


def ring_shift(arrays: Any, shares: int, *, back: bool = False) -> Any:
    """The arrays of the device that has the rows before, or those after; of the first and the last it is the other."""
    if shares == 1:
        return arrays
    ring = [(device, (device + (-1 if back else 1)) % shares) for device in range(shares)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, "space", ring), arrays)


@shared
def doubled(maps: Maps, *, shares: int) -> Maps:
    """Twice the rows and columns, bilinear: as `jax.image.resize`, but that would gather the rows."""
    first, last = maps[:, :1], maps[:, -1:]
    above, below = first, last
    if shares > 1:
        device = jax.lax.axis_index("space")
        above = jnp.where(device == 0, first, ring_shift(last, shares))
        below = jnp.where(device == shares - 1, last, ring_shift(first, shares, back=True))
    rows = _halfway(jnp.concatenate([above, maps, below], axis=1), 1)
    return _halfway(jnp.concatenate([rows[:, :, :1], rows, rows[:, :, -1:]], axis=2), 2)


def _halfway(maps: Maps, axis: int) -> Maps:
    """Two values for each but the outermost: a quarter of the way to the one before, and to the one after."""
    before, here, after = (
        jax.lax.slice_in_dim(maps, start, maps.shape[axis] - 2 + start, axis=axis) for start in range(3)
    )
    pairs = jnp.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis=axis + 1)
    return pairs.reshape(*here.shape[:axis], 2 * here.shape[axis], *here.shape[axis + 1 :])


def summed_rows(maps: Maps, weights: Float[Array, "B S H"]) -> Float[Array, "B S W C"]:
    """Weighted sums over the rows of maps, whole on each device; what they send each other is only sums.

    (XLA's partitioner would rather bring all rows to all devices.)
    """

    def sums(maps: Maps, weights: Float[Array, "B S H"]) -> Float[Array, "B S W C"]:
        return jnp.einsum("bhwc,bsh->bswc", maps, weights, precision="highest")

    space, images = _space(), _images(maps)
    if space == 1 or maps.shape[1] % space:
        return sums(maps, weights)
    shares = P(images, "space"), P(images, None, "space")
    return jax.shard_map(lambda *of: jax.lax.psum(sums(*of), "space"), in_specs=shares, out_specs=P(images))(
        maps, weights
    )


def _space() -> int:
    """Devices that share an image on the mesh that is traced for."""
    return jax.sharding.get_abstract_mesh().shape.get("space", 1)


def _images(maps: Maps) -> str | None:
    """The axis of that mesh which divides the maps of a batch; none if it cannot."""
    return None if len(maps) % jax.sharding.get_abstract_mesh().shape.get("data", 1) else "data"
