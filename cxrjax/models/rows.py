"""Where the rows of feature maps lie on a mesh whose `space` axis shares the rows of an image."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Maps = Float[Array, "B H W C"]


def evenly(operation: Callable[..., Maps]) -> Callable[..., Maps]:
    """An operation that changes the rows of maps, its first argument, laid out on the mesh it is traced for.

    Where `space` divides the rows that it takes and those that it gives, each device holds its share of both. Else each
    holds them whole: XLA's partitioner would split them unevenly, and then the gradients of strided convolutions are
    wrong, without a word (jaxlib 0.10.2: 72 rows over 8 devices, 64 rows halved four times), although the maps
    themselves are right. In networks that halve their maps again and again those are the small ones.

    Without a mesh, or with one device for each image, it is the operation.
    """

    @wraps(operation)
    def laid_out(maps: Maps, *args: Any, **options: Any) -> Maps:
        mesh = jax.sharding.get_abstract_mesh()
        space, data = (mesh.shape.get(axis, 1) for axis in ("space", "data"))
        if space == 1:
            return operation(maps, *args, **options)
        result = jax.eval_shape(lambda maps: operation(maps, *args, **options), maps)
        even = maps.shape[1] % space == result.shape[1] % space == 0
        where = P("data" if len(maps) % data == 0 else P.UNCONSTRAINED, "space" if even else None)
        maps = jax.lax.with_sharding_constraint(maps, where)
        return jax.lax.with_sharding_constraint(operation(maps, *args, **options), where)

    return laid_out
