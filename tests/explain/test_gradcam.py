"""Grad-CAM against its closed form for a linear head and against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cxrjax.errors import CxrError
from cxrjax.explain.gradcam import _gradcam, gradcam, normalise, resize
from cxrjax.models import create
from cxrjax.models.inputs import prepare
from cxrjax.models.network import Network


def some_images(count: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def features(network: Network, images: np.ndarray) -> np.ndarray:
    return np.asarray(network.model().features(prepare(jnp.asarray(images), network.inputs, network.dtype))["final"])


def test_a_linear_head_gives_class_activation_maps():
    network = Network.of(create("densenet_small", classes=4, pooling="average"))
    images, findings = some_images(5), [2, 0, 3]
    maps = gradcam(network, images, findings, batch_size=2)
    weights = np.asarray(network.params["classifier"]["output"]["kernel"])[:, findings]
    height, width = maps.shape[-2:]
    expected = np.einsum("bhwc,ck->bkhw", features(network, images), weights) / (height * width)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, np.maximum(expected, 0), atol=1e-5 * np.abs(expected).max())
    logits = np.asarray(network.apply(jnp.asarray(images))[0])[:, findings]
    np.testing.assert_allclose(expected.sum((2, 3)), logits, rtol=1e-3, atol=1e-5)  # the biases are zero


def test_a_nonlinear_head_against_finite_differences():
    with jax.enable_x64(True):
        network = Network.of(create("densenet_small", classes=3, hidden=5, dtype="float64", seed=2))
        images = some_images(1)
        maps = gradcam(network, images, [0, 1, 2])[0]
        activations = features(network, images)
        head, step = jax.jit(lambda maps: network.model().head({"final": maps})), 1e-6
        flat = np.eye(activations.size).reshape(-1, *activations.shape[1:]) * step
        up, down = (np.asarray(head(jnp.asarray(activations + sign * flat))) for sign in (1, -1))
        slopes = ((up - down) / (2 * step)).T.reshape(3, *activations.shape[1:])
    alpha = slopes.mean((1, 2))
    expected = np.maximum(np.einsum("hwc,kc->khw", activations[0], alpha), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-8)


def test_bfloat16_gives_nearly_the_same_maps():
    images = some_images(2)
    maps = [
        gradcam(Network.of(create("densenet_small", classes=2, dtype=dtype)), images, [1])
        for dtype in ("float32", "bfloat16")
    ]
    assert maps[1].dtype == np.float32
    np.testing.assert_allclose(maps[1], maps[0], atol=0.05 * maps[0].max())


def test_what_cannot_be_mapped_says_so():
    network, images = Network.of(create("densenet_small", classes=2)), some_images(1)
    for findings in ([2], [-1], []):
        with pytest.raises(CxrError, match="positions 0 to 1"):
            gradcam(network, images, findings)
    with pytest.raises(CxrError, match=r"does not read the feature map 'block2'.*'final'"):
        gradcam(network, images, [0], layer="block2")
    with pytest.raises(CxrError, match="no feature map 'last'"):
        gradcam(network, images, [0], layer="last")
    with pytest.raises(CxrError, match="grey"):
        gradcam(network, np.repeat(images, 3, axis=-1), [0])


@given(hnp.arrays(np.float32, (2, 3, 4, 5), elements=st.just(0.0) | st.floats(2**-20, 2**20, width=32)))
def test_normalised_maps_reach_from_zero_to_one(maps):
    normal = normalise(maps)
    assert normal.dtype == np.float32
    for before, after in zip(maps.reshape(6, 4, 5), normal.reshape(6, 4, 5), strict=True):
        assert after.max() == (1 if before.any() else 0)
        assert after.min() >= 0
        np.testing.assert_allclose(after * before.max(), before, rtol=1e-6)


def test_resizing_interpolates_between_centres():
    maps = np.array([[[[0.0, 1.0], [2.0, 3.0]]]], np.float32)
    large = resize(maps, 4, 8)
    assert large.shape == (1, 1, 4, 8)
    columns = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)
    rows = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)
    np.testing.assert_allclose(large[0, 0], 2 * rows[:, None] + columns, atol=1e-6)


def test_networks_that_differ_in_parameters_share_one_compilation():
    network, images = Network.of(create("densenet_small", classes=2)), some_images(1)
    first, compiled = gradcam(network, images, [0]), _gradcam._cache_size()
    doubled = dataclasses.replace(network, params=jax.tree.map(lambda p: 2 * p, network.params))
    assert not np.allclose(gradcam(doubled, images, [0]), first)
    assert _gradcam._cache_size() == compiled
