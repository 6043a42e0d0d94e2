"""The theoretical receptive field against the support of the gradient, in float64 with positive weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from cxrjax.errors import CxrError
from cxrjax.explain.inputs import check_name
from cxrjax.explain.receptive_field import ReceptiveField, fields_of, receptive_fields
from cxrjax.models import create
from cxrjax.models.network import Network

SIDE = 96
NHWC = ("NHWC", "HWIO", "NHWC")


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, size, stride=1, dilation=1, padding="SAME", up=1):
    kernel = jnp.full((size, size, x.shape[-1], x.shape[-1]), 0.1, x.dtype)
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, (up,) * 2, (dilation,) * 2, NHWC)


def mean_pool(x, size, stride, padding="VALID"):
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, size, size, 1), (1, stride, stride, 1), padding)


def field_of(function, channels=1, side=SIDE) -> ReceptiveField:
    return fields_of(lambda images: {"map": function(images)}, f32(1, side, side, channels))["map"]


def support(function, position, channels=1, side=SIDE, images=1):
    """First and last row and column where the gradient of one feature position is not zero."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).random((images, 1, side, side, channels)) + 0.5)

        @jax.jit
        def total(x):
            return jax.vmap(jax.grad(lambda x: function(x)[:, position[0], position[1]].sum()))(x)

        gradient = np.abs(np.asarray(total(x))).sum((0, 1, 4))
    rows, columns = np.flatnonzero(gradient.any(1)), np.flatnonzero(gradient.any(0))
    return (rows[0], rows[-1]), (columns[0], columns[-1])


def centre_of(function, channels=1, side=SIDE):
    shape = jax.eval_shape(function, f32(1, side, side, channels)).shape
    return shape[1] // 2, shape[2] // 2


def assert_exact(function, channels=1, side=SIDE, images=1):
    field, centre = field_of(function, channels, side), centre_of(function, channels, side)
    assert not field.whole
    rows, columns = support(function, centre, channels, side, images)
    assert (field.rows.at(centre[0]), field.columns.at(centre[1])) == (rows, columns)
    assert field.rows.size == rows[1] - rows[0] + 1
    return field


layers = st.one_of(
    st.tuples(
        st.just("conv"),
        st.integers(1, 4),
        st.integers(1, 2),
        st.integers(1, 2),
        st.sampled_from(["SAME", "VALID", ((2, 1), (0, 1))]),
    ),
    st.tuples(st.just("pool"), st.integers(2, 3), st.integers(1, 2), st.just(1), st.sampled_from(["SAME", "VALID"])),
    st.tuples(st.just("dense"), st.integers(1, 4), st.just(1), st.integers(1, 2), st.just("SAME")),
)


@given(st.lists(layers, min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_random_networks_read_exactly_the_calculated_window(network):
    jump = 1
    for _, size, stride, dilation, _ in network:
        assume(2 * jump * (size - 1) * dilation < SIDE)  # a larger window counts as the whole image
        jump *= stride

    def function(x):
        for kind, size, stride, dilation, padding in network:
            if kind == "conv":
                x = jnp.maximum(conv(x, size, stride, dilation, padding), 0)
            elif kind == "pool":
                x = mean_pool(x, size, stride, padding)
            else:  # a dense layer: concatenate what was there with what is new
                x = jnp.concatenate([x, conv(x, size, 1, dilation, padding)], axis=-1)
        return x

    field, centre = field_of(function), centre_of(function)
    (top, bottom), (left, right) = field.rows.at(centre[0]), field.columns.at(centre[1])
    assume(min(top, left) >= 0 and max(bottom, right) < SIDE)  # not cut by the border
    assert_exact(function)


def test_max_pooling_like_the_stem_of_a_densenet():
    def function(x):
        x = conv(x, 7, 2, padding=((3, 3), (3, 3)))
        return lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))

    field = assert_exact(function, side=32, images=200)
    assert (field.size, field.stride) == (11, 4)


