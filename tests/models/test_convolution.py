"""Depthwise and space-to-depth convolutions against XLA's own and the definition, in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cxrjax.models.convolution import (
    depthwise_conv,
    shift_and_add,
    space_to_depth_conv,
    stem_conv,
    suits_space_to_depth,
)
from cxrjax.models.layers import LayerFactory

NHWC = ("NHWC", "HWIO", "NHWC")


def random(*shape, dtype: type = np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def grouped_conv(maps, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        maps, kernel, strides, padding, dimension_numbers=NHWC, feature_group_count=maps.shape[-1]
    )


def window_sum(maps, kernel, strides, padding):
    """The definition of a depthwise convolution, from explicit windows; its gradients use no convolution."""
    padded = jnp.pad(maps, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        np.arange(0, length - size + 1, stride)[:, None] + np.arange(size)
        for length, size, stride in zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    )
    windows = padded[:, rows][:, :, :, columns]  # image, row, row of the kernel, column, column of the kernel, channel
    return jnp.einsum("nriksc,isc->nrkc", windows, kernel[:, :, 0])


def with_gradients(function, maps, kernel, strides, padding):
    """The result, and the gradients by maps and kernel of its product with random numbers."""
    result, vjp = jax.vjp(lambda maps, kernel: function(maps, kernel, strides, padding), maps, kernel)
    return result, *vjp(jnp.asarray(random(*result.shape, seed=2), result.dtype))


compiled = partial(jax.jit, static_argnums=(0, 3, 4), compiler_options=FAST_COMPILE)(with_gradients)


def assert_same(reference, size, kernel_size, strides, padding, channels):
    with jax.enable_x64(True):
        maps, kernel = random(2, *size, channels), random(*kernel_size, 1, channels, seed=1)
        ours = compiled(shift_and_add, maps, kernel, strides, padding)
        theirs = compiled(reference, maps, kernel, strides, padding)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# Against the definition: XLA aborts the program over the gradients of some of these convolutions.
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    channels=st.integers(2, 4),
)
@settings(max_examples=15, deadline=None)
def test_shift_and_add_equals_the_window_sum(size, kernel_size, strides, padding, channels):
    assume(all(n + sum(p) >= k for n, p, k in zip(size, padding, kernel_size, strict=True)))
    assert_same(window_sum, size, kernel_size, strides, padding, channels)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("side", "padding"), [(3, (1, 1)), (3, (0, 1)), (5, (2, 2)), (5, (1, 2))])
def test_shift_and_add_equals_the_grouped_convolution(side, padding, stride):
    assert_same(grouped_conv, (12, 10), (side, side), (stride, stride), (padding, padding), 3)


def test_bfloat16_is_summed_in_float32():
    maps, kernel = jnp.asarray(random(2, 9, 8, 4), jnp.bfloat16), jnp.asarray(random(5, 5, 1, 4, seed=1), jnp.bfloat16)
    exact = compiled(shift_and_add, maps.astype(jnp.float32), kernel.astype(jnp.float32), (2, 2), ((2, 2), (2, 2)))
    result, *gradients = compiled(shift_and_add, maps, kernel, (2, 2), ((2, 2), (2, 2)))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, exact[0].astype(jnp.bfloat16))  # rounded once, at the end
    for ours, wide in zip(gradients, exact[1:], strict=True):
        assert ours.dtype == jnp.bfloat16
        difference = np.asarray(ours, np.float32) - wide
        assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(wide)  # the cotangent was rounded as well


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_only_cpus_shift_and_add(platform, convolutions):
    def step(maps, kernel):
        def loss(maps, kernel):
            options = {"dimension_numbers": NHWC, "feature_group_count": 3}
            return jnp.square(depthwise_conv(maps, kernel, (1, 1), ((1, 1), (1, 1)), **options)).sum()

        return jax.grad(loss, (0, 1))(maps, kernel)

    shapes = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 1, 3), jnp.float32)
    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_sharded_rows_exchange_halos_only():
    def step(maps, kernel):
        return with_gradients(shift_and_add, maps, kernel, (2, 2), ((2, 2), (2, 2)))

    maps, kernel = random(2, 32, 16, 3, dtype=np.float32), random(5, 5, 1, 3, dtype=np.float32, seed=1)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "space"))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data", "space"), PartitionSpec()))
    sharded = jax.device_put(maps, rows), jax.device_put(kernel, whole)
    program = jax.jit(step, out_shardings=(rows, rows, whole)).lower(*sharded).compile()
    assert set(re.findall(r" (all-[a-z]+|collective-permute)(?:-start)?\(", program.as_text())) == {
        "all-reduce",  # the kernel's gradient
        "collective-permute",
    }
    for result, expected in zip(program(*sharded), jax.jit(step)(maps, kernel), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=8)
@given(
    halves=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    size=st.integers(1, 7),
    padding=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    channels=st.integers(1, 4),
)
def test_space_to_depth_equals_the_direct_convolution(halves, size, padding, channels):
    maps, kernel = random(2, 2 * halves[0], 2 * halves[1], channels), random(size, size, channels, 3, seed=1)

    def direct(maps, kernel, strides, padding):
        return jax.lax.conv_general_dilated(maps, kernel, strides, padding, dimension_numbers=NHWC)

    def by_space_to_depth(maps, kernel, strides, padding):
        assert suits_space_to_depth(maps, strides)
        return space_to_depth_conv(maps, kernel, padding, dimension_numbers=NHWC)

    with jax.enable_x64(True):
        results, expected = (compiled(f, maps, kernel, (2, 2), padding) for f in (by_space_to_depth, direct))
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((1, 8, 9, 3), (2, 2)), ((1, 8, 8, 5), (2, 2)), ((1, 8, 8, 3), (1, 1)), ((1, 8, 8, 3), (2, 1))],
)
def test_odd_sides_many_channels_and_other_strides_do_not_suit_space_to_depth(shape, strides):
    assert not suits_space_to_depth(jnp.zeros(shape), strides)


@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu", "7x7x3"), ("rocm", "7x7x3"), ("cuda", "4x4x12"), ("tpu", "4x4x12")]
)
def test_only_tpus_and_cuda_use_space_to_depth(platform, kernel):
    layer = LayerFactory(np.dtype("float32"), 0).conv(3, 8, 7, stride=2, padding=3)
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)

    def function(maps):
        return stem_conv(maps, layer.kernel[...], (2, 2), ((3, 3), (3, 3)), dimension_numbers=NHWC)

    for convolve in (layer, function):
        text = jax.jit(convolve).trace(images).lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"stablehlo.convolution.*, tensor<(\d+x\d+x\d+)x8xf32>\)", text) == [kernel]
