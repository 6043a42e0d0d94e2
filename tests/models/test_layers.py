import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.errors import CxrError
from cxrjax.models.backbone import Classifier
from cxrjax.models.layers import BatchNorm, LayerFactory
from cxrjax.models.pooling import average_pool, max_pool


def test_batch_norm_agrees_with_its_closed_form():
    rng = np.random.default_rng(1)
    maps = rng.normal(3.0, 2.0, (2, 3, 5, 4))
    norm = BatchNorm(4, dtype=jnp.float32)
    norm.scale[...] = scale = jnp.array([0.5, 1.0, 2.0, -1.0])
    norm.bias[...] = bias = jnp.array([0.0, 1.0, -1.0, 0.3])
    normal = (maps - maps.mean((0, 1, 2))) / np.sqrt(maps.var((0, 1, 2)) + 1e-5)
    ours = norm(jnp.asarray(maps, jnp.float32), train=True)
    np.testing.assert_allclose(ours, normal * np.asarray(scale) + np.asarray(bias), atol=2e-6)
    # PyTorch: running = 0.9 running + 0.1 batch, from 0 and 1, with the unbiased variance.
    mean, var = 0.1 * maps.mean((0, 1, 2)), 0.9 + 0.1 * maps.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    ours = norm(jnp.asarray(maps, jnp.float32), train=False)
    expected = (maps - mean) / np.sqrt(var + 1e-5) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)


def test_batch_norm_of_bfloat16_computes_in_float32():
    maps = jnp.asarray(np.random.default_rng(2).normal(100, 1, (4, 8, 8, 3)), jnp.bfloat16)
    norm = BatchNorm(3, dtype=jnp.bfloat16)
    ours = norm(maps, train=True)
    assert ours.dtype == jnp.bfloat16
    assert norm.mean.dtype == norm.var.dtype == jnp.float32
    exact = np.asarray(maps, np.float64)
    np.testing.assert_allclose(norm.mean[...], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)
    normal = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
    np.testing.assert_allclose(np.asarray(ours, np.float64), normal, rtol=2**-8, atol=2e-3)


def test_batch_norm_does_not_cancel_where_the_running_mean_is_near():
    """Far from 0, E[x^2] - E[x]^2 has no digit left in float32; moments about the running mean keep theirs."""
    maps = np.random.default_rng(3).normal(10_000, 1, (4, 8, 8, 1))
    norm = BatchNorm(1, dtype=jnp.float32)
    norm.mean[...] = jnp.array([10_000.5])
    norm(jnp.asarray(maps, jnp.float32), train=True)
    exact = maps.astype(np.float32).astype(np.float64).var(ddof=1)
    np.testing.assert_allclose((norm.var[0] - 0.9) / 0.1, exact, rtol=1e-4)


def test_batch_norm_gradient_agrees_with_finite_differences():
    with jax.enable_x64(True):
        maps = jnp.asarray(np.random.default_rng(4).normal(1, 2, (2, 2, 2, 2)))
        weights = jnp.asarray(np.random.default_rng(5).normal(size=maps.shape))

        def loss(maps):
            return (BatchNorm(2, dtype=jnp.float64)(maps, train=True) * weights).sum()

        gradient = np.asarray(jax.grad(loss)(maps)).ravel()
        loss = jax.jit(loss)
        for k, step in enumerate(np.eye(maps.size).reshape(maps.size, *maps.shape) * 1e-5):
            assert abs((loss(maps + step) - loss(maps - step)) / 2e-5 - gradient[k]) < 1e-7


