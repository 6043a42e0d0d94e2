import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from parity import relative_error

from cxrjax.errors import CxrError
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.models import create
from cxrjax.models.hrnet import check_branch_sizes, upsample_nearest
from cxrjax.models.network import Network, parameter_count
from cxrjax.weights.published import published_names

TINY = {"width": 2, "num_modules": (1, 1), "stem_channels": 4}


def shapes(network: Network, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of each feature map of one image."""
    images = jax.ShapeDtypeStruct((1, height, width, network.input_spec.channels), network.dtype)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    return {name: maps.shape[1:] for name, maps in features.items()}


def test_parameter_counts():
    assert parameter_count(create("hrnet_w48", classes=1000)) == 77_469_864  # timm's; W18 and W32 have fixtures


def test_maps_of_each_branch():
    shape = shapes(Network.from_model(create("hrnet_small", classes=3)), 93, 64)
    assert shape == {
        "stem": (24, 16, 8), "layer1": (24, 16, 32),
        "stage2_branch1": (24, 16, 8), "stage2_branch2": (12, 8, 16),
        "stage3_branch1": (24, 16, 8), "stage3_branch2": (12, 8, 16), "stage3_branch3": (6, 4, 32),
        "stage4_branch1": (24, 16, 8), "stage4_branch2": (12, 8, 16), "stage4_branch3": (6, 4, 32),
        "stage4_branch4": (3, 2, 64), "final": (3, 2, 256),
    }  # fmt: skip
    assert list(shape)[-2:] == ["stage4_branch4", "final"]


def test_a_half_neck_leaves_the_rest_fit_for_public_weights():
    public, half = (create("hrnet_w18", classes=14, neck=neck) for neck in ("public", "half"))
    assert [public.final_layer[0].out_features, half.final_layer[0].out_features] == [2048, 1024]
    assert [row[0].conv3.out_features for row in half.incre_modules] == [64, 128, 256, 512]
    assert all(hasattr(half, name) for name in half.replaceable)

    def backbone_shapes(model) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of all modules that are not replaceable."""
        params = jax.tree_util.tree_leaves_with_path(Network.from_model(model).params)
        names, paths = published_names(model), ((tuple(str(key.key) for key in path), leaf) for path, leaf in params)
        return {names[path]: leaf.shape for path, leaf in paths if path[0] not in model.replaceable}

    assert backbone_shapes(public) == backbone_shapes(half)
    assert "stage4.2.fuse_layers.3.0.2.0.weight" in backbone_shapes(half)


def test_sizes_that_work_are_those_of_timm():
    # From running timm's hrnet_w18_small and hrnet_w18 at every height and width below 200.
    working = {n for first in (29, 61, 93, 125, 157, 189) for n in range(first, first + 4)}
    for size in range(1, 200):
        for height, width in ((size, 64), (64, size)):
            if size in working:
                check_branch_sizes(height, width, 32)
                continue
            with pytest.raises(CxrError) as error:
                check_branch_sizes(height, width, 32)
            below, above = (
                max((n for n in working if n < size), default=None),
                min((n for n in working if n > size), default=221),
            )
            side = "height" if height == size else "width"
            nearest = f"{below} below and {above} above" if below else f"{above}"
            assert str(error.value).endswith(f"the nearest {side} that works is {nearest}")


def test_branches_fit_at_sizes_that_work():
    network = Network.from_model(create("hrnet_small", classes=2, **TINY))
    for height, width in ((13, 16), (29, 30), (63, 45)):
        shape = shapes(network, height, width)
        assert shape["final"][:2] == (math.ceil(height / 16), math.ceil(width / 16))
    with pytest.raises(CxrError, match=r"33 x 32.*height that works is 32 below and 45 above"):
        shapes(network, 33, 32)


def test_upsampling_repeats_rows_and_columns_and_sums_gradients():
    maps = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    large, back = jax.vjp(lambda maps: upsample_nearest(maps, 4), jnp.asarray(maps))
    np.testing.assert_array_equal(large, maps.repeat(4, axis=1).repeat(4, axis=2))
    gradient = np.random.default_rng(1).standard_normal(large.shape).astype(np.float32)
    summed = gradient.reshape(2, 3, 4, 5, 4, 4).sum((2, 4))
    np.testing.assert_allclose(back(jnp.asarray(gradient))[0], summed, rtol=1e-5, atol=1e-5)


def test_upsampling_sharded_rows_needs_no_communication():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("space",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "space"))

    def upsample_with_gradient(maps, cotangent):
        large, back = jax.vjp(lambda maps: upsample_nearest(maps, 4), maps)
        return large, back(cotangent)[0]

    maps, large = (jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32, sharding=split) for side in (8, 32))
    program = jax.jit(upsample_with_gradient, out_shardings=split).lower(maps, large).compile().as_text()
    assert "f32[2,8,32,3]" in program  # a quarter of the rows
    assert not re.search("all-|permute", program)


def test_bfloat16_is_close_to_float32():
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), np.uint8)
    logits = {}
    for dtype in ("bfloat16", "float32"):
        network = Network.from_model(create("hrnet_small", classes=5, dtype=dtype, seed=2))
        run = jax.jit(lambda network: network.apply(images, train=True), compiler_options=FAST_COMPILE)
        logits[dtype], stats = run(network)
        assert {leaf.dtype for leaf in jax.tree.leaves((network.params, stats))} == {np.dtype("float32")}
        assert logits[dtype].dtype == jnp.float32
    assert 1e-5 < relative_error(logits["bfloat16"], logits["float32"]) < 0.05


def test_the_receptive_field_is_an_upper_bound_within_a_stride():
    """The actual receptive field: the pixels with a gradient, when all weights are positive."""
    network = Network.from_model(create("hrnet_small", classes=2, **TINY))
    network = dataclasses.replace(network, params=jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), network.params))

    def middle_row(image):
        return network.model().features(image)["final"][0, 8].sum()

    gradient = jax.jit(jax.grad(middle_row), compiler_options=FAST_COMPILE)(jnp.ones((1, 272, 16, 1)))
    rows = np.flatnonzero(np.abs(gradient).sum((0, 2, 3)))
    field = list(receptive_fields(network, image_size=512).values())[-1]
    first, last = field.rows.at(8)
    assert first <= rows.min() < first + 16
    assert last - 16 < rows.max() <= last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": "hlaf"}, "did you mean 'half'"),
        ({"num_modules": ()}, "one per stage"),
        ({"num_modules": (1, 0)}, "above 0"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"width": -1}, "width"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(CxrError, match=message):
        create("hrnet_small", classes=2, **options)
