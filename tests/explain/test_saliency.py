"""Saliency against closed forms in NumPy, finite differences and the axioms of integrated gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import convolve2d, correlate2d
from scipy.special import logsumexp, softmax

from cxrjax.errors import CxrError
from cxrjax.explain.saliency import METHODS, _activation, baselines, logits, saliency
from cxrjax.models import create
from cxrjax.models.backbone import LSE_SHARPNESS, Backbone, CommonArgs
from cxrjax.models.input_spec import IMAGENET, prepare
from cxrjax.models.network import Network


def some_images(count: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def features(network: Network, images: np.ndarray) -> np.ndarray:
    inputs = prepare(jnp.asarray(images), network.input_spec, network.dtype)
    return np.asarray(network.model().features(inputs)["final"])


def test_a_linear_head_gives_class_activation_maps():
    network = Network.from_model(create("densenet_small", classes=4, pooling="average"))
    images, findings = some_images(5), [2, 0, 3]
    maps = saliency(network, images, findings, batch_size=2)
    weights = np.asarray(network.params["classifier"]["output"]["kernel"])[:, findings]
    height, width = maps.shape[-2:]
    expected = np.einsum("bhwc,ck->bkhw", features(network, images), weights) / (height * width)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, np.maximum(expected, 0), atol=1e-5 * np.abs(expected).max())
    logits = np.asarray(network.apply(jnp.asarray(images))[0])[:, findings]
    np.testing.assert_allclose(expected.sum((2, 3)), logits, rtol=1e-3, atol=1e-5)  # the biases are zero


def test_a_nonlinear_head_against_finite_differences():
    with jax.enable_x64(True):
        network = Network.from_model(create("densenet_small", classes=3, hidden=5, dtype="float64", seed=2))
        images = some_images(1)
        maps = saliency(network, images, [0, 1, 2])[0]
        activations = features(network, images)
        head, step = jax.jit(lambda maps: network.model().head({"final": maps})), 1e-6
        flat = np.eye(activations.size).reshape(-1, *activations.shape[1:]) * step
        up, down = (np.asarray(head(jnp.asarray(activations + sign * flat))) for sign in (1, -1))
        slopes = ((up - down) / (2 * step)).T.reshape(3, *activations.shape[1:])
    alpha = slopes.mean((1, 2))
    expected = np.maximum(np.einsum("hwc,kc->khw", activations[0], alpha), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-8)


def sharp_network() -> Network:
    """A head whose gradient differs from index to index, and has both signs."""
    return Network.from_model(create("simple_cnn", classes=3, dtype="float64", seed=3, pooling="log-sum-exp", hidden=0))


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "layercam"])
def test_class_activation_maps_match_the_papers(method):
    """NumPy in float64, with log-sum-exp pooling's gradient worked out by hand and Grad-CAM++'s exp(S) left in."""
    with jax.enable_x64(True):
        network, images = sharp_network(), some_images(3, 40)
        maps = saliency(network, images, [2, 0], method=method, signed=True)
        a = features(network, images)
        kernel, bias = (np.asarray(network.params["classifier"]["output"][name]) for name in ("kernel", "bias"))
        outputs = logits(network, images)
    positions = a.shape[1] * a.shape[2]
    pooled = (logsumexp(LSE_SHARPNESS * a, axis=(1, 2)) - np.log(positions)) / LSE_SHARPNESS
    score = pooled @ kernel + bias
    np.testing.assert_allclose(outputs, score, rtol=1e-9)
    for index, finding in enumerate([2, 0]):
        g = softmax(LSE_SHARPNESS * a, axis=(1, 2)) * kernel[:, finding]
        first, second, third = (np.exp(score[:, finding])[:, None, None, None] * g**n for n in (1, 2, 3))
        if method == "gradcam":
            expected = (g.mean((1, 2), keepdims=True) * a).sum(-1)
        elif method == "layercam":
            expected = (np.maximum(g, 0) * a).sum(-1)
        else:
            below = 2 * second + a.sum((1, 2), keepdims=True) * third
            alpha = np.divide(second, below, out=np.zeros_like(second), where=below != 0)
            weights = (alpha * np.maximum(first, 0)).sum((1, 2), keepdims=True)
            expected = (weights * a).sum(-1) / np.exp(score[:, finding])[:, None, None]
        assert np.ptp(g, axis=(1, 2)).max() > 0.1 * np.abs(g).max()
        np.testing.assert_allclose(maps[:, index], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


class Powers(Backbone):
    """A convolution without padding, a power, the mean, a linear layer: gradients are polynomials in the image."""

    def __init__(self, power: int):
        super().__init__(CommonArgs(2, IMAGENET, np.dtype("float64"), "none", 0))
        rng = np.random.default_rng(5)
        self.power = power
        self.kernel = nnx.Param(jnp.asarray(rng.standard_normal((3, 3, 3, 4)) / 5))
        self.output = nnx.Param(jnp.asarray(rng.standard_normal((4, 2))))

    def features(self, images, *, train=False, key=None):
        maps = jax.lax.conv_general_dilated(
            images, self.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return {"final": maps**self.power}

    def head(self, features, *, train=False, key=None):
        return features["final"].mean((1, 2)) @ self.output[...]


@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_integrated_gradients_of_a_quadratic_network_are_the_midpoint_gradient(baseline):
    with jax.enable_x64(True):
        network, images = Network.from_model(Powers(2)), some_images(2, 12)
        maps = saliency(network, images, [1, 0], method="integrated", baseline=baseline, steps=3, signed=True)
        kernel, output = (np.asarray(network.params[name]) for name in ("kernel", "output"))
        start = baselines(images, baseline)
        end, begin = (np.asarray(prepare(jnp.asarray(x), IMAGENET, jnp.float64)) for x in (images, start))
        gained = logits(network, images) - logits(network, start)
    assert set(np.unique(start[0])) == ({0} if baseline == "black" else {round(images[0].mean())})
    middle = (begin + end) / 2
    for image in range(2):
        response = [
            sum(correlate2d(middle[image, :, :, c], kernel[:, :, c, k], "valid") for c in range(3)) for k in range(4)
        ]
        for index, finding in enumerate([1, 0]):
            slope = [
                sum(
                    2 * output[k, finding] / response[k].size * convolve2d(response[k], kernel[:, :, c, k])
                    for k in range(4)
                )
                for c in range(3)
            ]
            expected = (np.stack(slope, -1) * (end - begin)[image]).sum(-1)
            np.testing.assert_allclose(maps[image, index], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
            assert maps[image, index].sum(dtype=np.float64) == pytest.approx(gained[image, finding], rel=1e-5)
    assert (maps < 0).any()


def test_completeness_error_falls_quadratically_with_steps():
    """Twice the steps, a quarter of the error; of a third power that is exact."""
    with jax.enable_x64(True):
        network, images = Network.from_model(Powers(3)), some_images(2, 12)
        gained = logits(network, images) - logits(network, np.zeros_like(images))
        errors = [
            saliency(network, images, [0, 1], method="integrated", steps=steps, signed=True).sum((2, 3), np.float64)
            - gained
            for steps in (2, 4)
        ]
    np.testing.assert_allclose(errors[0], 4 * errors[1], rtol=1e-3)
    assert np.abs(errors[0]).min() > 1e-3 * np.abs(gained).max()


def test_attributions_sum_to_the_difference_of_logits():
    network, images = (
        Network.from_model(create("densenet_small", classes=3, seed=1, block_config=(1, 1), growth_rate=4)),
        some_images(3),
    )
    gained = logits(network, images) - logits(network, np.zeros_like(images))
    maps = saliency(network, images, [2, 1], method="integrated", steps=200, signed=True)
    assert maps.shape == (3, 2, 64, 64)
    np.testing.assert_allclose(maps.sum((2, 3)), gained[:, [2, 1]], atol=0.01 * np.abs(gained).max())
    unsigned = saliency(network, images, [2, 1], method="integrated", steps=200)
    np.testing.assert_array_equal(unsigned, np.maximum(maps, 0))


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_batches_or_other_findings(method):
    network, images = (
        Network.from_model(create("densenet_small", classes=3, seed=1, block_config=(1, 1), growth_rate=4)),
        some_images(5),
    )
    done = []
    whole = saliency(network, images, [2, 0, 1], method=method, steps=4, advance=done.append)
    assert whole.dtype == np.float32
    assert 0 <= whole.min() < whole.max()
    assert sum(done) == 5
    for finding, map in zip([2, 0, 1], whole.swapaxes(0, 1), strict=True):
        alone = saliency(network, images, [finding], method=method, steps=4, batch_size=2)
        np.testing.assert_allclose(alone[:, 0], map, atol=1e-4 * max(map.max(), 1e-3))
    signed = saliency(network, images, [2, 0, 1], method=method, steps=4, signed=True)
    np.testing.assert_array_equal(np.maximum(signed, 0), whole)


def test_large_images_process_findings_in_groups(monkeypatch):
    network, images = (
        Network.from_model(create("densenet_small", classes=3, seed=1, block_config=(1, 1), growth_rate=4)),
        some_images(2),
    )
    together = saliency(network, images, [2, 0, 1], method="integrated", steps=2)
    monkeypatch.setattr("cxrjax.explain.saliency._PIXELS_PER_PASS", 2 * images.size)
    np.testing.assert_allclose(
        saliency(network, images, [2, 0, 1], method="integrated", steps=2, batch_size=2), together, atol=1e-6
    )


def test_bfloat16_gives_nearly_the_same_maps():
    images = some_images(2)
    maps = [
        saliency(Network.from_model(create("densenet_small", classes=2, dtype=dtype)), images, [1])
        for dtype in ("float32", "bfloat16")
    ]
    assert maps[1].dtype == np.float32
    np.testing.assert_allclose(maps[1], maps[0], atol=0.05 * maps[0].max())


def test_bad_saliency_options_are_errors():
    network, images = Network.from_model(create("densenet_small", classes=2)), some_images(1)
    for findings in ([2], [-1], []):
        with pytest.raises(CxrError, match="indices 0 to 1"):
            saliency(network, images, findings)
    with pytest.raises(CxrError, match=r"does not read the feature map 'block2'.*'final'"):
        saliency(network, images, [0], layer="block2")
    with pytest.raises(CxrError, match="no feature map 'last'"):
        saliency(network, images, [0], layer="last")
    for options, message in [
        ({"method": "guess"}, "no method 'guess'; choose one of gradcam, gradcam"),
        ({"method": "integrated", "baseline": "white"}, "no baseline 'white'; choose one of black, mean"),
        ({"method": "integrated", "layer": "final"}, "leave out the layer 'final'"),
        ({"method": "integrated", "steps": 0}, "steps must be at least 1"),
    ]:
        with pytest.raises(CxrError, match=message):
            saliency(network, images, [0], **options)
    with pytest.raises(CxrError, match="grey"):
        saliency(network, np.repeat(images, 3, axis=-1), [0])


def test_networks_that_differ_in_parameters_share_one_compilation():
    network, images = Network.from_model(create("densenet_small", classes=2)), some_images(1)
    first, compiled = saliency(network, images, [0]), _activation._cache_size()
    doubled = dataclasses.replace(network, params=jax.tree.map(lambda p: 2 * p, network.params))
    assert not np.allclose(saliency(doubled, images, [0]), first)
    assert _activation._cache_size() == compiled
