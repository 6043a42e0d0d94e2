"""FHRNet against its parts and a region by SciPy and OpenCV; what each stage trains; the region's functions."""

import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.fhrnet import bounding_box, crop_and_resize, heat_map, largest_component
from cxrjax.models.network import Network, parameter_count

pytestmark = pytest.mark.usefixtures("shallow_branches")


def small(**options):
    return create("fhrnet_small", classes=3, **options)


def features_of(model, images):
    return jax.jit(lambda x: model.features(x), compiler_options=FAST_COMPILE)(jnp.asarray(images))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    base = cv2.resize(rng.integers(0, 256, (8, 8)).astype(np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
    return np.stack([base, base[::-1], base.T]).reshape(3, 64, 64, 1).astype(np.float32) / 64 - 2


def linear(vector, classifier):
    return vector @ np.asarray(classifier.output.kernel[...]) + np.asarray(classifier.output.bias[...])


def test_heads_are_composed_of_the_branches(images):
    model = small(stage="joint")
    features = features_of(model, images)
    heads = model.heads(features)
    assert list(heads) == ["global", "local", "fusion"]

    global_maps = np.asarray(features_of(model.global_branch, images)["final"])
    np.testing.assert_allclose(features["final"], global_maps, atol=1e-4)
    # The region by NumPy, SciPy and OpenCV.
    regions = []
    for image, maps in zip(images, global_maps, strict=True):
        heat = np.abs(maps).max(-1)
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        labels, _ = ndimage.label(heat > 0.7, np.ones((3, 3)))
        rows, columns = np.nonzero(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
        step = 64 // heat.shape[0]
        cut = image[rows.min() * step : (rows.max() + 1) * step, columns.min() * step : (columns.max() + 1) * step, 0]
        regions.append(cut)
    for row, cut in enumerate(regions):
        if cut.shape == (32, 32):  # no resampling: this is exactly the local branch's input
            local = features_of(model.local_branch, cut[None, :, :, None])["final"]
            np.testing.assert_allclose(features["local"][row], local[0], atol=1e-4)
    assert any(cut.shape == (32, 32) for cut in regions)

    vectors = {name: np.asarray(features[name]).mean((1, 2)) for name in ("final", "local")}
    np.testing.assert_allclose(heads["global"], linear(vectors["final"], model.global_branch.classifier), atol=1e-4)
    np.testing.assert_allclose(heads["local"], linear(vectors["local"], model.local_branch.classifier), atol=1e-4)
    fused = np.concatenate([vectors["final"], vectors["local"]], axis=1)
    np.testing.assert_allclose(heads["fusion"], linear(fused, model.classifier), atol=1e-4)
    np.testing.assert_array_equal(model.head(features), heads["fusion"])


def test_weighted_fusion_and_shared_heads(images):
    model = small(fusion="weighted", heads="shared")
    model.fusion_weights[...] = jnp.array([0.25, 2.0])
    features = features_of(model, images)
    heads, shared = model.heads(features), model.global_branch.classifier
    global_vector, local_vector = (np.asarray(features[name]).mean((1, 2)) for name in ("final", "local"))
    np.testing.assert_allclose(heads["local"], linear(local_vector, shared), atol=1e-4)
    np.testing.assert_allclose(heads["fusion"], linear(0.25 * global_vector + 2 * local_vector, shared), atol=1e-4)


def test_a_masked_region_is_the_image_times_the_mask(images):
    model = small(region="mask")
    whole = jnp.asarray(images)
    global_maps = jnp.zeros((3, 2, 2, 5)).at[:, 0, 1].set(1.0)
    region = model._local_input(whole, whole, global_maps)
    np.testing.assert_array_equal(region[:, :32, 32:], images[:, :32, 32:])
    assert not np.asarray(region[:, 32:]).any()
    assert not np.asarray(region[:, :, :32]).any()


def test_a_box_in_the_centre_crop_maps_back_to_the_image():
    model = small(resize=48, crop=32, region_size=16)
    image = np.zeros((1, 96, 96, 1), np.float32)
    image[0, 48:64, 48:64] = 1  # in the centre crop of 32 from 48: rows and columns 16 to 24
    global_maps = jnp.zeros((1, 4, 4, 1)).at[0, 2, 2].set(1.0)
    whole = model._global_input(jnp.asarray(image))
    assert whole.shape == (1, 32, 32, 1)
    np.testing.assert_allclose(whole[0, 17:23, 17:23], 1, atol=1e-5)
    np.testing.assert_allclose(model._local_input(jnp.asarray(image), whole, global_maps)[0, 1:-1, 1:-1], 1, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "heads", "trained", "updated"),
    [
        ("global", ["global"], {"global_branch"}, {"global_branch"}),
        ("local", ["local"], {"local_branch"}, {"local_branch"}),
        ("fusion", ["fusion"], {"global_branch", "local_branch", "classifier"}, set()),
        ("joint", ["global", "local", "fusion"], {"global_branch", "local_branch", "classifier"},
         {"global_branch", "local_branch"}),
    ],
)  # fmt: skip
def test_each_stage_trains_its_modules(stage, heads, trained, updated):
    network = Network.from_model(small(stage=stage))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1), np.uint8)

    def loss(params):
        outputs, stats = dataclasses.replace(network, params=params).outputs(
            images, train=True, key=jax.random.PRNGKey(0)
        )
        return sum(jnp.square(logits).sum() for logits in outputs.values()), (outputs, stats)

    gradient, (outputs, stats) = jax.jit(
        jax.grad(loss, has_aux=True),
        compiler_options=FAST_COMPILE,
    )(network.params)
    assert list(outputs) == heads
    assert {path[0] for path, array in flatten_dict(gradient).items() if np.any(array)} == trained
    before, after = flatten_dict(network.stats), flatten_dict(stats)
    assert {path[0] for path in before if not np.array_equal(before[path], after[path])} == updated


