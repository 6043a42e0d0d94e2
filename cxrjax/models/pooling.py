"""Pooling, with gradients that take little memory."""

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
    """Maximum over square windows, as `torch.nn.MaxPool2d`: what does not fill a window is left out.

    Of equal largest values the first in its window has the gradient.
    """
    _check_fits(maps, window, padding)
    return _largest(maps, window, stride, padding)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _largest(maps: Maps, window: int, stride: int, padding: int) -> Maps:
    return _reduce(maps, -np.inf, jax.lax.max, window, stride, padding)


def _max_and_place(maps: Maps, window: int, stride: int, padding: int) -> tuple[Maps, Any]:
    """The maxima, and where in its window each first occurs, in bytes: all that the gradient needs.

    XLA's own gradient keeps four integers of 32 bits per maximum, the peak of a training step at full resolution. And a
    gradient that compares the maxima with the maps again finds none where those were rounded otherwise.
    """
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(maps, sides, constant_values=-np.inf)
    rows, columns = ((side + 2 * padding - window) // stride for side in maps.shape[1:3])
    largest = place = None
    for number, (row, column) in enumerate(np.ndindex(window, window)):
        seen = padded[:, row : row + rows * stride + 1 : stride, column : column + columns * stride + 1 : stride]
        if largest is None or place is None:
            largest, place = seen, jnp.zeros(seen.shape, jnp.uint8)
        else:
            place = jnp.where(seen > largest, jnp.uint8(number), place)
            largest = jnp.maximum(largest, seen)
    assert largest is not None
    return largest, (place, maps.shape)


def _to_the_maxima(window: int, stride: int, padding: int, kept: Any, gradient: Maps) -> tuple[Maps]:
    """Places that are `stride` apart meet the same places of windows: of each such set the sum is rounded once.

    Only then are the sets put between each other, which no longer adds: no maps of full size are there in float32.
    """
    place, (_, *sides, _) = kept
    wide, zero = gradient.astype(param_dtype(gradient.dtype)), jnp.zeros((), param_dtype(gradient.dtype))
    sets: dict[tuple[int, ...], Array] = {}
    for number, offsets in enumerate(np.ndindex(window, window)):
        moves, first = zip(*(divmod(offset - padding, stride) for offset in offsets), strict=True)
        lengths = [len(range(start, side, stride)) for start, side in zip(first, sides, strict=True)]
        if 0 in lengths:
            continue  # in windows of one place, which is wider than the maps: padding only
        edges = [
            (move, length - move - count, 0)
            for move, length, count in zip(moves, lengths, gradient.shape[1:3], strict=True)
        ]
        term = jax.lax.pad(jnp.where(place == number, wide, zero), zero, [(0, 0, 0), *edges, (0, 0, 0)])
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


_largest.defvjp(_max_and_place, _to_the_maxima)


STEM_POOLS = {
    "3x3": lambda maps: max_pool(maps, 3, 2, padding=1),
    "2x2": lambda maps: max_pool(maps, 2, 2),
    "none": lambda maps: maps,
}


@constrain_rows
def average_pool(maps: Maps, window: int, stride: int) -> Maps:
    """Mean over square windows, as `torch.nn.AvgPool2d`."""
    _check_fits(maps, window, 0)
    return _reduce(maps, 0.0, jax.lax.add, window, stride, 0) / window**2


def _reduce(maps: Maps, start: float, combine: Callable, window: int, stride: int, padding: int) -> Maps:
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(maps, start, combine, (1, window, window, 1), (1, stride, stride, 1), sides)


def _check_fits(maps: Maps, window: int, padding: int) -> None:
    height, width = maps.shape[1:3]
    if min(height, width) + 2 * padding < window:
        raise CxrError(
            f"the images are too small for this network: a {window} x {window} window meets maps of "
            f"{height} x {width}; use larger images or fewer stages"
        )
