"""Convolution of each channel by itself, fast on CPUs too.

There XLA's own convolution, and above all its gradients, take ten to a hundred times as long as sums of shifted maps.
"""

from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Maps = Float[Array, "B H W C"]
Kernel = Float[Array, "h w 1 C"]
Pair = Sequence[Any]


def depthwise(maps: Maps, kernel: Kernel, strides: Pair, padding: Pair, **options: Any) -> Maps:
    """`jax.lax.conv_general_dilated` with as many groups as channels; on CPUs a sum of shifted maps.

    Args:
      maps: of C channels.
      kernel: one h x w kernel per channel.
      strides: of rows and columns.
      padding: zeros before and after the rows, and the columns.
      options: further arguments of `conv_general_dilated`, without dilation.
    """
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    return jax.lax.platform_dependent(
        maps,
        kernel,
        cpu=lambda maps, kernel: sum_of_shifts(maps, kernel, strides, padding),
        default=lambda maps, kernel: jax.lax.conv_general_dilated(maps, kernel, strides, padding, **options),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def sum_of_shifts(maps: Maps, kernel: Kernel, strides: Pair, padding: Pair) -> Maps:
    """What `depthwise` computes, in float32 at least, as one shifted copy of the maps per element of the kernel."""
    return _weighted(_shifts(_padded(maps, *padding), kernel, strides), kernel).astype(maps.dtype)


def _forward(maps: Maps, kernel: Kernel, strides: Pair, padding: Pair) -> tuple[Maps, tuple[Maps, Kernel]]:
    return sum_of_shifts(maps, kernel, strides, padding), (maps, kernel)


def _backward(strides: Pair, padding: Pair, kept: tuple[Maps, Kernel], change: Maps) -> tuple[Maps, Kernel]:
    """Gradients by the maps (the flipped kernel on the change, spread by the strides) and by the kernel."""
    maps, kernel = kept
    rows, columns = (
        (size - 1 - low, length + low - 1 - (reads - 1) * stride)
        for size, length, reads, stride, (low, _) in zip(
            kernel.shape[:2], maps.shape[1:3], change.shape[1:3], strides, padding, strict=True
        )
    )
    spread = _padded(change, rows, columns, between=[stride - 1 for stride in strides])
    by_maps = _weighted(_shifts(spread, kernel, (1, 1)), kernel[::-1, ::-1])
    terms = [shifted * _wide(change) for shifted in _shifts(_padded(maps, *padding), kernel, strides)]
    # Along the columns together, since XLA would write the terms of separate sums to memory.
    zeros = [np.zeros((), terms[0].dtype)] * len(terms)
    sums = jax.lax.reduce(terms, zeros, lambda left, right: list(map(add, left, right)), (2,))
    return by_maps.astype(maps.dtype), jnp.stack(sums).sum((1, 2)).reshape(kernel.shape).astype(kernel.dtype)


sum_of_shifts.defvjp(_forward, _backward)


def _shifts(padded: Maps, kernel: Kernel, strides: Pair) -> list[Maps]:
    """What each element of the kernel meets, row by row."""
    sizes = zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    spans = [(length - size) // stride * stride + 1 for length, size, stride in sizes]
    rows = [padded[:, row : row + spans[0] : strides[0]] for row in range(kernel.shape[0])]
    return [each[:, :, column : column + spans[1] : strides[1]] for each in rows for column in range(kernel.shape[1])]


def _weighted(shifts: list[Maps], kernel: Kernel) -> Maps:
    """The sum of the shifted maps, each times its element of the kernel."""
    weights = _wide(kernel).reshape(len(shifts), 1, 1, 1, -1)
    return reduce(add, (shifted * weight for shifted, weight in zip(shifts, weights, strict=True)))


def _padded(maps: Maps, rows: Pair, columns: Pair, between: Pair = (0, 0)) -> Maps:
    """Zeros before and after the rows and columns, and `between` them."""
    wide, none = _wide(maps), (0, 0, 0)
    sides = (none, (rows[0], rows[1], between[0]), (columns[0], columns[1], between[1]), none)
    return jax.lax.pad(wide, np.zeros((), wide.dtype), sides)


def _wide(array: Array) -> Array:
    return array.astype(np.promote_types(array.dtype, np.float32))