@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 4), (9, 7)])
def test_pooling_leaves_out_incomplete_windows(height, width):
    maps = np.random.default_rng(height * 10 + width).normal(size=(1, height, width, 2)).astype(np.float32)
    windows = maps[:, : height // 2 * 2, : width // 2 * 2].reshape(1, height // 2, 2, width // 2, 2, 2)
    np.testing.assert_array_equal(max_pool(jnp.asarray(maps), 2, 2), windows.max((2, 4)))
    np.testing.assert_allclose(average_pool(jnp.asarray(maps), 2, 2), windows.mean((2, 4)), atol=1e-6)
    padded = max_pool(jnp.asarray(maps), 3, 2, padding=1)
    assert padded.shape == (1, (height + 1) // 2, (width + 1) // 2, 2)
    np.testing.assert_array_equal(padded[0, 0, 0], maps[0, :2, :2].max((0, 1)))


@settings(deadline=None, max_examples=8)
@given(
    sides=st.tuples(st.integers(4, 9), st.integers(4, 9)), window=st.integers(1, 4), stride=st.integers(1, 4),
    data=st.data(),
)  # fmt: skip
def test_max_pooling_has_xlas_gradient(sides, window, stride, data):
    padding = data.draw(st.integers(0, window // 2))
    maps = np.random.default_rng(window).permutation(2 * sides[0] * sides[1] * 3).reshape(2, *sides, 3).astype(float)
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    xla_pool = lambda maps: jax.lax.reduce_window(  # noqa: E731
        maps, -np.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), around
    )
    shape = jax.eval_shape(xla_pool, maps).shape
    change = np.random.default_rng(0).integers(-1000, 1000, shape).astype(float)  # sums are exact in any order

    def pooled_and_back(pool, maps, change):
        pooled, back = jax.vjp(pool, maps)
        return pooled, back(change)[0]

    with jax.enable_x64(True):
        ours, expected = (
            jax.jit(partial(pooled_and_back, pool), compiler_options=FAST_COMPILE)(maps, change)
            for pool in (lambda maps: max_pool(maps, window, stride, padding), xla_pool)
        )
        assert expected[0].dtype == np.float64
        jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_max_pooling_gradients_are_rounded_once_and_go_to_the_first_maximum():
    changes = np.random.default_rng(3).normal(size=(1, 4, 4, 2)).astype(np.float32)
    maps = np.zeros((1, 9, 9, 2), np.float32)
    maps[:, 2::2, 2::2] = 1  # each the maximum of four windows of 3 x 3
    maps[:, 0, 0] = maps[:, 0, 1] = 2
    in_bfloat16 = jnp.asarray(changes, jnp.bfloat16)
    _, back = jax.vjp(lambda maps: max_pool(maps, 3, 2), jnp.asarray(maps, jnp.bfloat16))
    _, exact = jax.vjp(lambda maps: max_pool(maps, 3, 2), jnp.asarray(maps))
    gradient, [expected] = back(in_bfloat16)[0], exact(in_bfloat16.astype(jnp.float32))
    np.testing.assert_array_equal(gradient, expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(expected[0, 0, :2], [in_bfloat16[0, 0, 0], [0, 0]])


def test_convolution_pads_and_strides_as_torch():
    factory = LayerFactory(jnp.float32, 0)
    images = np.random.default_rng(6).normal(size=(1, 7, 6, 2)).astype(np.float32)
    conv = factory.conv(2, 3, 3, stride=2, padding=1)
    padded, kernel = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), np.asarray(conv.kernel[...])
    ours = conv(jnp.asarray(images))
    assert ours.shape == (1, 4, 3, 3)
    for row, column in np.ndindex(4, 3):
        patch = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
        np.testing.assert_allclose(ours[0, row, column], np.tensordot(patch, kernel, 3), atol=1e-5)


@pytest.mark.parametrize(("pooling", "width"), [("average", 5), ("max", 5), ("average+max", 10)])
def test_pooling_of_the_classifier(pooling, width):
    maps = np.random.default_rng(7).normal(size=(2, 3, 4, 5)).astype(np.float32)
    head = Classifier(LayerFactory(jnp.float32, 0), 5, 3, pooling=pooling)
    pooled = {"average": [maps.mean((1, 2))], "max": [maps.max((1, 2))]}
    pooled["average+max"] = pooled["average"] + pooled["max"]
    vector = np.concatenate(pooled[pooling], -1)
    kernel = np.asarray(head.output.kernel[...])
    assert kernel.shape == (width, 3)
    np.testing.assert_allclose(head(jnp.asarray(maps), train=False), vector @ kernel, atol=1e-5)


def test_dropout_keeps_the_mean_and_needs_a_key_in_training():
    head = Classifier(LayerFactory(jnp.float32, 0), 2000, 1, dropout=0.4)
    head.output.kernel[...] = jnp.ones((2000, 1)) / 2000
    maps = jnp.ones((3, 1, 1, 2000))
    np.testing.assert_allclose(head(maps, train=False), 1.0, rtol=1e-5)
    dropped = head(maps, train=True, key=jax.random.key(0))[:, 0]
    assert len(set(map(float, dropped))) == 3
    np.testing.assert_allclose(dropped, 1.0, atol=0.1)  # 5 standard deviations: sqrt(.4 / .6 / 2000) = .018
    np.testing.assert_array_equal(dropped, head(maps, train=False, key=jax.random.key(0))[:, 0])
    with pytest.raises(CxrError, match="random key"):
        head(maps, train=True)


@pytest.mark.parametrize(("argnums", "convolutions"), [((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_the_kernel_gradient_comes_first_and_only_needed_gradients_are_computed(argnums, convolutions):
    """One convolution forward, and one for each gradient that is needed."""
    layer = LayerFactory("float32", 0).conv(3, 4, 3, padding=1)
    graph, kernel = nnx.split(layer)

    def loss(maps, kernel):
        return jnp.square(nnx.merge(graph, kernel)(maps)).sum()

    def xla_loss(maps, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        result = jax.lax.conv_general_dilated(maps, kernel["kernel"][...], (1, 1), "SAME", dimension_numbers=dimensions)
        return jnp.square(result).sum()

    maps = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    gradient = jax.jit(jax.grad(loss, argnums))
    text = gradient.lower(maps, kernel).compile().as_text()
    assert len(re.findall(r" convolution\(", text)) == convolutions
    assert ("optimization_barrier" in str(gradient.trace(maps, kernel).jaxpr)) == (len(argnums) == 2)
    for ours, expected in zip(gradient(maps, kernel), jax.grad(xla_loss, argnums)(maps, kernel), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)