def test_parameter_count_is_two_hrnets_and_a_head():
    branch = parameter_count(create("hrnet_w18", classes=14, neck="half"))
    assert parameter_count(create("fhrnet", backbone="hrnet_w18", classes=14)) == 2 * branch + 2048 * 14 + 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "globl"}, "unknown stage 'globl': did you mean 'global'"),
        ({"heads": "shared"}, "needs fusion='weighted'"),
        ({"threshold": 1.0}, "threshold must be"),
        ({"resize": 32, "crop": 64}, "cannot be cut out of an image resized to 32 px"),
        ({"backbone": "hrnet"}, "unknown backbone 'hrnet'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(CxrError, match=message):
        small(**options)


def test_images_smaller_than_the_crop_are_refused():
    with pytest.raises(CxrError, match="cannot be cut out of images of 32 x 32 px"):
        small(crop=64).features(jnp.zeros((1, 32, 32, 1)))


component = jax.jit(largest_component)


def scipy_largest_component(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return mask
    areas = np.bincount(labels.ravel())[1:]
    return labels == areas.argmax() + 1  # SciPy numbers components in row-major order


@settings(max_examples=200, deadline=None)
@given(arrays(bool, (3, 9, 7)), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_largest_component_equals_scipys(drawn, density, seed):
    random = np.random.default_rng(seed).random(drawn.shape) < density
    for masks in (drawn, random):
        ours = np.asarray(component(masks))
        for mask, one in zip(masks, ours, strict=True):
            np.testing.assert_array_equal(one, scipy_largest_component(mask))


def test_a_long_snake_is_one_component():
    mask = np.zeros((1, 33, 33), bool)
    mask[:, ::2] = True
    mask[:, 1::4, -1] = mask[:, 3::4, 0] = True
    np.testing.assert_array_equal(component(mask), mask)


def test_bounding_box():
    mask = np.zeros((2, 4, 8), bool)
    mask[0, 1:3, 2:7] = True
    np.testing.assert_allclose(bounding_box(jnp.asarray(mask)), [[0.25, 0.25, 0.75, 0.875], [0, 0, 1, 1]])


def test_heat_map():
    maps = jnp.asarray([[[[1.0, -5.0], [0.0, 1.0]], [[2.0, -3.0], [3.0, 0.0]]]])
    np.testing.assert_allclose(heat_map(maps), [[[1.0, 0.0], [0.5, 0.5]]])
    np.testing.assert_array_equal(heat_map(jnp.ones((1, 2, 2, 3))), np.zeros((1, 2, 2)))


@pytest.mark.parametrize("size", [32, 8])
def test_cropping_the_whole_image_resizes_it(size):
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32)
    ours = crop_and_resize(jnp.asarray(image), jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), size)
    theirs = jax.image.resize(image, (1, size, size, 1), "linear", antialias=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_an_upsampled_crop_equals_opencvs():
    image = np.random.default_rng(1).normal(size=(32, 48)).astype(np.float32)
    ours = crop_and_resize(jnp.asarray(image)[None, :, :, None], jnp.asarray([[0.25, 0.5, 0.75, 0.75]]), 64)
    theirs = cv2.resize(image[8:24, 24:36], (64, 64), interpolation=cv2.INTER_LINEAR)
    # Not at the edge of the crop, where ours reads the pixels beyond it and OpenCV repeats the last.
    np.testing.assert_allclose(ours[0, 4:-4, 4:-4, 0], theirs[4:-4, 4:-4], atol=1e-4)


def test_the_crops_gradient_is_zero_outside_the_box():
    box = jnp.asarray([[0.25, 0.25, 0.75, 0.75]])
    gradient = jax.grad(lambda x: crop_and_resize(x, box, 16).sum())(jnp.ones((1, 32, 32, 1)))[0, :, :, 0]
    assert (np.asarray(gradient[10:22, 10:22]) > 0).all()
    assert (np.asarray(gradient[:7]) == 0).all()
