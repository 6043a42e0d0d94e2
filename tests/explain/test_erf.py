"""Effective receptive fields against kernels convolved by SciPy, Jacobians and the known variance of random signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.errors import CxrError
from cxrjax.explain import erf
from cxrjax.models import create
from cxrjax.models.backbone import Backbone, CommonArgs
from cxrjax.models.input_spec import GREY, IMAGENET, prepare
from cxrjax.models.network import Network

SIDE = 24

SMALL = {"classes": 2, "seed": 1, "block_config": (1, 1), "growth_rate": 4}


class TwoConvolutions(Backbone):
    """Linear, so that its receptive field is the convolution of its kernels, whatever the image."""

    def __init__(self, channels: int, outputs: int):
        super().__init__(CommonArgs(1, GREY, np.dtype("float64"), "none", 0))
        options = {"padding": "VALID", "use_bias": False, "param_dtype": jnp.float64, "rngs": nnx.Rngs(3)}
        self.first = nnx.Conv(1, channels, (3, 3), **options)
        self.second = nnx.Conv(channels, outputs, (4, 4), **options)

    def features(self, images, *, train=False):
        first = self.first(images)
        return {"first": first, "second": self.second(first)}


def kernels(network: Network) -> np.ndarray:
    """What both convolutions do in a row, f64[outputs, 6, 6], in features per grey value (GREY divides by its std)."""
    first, second = (np.asarray(network.params[name]["kernel"]) for name in ("first", "second"))
    pairs = [
        [scipy.signal.convolve2d(first[:, :, 0, c], second[:, :, c, k]) for c in range(first.shape[3])]
        for k in range(second.shape[3])
    ]
    return np.array(pairs).sum(1) / GREY.std[0]


def placed(kernel: np.ndarray) -> np.ndarray:
    """The kernel where the central position reads: 19 positions are left after both convolutions, the centre is 9."""
    field = np.zeros((SIDE, SIDE))
    field[9:15, 9:15] = kernel
    return field


def some_images(count: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def linear():
    with jax.enable_x64(True):
        return Network.from_model(TwoConvolutions(3, 5))


@pytest.fixture(scope="module")
def network():
    return Network.from_model(create("densenet_small", classes=2, seed=1, block_config=(1, 1), growth_rate=4))


def test_estimators_of_a_linear_network_are_convolved_kernels(linear):
    with jax.enable_x64(True):
        images, kernel = some_images(3), kernels(linear)
        exact = erf.measure(linear, images, estimator="exact", batch_size=2, parallel=2)
        np.testing.assert_allclose(exact.map, placed((kernel**2).mean(0)), rtol=1e-9, atol=1e-15)
        assert (exact.layer, exact.position, exact.channels, exact.passes) == ("second", (9, 9), 5, 5)

        plain = erf.measure(linear, images, estimator="sum", batch_size=2)
        np.testing.assert_allclose(plain.map, placed(kernel.sum(0) ** 2 / 5), rtol=1e-9, atol=1e-15)


def test_random_signs_are_unbiased_with_the_expected_variance(linear):
    with jax.enable_x64(True):
        images, probes = some_images(4), 64
        probe = erf.measure(linear, images, estimator="probe", probes=probes, parallel=16).map[9:15, 9:15]
    kernel = kernels(linear)
    exact = (kernel**2).mean(0)
    # Var (sum_k s_k g_k)^2 = 2 ((sum g^2)^2 - sum g^4) for independent signs s_k
    variance = 2 * ((kernel**2).sum(0) ** 2 - (kernel**4).sum(0)) / 5**2
    z = (probe - exact) / np.sqrt(variance / (probes * len(images)))
    assert np.abs(z).max() < 5
    assert 0.3 < z.std() < 2  # the pixels share their signs, so this is loose


def test_the_sum_differs_by_the_products_of_different_channels(linear):
    """(sum_k g_k)^2 / K = mean of g_k^2 + 2/K sum over pairs of g_k g_l; no number of images takes the second away."""
    with jax.enable_x64(True):
        images, kernel = some_images(3), kernels(linear)
        exact, plain = (erf.measure(linear, images, estimator=e).map for e in ("exact", "sum"))
    pairs = sum(kernel[k] * kernel[m] for k in range(5) for m in range(k))
    np.testing.assert_allclose(plain - exact, placed(2 / 5 * pairs), rtol=1e-8, atol=1e-14)
    assert np.abs(pairs).max() > 0.1 * (kernel**2).sum(0).max()


def test_random_signs_are_unbiased_for_a_network_with_kinks_and_norms():
    """The mean over seeds is within five of its own standard errors at every pixel; the plain sum is not."""
    with jax.enable_x64(True):
        network = Network.from_model(create("densenet_small", dtype="float64", **SMALL))
        images, options = some_images(2, 32), {"translate": 0.0, "batch_size": 2, "parallel": 8}
        exact, plain = (erf.measure(network, images, estimator=e, **options).map for e in ("exact", "sum"))
        seeds = [erf.measure(network, images, probes=8, seed=seed, **options).map for seed in range(40)]
    mean, error = np.mean(seeds, axis=0), np.std(seeds, axis=0, ddof=1) / np.sqrt(len(seeds))
    counts = exact > 1e-3 * exact.max()
    z = (mean - exact)[counts] / error[counts]
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 1  # the pixels share their signs, so that they err together
    assert np.abs((plain - exact)[counts] / error[counts]).max() > 20


def test_estimators_agree_for_one_channel():
    with jax.enable_x64(True):
        network, images = Network.from_model(TwoConvolutions(2, 1)), some_images(2)
        exact, probe, plain = (
            erf.measure(network, images, estimator=e, probes=2).map for e in ("exact", "probe", "sum")
        )
    np.testing.assert_allclose(probe, exact, rtol=1e-12)
    np.testing.assert_allclose(plain, exact, rtol=1e-12)


def test_densenet_matches_its_jacobian():
    with jax.enable_x64(True):
        network = Network.from_model(create("simple_cnn", classes=2, dtype="float64", input_spec=IMAGENET))
        images = some_images(2, 24)
        measured = erf.measure(network, images, estimator="exact", translate=0, layer="stage2", parallel=32)

        def centre(prepared):
            maps = network.model().features(prepared)["stage2"]
            return maps[:, maps.shape[1] // 2, maps.shape[2] // 2]

        prepared = prepare(jnp.asarray(images), IMAGENET, jnp.float64)
        whole = np.asarray(jax.jit(jax.jacrev(centre))(prepared))  # [N, K, N, H, W, 3]
        jacobian = np.stack([whole[i, :, i] for i in range(2)])
    per_grey = (jacobian / np.array(IMAGENET.std)).sum(-1)
    np.testing.assert_allclose(measured.map, (per_grey**2).mean((0, 1)), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("estimator", ["exact", "probe"])
def test_batches_and_chunks_change_nothing(network, estimator):
    images = some_images(5, 32)
    one = erf.measure(network, images, estimator=estimator, probes=6, batch_size=5, parallel=32)
    done = []
    other = erf.measure(network, images, estimator=estimator, probes=6, batch_size=2, parallel=4, advance=done.append)
    assert sum(done) == 5 * other.passes
    np.testing.assert_allclose(other.map, one.map, rtol=1e-3, atol=1e-6 * one.map.max())
    assert other.area_fraction == pytest.approx(one.area_fraction, abs=0.01)
    moved = erf.measure(network, images, estimator=estimator, probes=6, seed=1)
    assert np.abs(moved.map - one.map).max() > 0.01 * one.map.max()


def test_bfloat16_measures_the_same_field(network):
    images = some_images(4, 64)
    half = Network.from_model(create("densenet_small", dtype="bfloat16", **SMALL))
    fields = [erf.measure(n, images, estimator="exact", parallel=32) for n in (network, half)]
    assert fields[1].map.sum() == pytest.approx(fields[0].map.sum(), rel=0.05)
    assert fields[1].diameter == pytest.approx(fields[0].diameter, rel=0.05)


@given(st.floats(2, 12), st.floats(0.3, 0.99))
@settings(max_examples=20, deadline=None)
def test_size_of_a_gaussian(sigma, mass):
    axis = np.arange(160) - 79.5
    field = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    fraction, diameter = erf.erf_size(field, mass)
    area = 2 * np.pi * sigma**2 * np.log(1 / (1 - mass))
    assert fraction * field.size == pytest.approx(area, rel=0.02, abs=8)  # 8: pixels of equal distance come together
    assert diameter == pytest.approx(2 * np.sqrt(fraction * field.size / np.pi))


def test_size_counts_whole_pixels():
    field = np.array([[4.0, 3.0], [2.0, 1.0]])
    assert [erf.erf_size(field, mass)[0] for mass in (0.4, 0.41, 0.7, 0.9, 0.91, 1.0)] == [0.25, 0.5, 0.5, 0.75, 1, 1]


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_translation_moves_whole_pixels_within_its_limits(seed, fraction):
    height, width = 9, 12
    image = np.arange(1, height * width + 1, dtype=np.uint8).reshape(1, height, width, 1)
    (moved,) = erf.random_shift(image, fraction, np.random.default_rng(seed))
    rows, columns = np.nonzero(moved[..., 0])
    source = moved[rows, columns, 0].astype(int) - 1
    shifts = {(r - s // width, c - s % width) for r, c, s in zip(rows, columns, source, strict=True)}
    assert len(shifts) == 1
    (dy, dx) = shifts.pop()
    assert abs(dy) <= height * fraction
    assert abs(dx) <= width * fraction
    assert len(rows) == (height - abs(dy)) * (width - abs(dx))  # nothing else is lost


def test_bad_erf_options_are_errors(network):
    images = some_images(1, 32)
    for options, message in [
        ({"estimator": "guess"}, "no estimator 'guess'"),
        ({"layer": "stem9"}, "no feature map 'stem9'; this network has stem, block1"),
        ({"probes": 0}, "out of range"),
    ]:
        with pytest.raises(CxrError, match=message):
            erf.measure(network, images, **options)
    with pytest.raises(CxrError, match="uint8"):
        erf.measure(network, images / 255)
    with pytest.raises(CxrError, match="no image"):
        erf.measure(network, images[:0])
    dead = jax.tree.map(np.zeros_like, network)
    with pytest.raises(CxrError, match="zero everywhere"):
        erf.measure(dead, images)
    with pytest.raises(CxrError, match="finite"):
        erf.erf_size(np.array([[1.0, np.nan]]))
