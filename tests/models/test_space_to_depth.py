"""Convolution with 2 x 2 pixels as the channels of one place, against XLA's own, and which machines get it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.models.convolution import folds, halving, on_folded
from cxrjax.models.layers import LayerFactory

NHWC = ("NHWC", "HWIO", "NHWC")


def with_gradients(convolve, maps, kernel):
    def both(maps, kernel):
        result, back = jax.vjp(convolve, maps, kernel)
        return result, *back(jnp.cos(jnp.arange(result.size, dtype=result.dtype)).reshape(result.shape))

    return jax.jit(both, compiler_options=FAST_COMPILE)(maps, kernel)


@settings(deadline=None, max_examples=8)
@given(
    halves=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    size=st.integers(1, 7),
    padding=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    channels=st.integers(1, 4),
)
def test_it_is_the_same_convolution_with_the_same_gradients(halves, size, padding, channels):
    generator = np.random.default_rng(size)
    maps, kernel = (
        generator.normal(size=shape)
        for shape in ((2, 2 * halves[0], 2 * halves[1], channels), (size, size, channels, 3))
    )
    sides = (tuple(padding[:2]), tuple(padding[2:]))
    with jax.enable_x64(True):
        assert folds(jnp.asarray(maps), (2, 2))
        direct = with_gradients(
            lambda *a: jax.lax.conv_general_dilated(*a, (2, 2), sides, dimension_numbers=NHWC),
            *map(jnp.asarray, (maps, kernel)),
        )
        folded = with_gradients(
            lambda *a: on_folded(*a, sides, dimension_numbers=NHWC), *map(jnp.asarray, (maps, kernel))
        )
    for ours, wanted in zip(folded, direct, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=1e-12)


def test_odd_sides_many_channels_and_other_strides_are_left_as_they_are():
    assert not folds(jnp.zeros((1, 8, 9, 3)), (2, 2))
    assert not folds(jnp.zeros((1, 8, 8, 5)), (2, 2))
    assert not folds(jnp.zeros((1, 8, 8, 3)), (1, 1))
    assert not folds(jnp.zeros((1, 8, 8, 3)), (2, 1))


@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu", "7x7x3"), ("rocm", "7x7x3"), ("cuda", "4x4x12"), ("tpu", "4x4x12")]
)
def test_tpus_and_cuda_get_it_also_in_the_first_layer_of_a_network(platform, kernel):
    layer = LayerFactory(np.dtype("float32"), 0).conv(3, 8, 7, stride=2, padding=3)
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    for convolve in (layer, lambda maps: halving(maps, layer.kernel[...], (2, 2), ((3, 3), (3, 3)),
                                                 dimension_numbers=NHWC)):  # fmt: skip
        text = jax.jit(convolve).trace(images).lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"stablehlo.convolution.*, tensor<(\d+x\d+x\d+)x8xf32>\)", text) == [kernel]
