"""FHRNet is two HRNets, a region by hand, and linear heads; each stage trains what it should."""

import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from flax.traverse_util import flatten_dict
from scipy import ndimage

from cxrjax.errors import CxrError
from cxrjax.models import create
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


def linear(vector, layer):
    return vector @ np.asarray(layer.output.kernel[...]) + np.asarray(layer.output.bias[...])


def test_its_heads_are_what_its_parts_compute(images):
    model = small(stage="joint")
    features = features_of(model, images)
    heads = model.heads(features)
    assert list(heads) == ["global", "local", "fusion"]

    seen = np.asarray(features_of(model.global_branch, images)["final"])
    np.testing.assert_allclose(features["final"], seen, atol=1e-4)
    # The region by NumPy, SciPy and OpenCV.
    regions = []
    for image, maps in zip(images, seen, strict=True):
        heat = np.abs(maps).max(-1)
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        labels, _ = ndimage.label(heat > 0.7, np.ones((3, 3)))
        rows, columns = np.nonzero(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
        step = 64 // heat.shape[0]
        cut = image[rows.min() * step : (rows.max() + 1) * step, columns.min() * step : (columns.max() + 1) * step, 0]
        regions.append(cut)
    for row, cut in enumerate(regions):
        if cut.shape == (32, 32):  # no resampling: the local branch must see exactly this
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
    seen, local = (np.asarray(features[name]).mean((1, 2)) for name in ("final", "local"))
    np.testing.assert_allclose(heads["local"], linear(local, shared), atol=1e-4)
    np.testing.assert_allclose(heads["fusion"], linear(0.25 * seen + 2 * local, shared), atol=1e-4)


def test_a_masked_whole_is_the_image_times_the_mask(images):
    model = small(region="mask")
    whole = jnp.asarray(images)
    seen = jnp.zeros((3, 2, 2, 5)).at[:, 0, 1].set(1.0)
    region = model._region(whole, whole, seen)
    np.testing.assert_array_equal(region[:, :32, 32:], images[:, :32, 32:])
    assert not np.asarray(region[:, 32:]).any()
    assert not np.asarray(region[:, :, :32]).any()


def test_a_box_in_the_cut_out_lies_where_it_should_in_the_image():
    model = small(resize=48, crop=32, region_size=16)
    image = np.zeros((1, 96, 96, 1), np.float32)
    image[0, 48:64, 48:64] = 1  # in the cut-out of 32 from 48: rows and columns 16 to 24
    seen = jnp.zeros((1, 4, 4, 1)).at[0, 2, 2].set(1.0)
    whole = model._whole(jnp.asarray(image))
    assert whole.shape == (1, 32, 32, 1)
    np.testing.assert_allclose(whole[0, 17:23, 17:23], 1, atol=1e-5)
    np.testing.assert_allclose(model._region(jnp.asarray(image), whole, seen)[0, 1:-1, 1:-1], 1, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "heads", "learn", "statistics"),
    [
        ("global", ["global"], {"global_branch"}, {"global_branch"}),
        ("local", ["local"], {"local_branch"}, {"local_branch"}),
        ("fusion", ["fusion"], {"global_branch", "local_branch", "classifier"}, set()),
        ("joint", ["global", "local", "fusion"], {"global_branch", "local_branch", "classifier"},
         {"global_branch", "local_branch"}),
    ],
)  # fmt: skip
def test_each_stage_trains_its_part(stage, heads, learn, statistics):
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
    assert {path[0] for path, array in flatten_dict(gradient).items() if np.any(array)} == learn
    before, after = flatten_dict(network.stats), flatten_dict(stats)
    assert {path[0] for path in before if not np.array_equal(before[path], after[path])} == statistics


def test_it_has_the_parameters_of_two_hrnets_and_a_head():
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
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(CxrError, match=message):
        small(**options)


def test_too_small_an_image_for_the_cut_is_refused():
    with pytest.raises(CxrError, match="cannot be cut out of images of 32 x 32 px"):
        small(crop=64).features(jnp.zeros((1, 32, 32, 1)))