def test_reshape_transpose_slice_flip_and_pad_keep_the_window():
    def patches(x):  # 4x4 patches to channels and back to another order of axes
        b, h, w, c = x.shape
        x = x.reshape(b, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 4, w // 4, 16 * c)
        return x.transpose(0, 3, 1, 2).transpose(0, 2, 3, 1)

    assert assert_exact(patches).size == 4
    assert assert_exact(lambda x: conv(patches(x), 3)).size == 12
    assert assert_exact(lambda x: conv(x[:, 5:-2:3, ::2], 3)[:, ::-1]).rows.size == 7
    assert assert_exact(lambda x: conv(jnp.pad(x, ((0, 0), (3, 1), (2, 2), (0, 0))), 5, padding="VALID")).size == 5
    assert assert_exact(lambda x: sum(jnp.split(conv(jnp.concatenate([x, x], -1), 3), 2, axis=-1))).size == 3


@pytest.mark.parametrize(
    "upsample",
    [
        lambda x: conv(x, 4, padding=((2, 2), (2, 2)), up=2),
        lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2),
        lambda x: jax.image.resize(x, (1, 96, 96, x.shape[-1]), "nearest"),
        lambda x: jax.image.resize(x, (1, 96, 96, x.shape[-1]), "linear"),
    ],
    ids=["transposed", "repeat", "nearest", "linear"],
)
def test_upsampling_is_bounded_tightly(upsample):
    def function(x):
        return conv(upsample(conv(conv(x, 3, 2), 3)), 3) + conv(x, 3)

    field, centre = field_of(function), centre_of(function)
    assert not field.whole
    assert field.stride == 1
    for shift in (0, 1):
        position = (centre[0] + shift, centre[1] + shift)
        (top, bottom), _ = support(function, position)
        calculated = field.rows.at(position[0])
        assert calculated[0] <= top
        assert calculated[1] >= bottom
        assert field.size < bottom - top + 1 + 2 * 2  # the coarse map's stride is 2


def test_downsampling_by_resize_counts_the_antialiasing_filter():
    def function(x):
        return jax.image.resize(x, (1, SIDE // 4, SIDE // 4, 1), "linear")

    assert_exact(function)


def test_global_paths_are_flagged_besides_local_ones():
    def squeeze_and_excite(x):
        y = conv(x, 5)
        gate = jax.nn.sigmoid(y.mean((1, 2), keepdims=True))
        return y * gate

    field = field_of(squeeze_and_excite)
    assert field.whole
    assert field.size == 5

    def attention(x):
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", tokens, tokens), axis=-1)
        return jnp.einsum("bqk,bkc->bqc", weights, tokens).reshape(b, h, w, c)

    assert field_of(attention, side=16).whole

    pooled = field_of(lambda x: conv(conv(x, 3, 2, padding="VALID"), 3, 2, padding="VALID").mean((1, 2), keepdims=True))
    assert pooled.whole
    assert pooled.size == 0

    unknown = field_of(lambda x: jnp.cumsum(x, axis=1))
    assert unknown.whole


def test_rematerialised_modules_and_order_of_maps():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return jax.nn.relu(self.norm(self.conv(x)))

    graph, state = nnx.split(Block(nnx.Rngs(0)))

    def features(images, state, remat):
        block = nnx.merge(graph, state)
        call = nnx.remat(Block.__call__, graph=False) if remat else Block.__call__
        fine = call(block, images)
        return {"z fine": fine, "a coarse": call(block, fine)}

    shape = f32(1, 64, 64, 3)
    plain = fields_of(lambda x, s: features(x, s, False), shape, state)
    assert list(plain) == ["z fine", "a coarse"]
    assert [(f.size, f.stride) for f in plain.values()] == [(3, 2), (7, 4)]
    assert fields_of(lambda x, s: features(x, s, True), shape, state) == plain


def test_a_map_without_the_image_is_an_error():
    with pytest.raises(CxrError, match="'bias' does not depend on the image"):
        fields_of(lambda images: {"bias": jnp.zeros((1, 4, 4, 1))}, f32(1, 8, 8, 1))


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_densenet121_has_the_published_field(remat):
    fields = receptive_fields(Network.from_model(create("densenet121", classes=2, remat=remat)))
    # stem 7x7/2 and 3x3/2; 3x3 per layer at strides 4, 8, 16, 32; 2x2/2 in each transition
    sizes = {"stem": 1 + 6 + 2 * 2, "block1": 11 + 6 * 8, "block2": 59 + 4 + 12 * 16, "block3": 255 + 8 + 24 * 32}
    assert {name: fields[name].size for name in sizes} == sizes
    assert (fields["final"].size, fields["final"].stride, fields["final"].whole) == (2071, 32, False)


def test_a_real_networks_field_is_the_support_of_its_gradient():
    with jax.enable_x64(True):
        options = {"stem_pool": "none", "block_config": (1, 1), "growth_rate": 4}
        model = create("densenet_small", classes=2, dtype="float64", **options)
        network = Network.from_model(model)
        positive = jax.tree.map(lambda p: jnp.abs(p) + 0.1, network.params)
        network = Network(positive, network.stats, network.definition)
        field = receptive_fields(network, image_size=64)["final"]
        (top, bottom), columns = support(lambda x: network.model().features(x)["final"], (8, 8), side=64)
        assert field.rows.at(8) == (top, bottom)
        assert field.columns.at(8) == columns
        names = ["stem", "block1", "block2", "final"]
        assert check_name(names, None) == "final"
        with pytest.raises(CxrError, match="no feature map 'block7'; this network has stem, block1, block2, final"):
            check_name(names, "block7")
