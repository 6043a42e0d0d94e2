"""Convolutions and matrix products of the layers, each in the form that is fastest on the platform it runs on.

- Strided convolutions of few channels: space-to-depth on TPUs and CUDA GPUs.
- Depthwise convolutions: sums of shifted maps on CPUs, where XLA's own convolution and above all its gradients take
  10 to 100 times as long.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cxrjax.models.spatial import Maps, constrain_rows

Kernel = Float[Array, "h w Cin Cout"]
DepthwiseKernel = Float[Array, "h w 1 C"]
Pair = Sequence[Any]  # for rows and columns: strides, or (before, after) padding

MAX_STEM_CHANNELS = 4
"""A strided convolution with at most this many input channels is computed by space-to-depth."""


@constrain_rows
def conv2d(maps: Maps, kernel: Kernel, strides: Pair, padding: Any, **options: Any) -> Maps:
    """Convolve as `jax.lax.conv_general_dilated`, which also says what the arguments are."""
    convolve: Callable = stem_conv if suits_space_to_depth(maps, strides) else jax.lax.conv_general_dilated
    return convolve(*_kernel_gradient_first(maps, kernel), strides, padding, **options)


@constrain_rows
def depthwise_conv2d(maps: Maps, kernel: DepthwiseKernel, *args: Any, **options: Any) -> Maps:
    """Convolve each channel with its own kernel; arguments as in `depthwise_conv`."""
    return depthwise_conv(*_kernel_gradient_first(maps, kernel), *args, **options)


def dot_general(inputs: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """Multiply as `jax.lax.dot_general`."""
    return jax.lax.dot_general(*_kernel_gradient_first(inputs, kernel), *args, **options)


@jax.custom_vjp
def _kernel_gradient_first(maps: Array, kernel: Array) -> tuple[Array, Array]:
    """Return the arguments; the backward pass computes the kernel's gradient before it continues with the maps'.

    With several devices XLA would otherwise defer the kernels' gradients, and keep all maps they are computed from, to
    the end, where it adds them up: twice the memory. If only one of the two gradients is needed, nothing waits.
    """
    return maps, kernel


def _kernel_gradient_first_fwd(maps: Any, kernel: Any) -> tuple[tuple[Array, Array], tuple[()] | None]:
    return (maps.value, kernel.value), () if maps.perturbed and kernel.perturbed else None


def _kernel_gradient_first_bwd(both: tuple[()] | None, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    if any(isinstance(gradient, SymbolicZero) for gradient in gradients):
        maps, kernel = (None if isinstance(gradient, SymbolicZero) else gradient for gradient in gradients)
        return maps, kernel
    return gradients if both is None else jax.lax.optimization_barrier(gradients)


_kernel_gradient_first.defvjp(_kernel_gradient_first_fwd, _kernel_gradient_first_bwd, symbolic_zeros=True)


def suits_space_to_depth(maps: Maps, strides: Pair) -> bool:
    """Return whether a convolution has few input channels, stride 2, and maps of even height and width."""
    is_even = not any(side % 2 for side in maps.shape[1:3])
    return maps.shape[-1] <= MAX_STEM_CHANNELS and tuple(strides) == (2, 2) and is_even


def stem_conv(maps: Maps, kernel: Kernel, strides: Pair, padding: Pair, **options: Any) -> Maps:
    """Convolve with stride 2, where `suits_space_to_depth` is true; by space-to-depth on TPUs and CUDA GPUs.

    `padding` is the number of zeros (before, after) the rows, and the columns. `options` are further arguments of
    `conv_general_dilated`, without dilation and groups.
    """
    padding = [(low, high) for low, high in padding]
    space_to_depth = partial(space_to_depth_conv, padding=padding, **options)
    return jax.lax.platform_dependent(
        maps,
        kernel,
        tpu=space_to_depth,
        cuda=space_to_depth,
        default=lambda maps, kernel: jax.lax.conv_general_dilated(maps, kernel, strides, padding, **options),
    )


def space_to_depth_conv(maps: Maps, kernel: Kernel, padding: Pair, **options: Any) -> Maps:
    """Compute a convolution of stride 2 as one of stride 1, on maps of half the side and four times the channels."""
    before = [low % 2 for low, _ in padding]  # zeros that make each kernel start at an even pixel
    after = [(size + low) % 2 for size, low in zip(kernel.shape[:2], before, strict=True)]
    small = _space_to_depth(jnp.pad(kernel, (*zip(before, after, strict=True), (0, 0), (0, 0)))[None])[0]
    small_padding = []
    for side, size, small_size, (low, high), added in zip(
        maps.shape[1:3], kernel.shape, small.shape, padding, before, strict=False
    ):
        outputs, small_low = (side + low + high - size) // 2 + 1, (low + added) // 2
        small_padding.append((small_low, outputs - 1 + small_size - small_low - side // 2))
    return jax.lax.conv_general_dilated(_space_to_depth(maps), small, (1, 1), small_padding, **options)


def _space_to_depth(maps: Float[Array, "B H W *C"]) -> Float[Array, "B h w *D"]:
    """Turn 2 x 2 pixels, row by row, into channels; likewise for kernels [1, h, w, Cin, Cout]."""
    # Slices: a reshape would put two pixels where a TPU has 128 lanes.
    return jnp.concatenate([maps[:, row::2, column::2] for row, column in np.ndindex(2, 2)], axis=3)


def depthwise_conv(maps: Maps, kernel: DepthwiseKernel, strides: Pair, padding: Pair, **options: Any) -> Maps:
    """Convolve each channel with its own kernel; on CPUs by `shift_and_add`. Arguments: see `stem_conv`, and groups."""
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    return jax.lax.platform_dependent(
        maps,
        kernel,
        cpu=lambda maps, kernel: shift_and_add(maps, kernel, strides, padding),
        default=lambda maps, kernel: jax.lax.conv_general_dilated(maps, kernel, strides, padding, **options),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shift_and_add(maps: Maps, kernel: DepthwiseKernel, strides: Pair, padding: Pair) -> Maps:
    """Compute a depthwise convolution, in float32 at least, from one shifted copy of the maps per kernel element."""
    return _weighted_sum(_shifted(_pad(maps, *padding), kernel, strides), kernel).astype(maps.dtype)


def _shift_and_add_fwd(
    maps: Maps, kernel: DepthwiseKernel, strides: Pair, padding: Pair
) -> tuple[Maps, tuple[Maps, DepthwiseKernel]]:
    return shift_and_add(maps, kernel, strides, padding), (maps, kernel)


def _shift_and_add_bwd(
    strides: Pair, padding: Pair, residuals: tuple[Maps, DepthwiseKernel], cotangent: Maps
) -> tuple[Maps, DepthwiseKernel]:
    """Gradients of the maps (the cotangent, dilated by the strides, times the flipped kernel) and of the kernel."""
    maps, kernel = residuals
    rows, columns = (
        (size - 1 - low, length + low - 1 - (outputs - 1) * stride)
        for size, length, outputs, stride, (low, _) in zip(
            kernel.shape[:2], maps.shape[1:3], cotangent.shape[1:3], strides, padding, strict=True
        )
    )
    dilated = _pad(cotangent, rows, columns, between=[stride - 1 for stride in strides])
    maps_gradient = _weighted_sum(_shifted(dilated, kernel, (1, 1)), kernel[::-1, ::-1])
    terms = [shifted * _widen(cotangent) for shifted in _shifted(_pad(maps, *padding), kernel, strides)]
    # One reduction over the columns for all terms: XLA would write the terms of separate sums to memory.
    zeros = [np.zeros((), terms[0].dtype)] * len(terms)
    sums = jax.lax.reduce(terms, zeros, lambda left, right: list(map(add, left, right)), (2,))
    kernel_gradient = jnp.stack(sums).sum((1, 2)).reshape(kernel.shape)
    return maps_gradient.astype(maps.dtype), kernel_gradient.astype(kernel.dtype)


shift_and_add.defvjp(_shift_and_add_fwd, _shift_and_add_bwd)


def _shifted(padded: Maps, kernel: DepthwiseKernel, strides: Pair) -> list[Maps]:
    """The maps that each kernel element is multiplied with, in the kernel's row order."""
    sizes = zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    spans = [(length - size) // stride * stride + 1 for length, size, stride in sizes]
    rows = [padded[:, row : row + spans[0] : strides[0]] for row in range(kernel.shape[0])]
    return [maps[:, :, column : column + spans[1] : strides[1]] for maps in rows for column in range(kernel.shape[1])]


def _weighted_sum(shifted: list[Maps], kernel: DepthwiseKernel) -> Maps:
    weights = _widen(kernel).reshape(len(shifted), 1, 1, 1, -1)
    return reduce(add, (maps * weight for maps, weight in zip(shifted, weights, strict=True)))


def _pad(maps: Maps, rows: Pair, columns: Pair, between: Pair = (0, 0)) -> Maps:
    """Add zeros before and after the rows and columns, and `between` them."""
    maps, none = _widen(maps), (0, 0, 0)
    sides = (none, (rows[0], rows[1], between[0]), (columns[0], columns[1], between[1]), none)
    return jax.lax.pad(maps, np.zeros((), maps.dtype), sides)


def _widen(array: Array) -> Array:
    return array.astype(np.promote_types(array.dtype, np.float32))
