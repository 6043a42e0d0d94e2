"""The sum of shifted maps against XLA's grouped convolution and the definition, in float64."""

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

from cxrjax.models.convolution import depthwise, sum_of_shifts

NHWC = ("NHWC", "HWIO", "NHWC")


def drawn(*shape, dtype: type = np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def grouped(maps, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        maps, kernel, strides, padding, dimension_numbers=NHWC, feature_group_count=maps.shape[-1]
    )


def by_windows(maps, kernel, strides, padding):
    """The definition: every window is taken out and weighted. Its gradients are automatic, and no convolutions."""
    padded = jnp.pad(maps, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        np.arange(0, length - size + 1, stride)[:, None] + np.arange(size)
        for length, size, stride in zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    )
    windows = padded[:, rows][:, :, :, columns]  # image, row, row of the kernel, column, column of the kernel, channel
    return jnp.einsum("nriksc,isc->nrkc", windows, kernel[:, :, 0])


def with_gradients(function, maps, kernel, strides, padding):
    """The result, and gradients by maps and kernel of its product with drawn numbers."""
    result, pull = jax.vjp(lambda maps, kernel: function(maps, kernel, strides, padding), maps, kernel)
    return result, *pull(jnp.asarray(drawn(*result.shape, seed=2), result.dtype))


compiled = partial(jax.jit, static_argnums=(0, 3, 4), compiler_options=FAST_COMPILE)(with_gradients)


def assert_same(reference, size, kernel, strides, padding, channels):
    with jax.enable_x64(True):
        maps, weights = drawn(2, *size, channels), drawn(*kernel, 1, channels, seed=1)
        ours = compiled(sum_of_shifts, maps, weights, strides, padding)
        theirs = compiled(reference, maps, weights, strides, padding)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# By the definition, as XLA ends the program over the gradients of some of these convolutions.
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    channels=st.integers(2, 4),
)
@settings(max_examples=15, deadline=None)
def test_it_is_the_sum_over_windows_with_its_gradients(size, kernel, strides, padding, channels):
    assume(all(n + sum(p) >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    assert_same(by_windows, size, kernel, strides, padding, channels)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("side", "padding"), [(3, (1, 1)), (3, (0, 1)), (5, (2, 2)), (5, (1, 2))])
def test_it_is_the_grouped_convolution_with_its_gradients(side, padding, stride):
    assert_same(grouped, (12, 10), (side, side), (stride, stride), (padding, padding), 3)


def test_bfloat16_is_summed_in_float32():
    maps, kernel = jnp.asarray(drawn(2, 9, 8, 4), jnp.bfloat16), jnp.asarray(drawn(5, 5, 1, 4, seed=1), jnp.bfloat16)
    exact = compiled(sum_of_shifts, maps.astype(jnp.float32), kernel.astype(jnp.float32), (2, 2), ((2, 2), (2, 2)))
    result, *gradients = compiled(sum_of_shifts, maps, kernel, (2, 2), ((2, 2), (2, 2)))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, exact[0].astype(jnp.bfloat16))  # rounded once, at the end
    for ours, wide in zip(gradients, exact[1:], strict=True):
        assert ours.dtype == jnp.bfloat16
        difference = np.asarray(ours, np.float32) - wide
        assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(wide)  # their change was rounded as well


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_only_cpus_get_the_sum(platform, convolutions):
    def step(maps, kernel):
        def loss(maps, kernel):
            options = {"dimension_numbers": NHWC, "feature_group_count": 3}
            return jnp.square(depthwise(maps, kernel, (1, 1), ((1, 1), (1, 1)), **options)).sum()

        return jax.grad(loss, (0, 1))(maps, kernel)

    shapes = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 1, 3), jnp.float32)
    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_rows_over_devices_need_halos_only():
    def step(maps, kernel):
        return with_gradients(sum_of_shifts, maps, kernel, (2, 2), ((2, 2), (2, 2)))

    maps, kernel = drawn(2, 32, 16, 3, dtype=np.float32), drawn(5, 5, 1, 3, dtype=np.float32, seed=1)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "space"))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data", "space"), PartitionSpec()))
    placed = jax.device_put(maps, rows), jax.device_put(kernel, whole)
    program = jax.jit(step, out_shardings=(rows, rows, whole)).lower(*placed).compile()
    assert set(re.findall(r" (all-[a-z]+|collective-permute)(?:-start)?\(", program.as_text())) == {
        "all-reduce",  # the kernel's gradient
        "collective-permute",
    }
    for ours, alone in zip(program(*placed), jax.jit(step)(maps, kernel), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-4)
