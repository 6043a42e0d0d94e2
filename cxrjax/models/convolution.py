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


FullKernel = Float[Array, "h w C D"]
Sides = Sequence[Sequence[int]]

MOST = 4
"""Channels that are few."""


def folds(maps: Maps, strides: Sequence[int]) -> bool:
    """Whether a convolution is one of few channels that halves maps of even sides."""
    return maps.shape[-1] <= MOST and tuple(strides) == (2, 2) and not any(side % 2 for side in maps.shape[1:3])


def halving(maps: Maps, kernel: FullKernel, strides: Sequence[int], padding: Sides, **options: Any) -> Maps:
    """`jax.lax.conv_general_dilated` where `folds` is true; on TPUs and CUDA with 2 x 2 pixels as channels of a place.

    Args:
      maps: of few channels, with even sides.
      kernel: one h x w kernel for each pair of channels.
      strides: 2 and 2.
      padding: zeros before and after the rows, and the columns.
      options: further arguments of `conv_general_dilated`, without dilation and groups.
    """
    sides = [(low, high) for low, high in padding]
    small = partial(on_folded, padding=sides, **options)
    return jax.lax.platform_dependent(
        maps,
        kernel,
        tpu=small,
        cuda=small,
        default=lambda maps, kernel: jax.lax.conv_general_dilated(maps, kernel, strides, sides, **options),
    )


def on_folded(maps: Maps, kernel: FullKernel, padding: Sides, **options: Any) -> Maps:
    """The same sums, with a kernel of half the side on maps of half the side."""
    before = [low % 2 for low, _ in padding]  # zeros that let each kernel begin at an even pixel
    after = [(size + more) % 2 for size, more in zip(kernel.shape[:2], before, strict=True)]
    small = _folded(jnp.pad(kernel, (*zip(before, after, strict=True), (0, 0), (0, 0)))[None])[0]
    sides = []
    for side, size, small_size, (low, high), more in zip(
        maps.shape[1:3], kernel.shape, small.shape, padding, before, strict=False
    ):
        results, small_low = (side + low + high - size) // 2 + 1, (low + more) // 2
        sides.append((small_low, results - 1 + small_size - small_low - side // 2))
    return jax.lax.conv_general_dilated(_folded(maps), small, (1, 1), sides, **options)


def _folded(maps: Float[Array, "B H W *C"]) -> Float[Array, "B h w *D"]:
    """2 x 2 pixels, row by row, as the channels of one place; of kernels [1, h, w, C, D] likewise."""
    # Slices: a reshape would put two pixels where a TPU has 128 lanes.
    return jnp.concatenate([maps[:, row::2, column::2] for row, column in np.ndindex(2, 2)], axis=3)
