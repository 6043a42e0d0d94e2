"""Pooling as in PyTorch, with gradients that need little memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cxrjax.errors import CxrError
from cxrjax.models.layers import Maps, param_dtype
from cxrjax.models.spatial import constrain_rows


@constrain_rows
def max_pool(maps: Maps, window: int, stride: int, padding: int = 0) -> Maps:
    """Return the maximum over square windows, as `torch.nn.MaxPool2d`; incomplete windows are left out.

    Among equal maxima the first in its window gets the gradient.
    """
    _check_window_fits(maps, window, padding)
    return _max_pool(maps, window, stride, padding)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(maps: Maps, window: int, stride: int, padding: int) -> Maps:
    return _reduce_windows(maps, -np.inf, jax.lax.max, window, stride, padding)


def _max_pool_fwd(maps: Maps, window: int, stride: int, padding: int) -> tuple[Maps, Any]:
    """Return the maxima, and each one's position in its window as uint8: all that the gradient needs.

    XLA's own gradient stores four 32-bit integers per maximum, which is the peak of a training step at full resolution.
    A gradient that compares the maxima with the maps again finds none where those were recomputed with other rounding.
    """
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(maps, sides, constant_values=-np.inf)
    rows, columns = ((side + 2 * padding - window) // stride for side in maps.shape[1:3])
    maximum = position = None
    for index, (row, column) in enumerate(np.ndindex(window, window)):
        values = padded[:, row : row + rows * stride + 1 : stride, column : column + columns * stride + 1 : stride]
        if maximum is None or position is None:
            maximum, position = values, jnp.zeros(values.shape, jnp.uint8)
        else:
            position = jnp.where(values > maximum, jnp.uint8(index), position)
            maximum = jnp.maximum(maximum, values)
    assert maximum is not None
    return maximum, (position, maps.shape)


def _max_pool_bwd(window: int, stride: int, padding: int, residuals: Any, gradient: Maps) -> tuple[Maps]:
    """Send each gradient to its maximum, in float32, rounded once.

    Pixels that are `stride` apart lie at the same positions of windows: the sum of each such set is rounded first, and
    the sets are then interleaved, which adds nothing more. So there are no float32 maps of full size.
    """
    position, (_, *sides, _) = residuals
    wide, zero = gradient.astype(param_dtype(gradient.dtype)), jnp.zeros((), param_dtype(gradient.dtype))
    sets: dict[tuple[int, ...], Array] = {}
    for index, offsets in enumerate(np.ndindex(window, window)):
        shifts, first = zip(*(divmod(offset - padding, stride) for offset in offsets), strict=True)
        lengths = [len(range(start, side, stride)) for start, side in zip(first, sides, strict=True)]
        if 0 in lengths:
            continue  # a window wider than the maps: this position is always padding
        edges = [
            (shift, length - shift - count, 0)
            for shift, length, count in zip(shifts, lengths, gradient.shape[1:3], strict=True)
        ]
        term = jax.lax.pad(jnp.where(position == index, wide, zero), zero, [(0, 0, 0), *edges, (0, 0, 0)])
        sets[first] = sets[first] + term if first in sets else term
    total = jnp.zeros((), gradient.dtype)
    for first, values in sets.items():
        edges = [
            (start, side - start - (length - 1) * stride - 1, stride - 1)
            for start, side, length in zip(first, sides, values.shape[1:3], strict=True)
        ]
        values = values.astype(gradient.dtype)
        total = total + jax.lax.pad(values, jnp.zeros((), values.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return (total,)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


STEM_POOLS = {
    "3x3": lambda maps: max_pool(maps, 3, 2, padding=1),
    "2x2": lambda maps: max_pool(maps, 2, 2),
    "none": lambda maps: maps,
}


@constrain_rows
def average_pool(maps: Maps, window: int, stride: int) -> Maps:
    """Return the mean over square windows, as `torch.nn.AvgPool2d`; incomplete windows are left out."""
    _check_window_fits(maps, window, 0)
    return _reduce_windows(maps, 0.0, jax.lax.add, window, stride, 0) / window**2


def _reduce_windows(maps: Maps, init: float, combine: Callable, window: int, stride: int, padding: int) -> Maps:
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(maps, init, combine, (1, window, window, 1), (1, stride, stride, 1), sides)


def _check_window_fits(maps: Maps, window: int, padding: int) -> None:
    height, width = maps.shape[1:3]
    if min(height, width) + 2 * padding < window:
        raise CxrError(
            f"the images are too small for this network: a {window} x {window} window meets maps of "
            f"{height} x {width}; use larger images or fewer stages"
        )
