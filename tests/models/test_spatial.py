"""Operations on sharded rows: the values of a single device, and no more communication than needed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cxrjax.distributed.mesh import make_mesh, with_mesh
from cxrjax.models.attention_fusion import _map_attention
from cxrjax.models.convolution import conv2d
from cxrjax.models.fhrnet import crop_and_resize
from cxrjax.models.hrnet import upsample_nearest
from cxrjax.models.pooling import average_pool, max_pool
from cxrjax.models.spatial import upsample_bilinear_2x
from cxrjax.planning.compiled_memory import parse_collectives

B, H, W, C = 2, 32, 6, 4
LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def conv(maps, *, kernel, stride, groups=1):
    weights, half = jnp.asarray(random(kernel, kernel, C // groups, C)), kernel // 2
    padding = ((half, half), (half, half))
    return conv2d(maps, weights, (stride, stride), padding, feature_group_count=groups, **LAYOUT)


def attention(maps):
    return _map_attention(maps, jnp.tanh(maps), maps)


def crop(maps):
    return crop_and_resize(maps, jnp.array([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 0.5]]), 8)


# An operation, and the largest size of one exchange, as a fraction of an image's maps; a device holds a quarter.
EXCHANGED = {
    "3x3": (partial(conv, kernel=3, stride=1), 1 / 16),
    "7x7, stride 2": (partial(conv, kernel=7, stride=2), 1 / 4),
    "depthwise 5x5, stride 2": (partial(conv, kernel=5, stride=2, groups=C), 1 / 4),
    "max pooling": (partial(max_pool, window=3, stride=2, padding=1), 1 / 8),
    "average pooling": (partial(average_pool, window=2, stride=2), 1 / 8),
    "nearest upsampling": (partial(upsample_nearest, factor=2), 0),
    "bilinear upsampling": (upsample_bilinear_2x, 1 / 32),
}


def with_gradient(operation, mesh, maps):
    """The operation's value and gradient on the mesh, and the collectives it compiles to."""

    def both(maps):
        value, backward = jax.vjp(operation, maps)
        return value, backward(jnp.cos(value))[0]

    rows = NamedSharding(mesh, P("data", None if maps.shape[1] % mesh.shape["space"] else "space"))
    step = jax.jit(with_mesh(mesh, both), in_shardings=rows).lower(jnp.asarray(maps)).compile()
    return jax.device_get(step(jax.device_put(maps, rows))), parse_collectives(step.as_text() or "")


def compare(operation, maps):
    expected, none = with_gradient(operation, make_mesh(1, 1), maps)
    assert not none
    sharded, calls = with_gradient(operation, make_mesh(2, 4), maps)
    for result, reference in zip(sharded, expected, strict=True):
        np.testing.assert_allclose(result, reference, rtol=1e-10, atol=1e-12 * np.abs(reference).max())
    return calls


@pytest.mark.parametrize("name", EXCHANGED)
def test_neighbours_exchange_rows(name):
    operation, most = EXCHANGED[name]
    with jax.enable_x64(True):
        calls = compare(operation, random(B, H, W, C))
    assert {call.kind for call in calls} <= {"collective-permute"}, calls
    assert max([call.bytes for call in calls], default=0) <= most * H * W * C * 8


def test_attention_sends_keys_and_values_around_the_ring():
    with jax.enable_x64(True):
        calls = compare(attention, random(B, 8, W, C))
    assert {call.kind for call in calls} == {"collective-permute"}, calls
    assert {call.bytes for call in calls} == {2 * W * C * 8}  # a device's shard of them


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 2, 1)])
def test_upsampling_is_bilinear(shape):
    with jax.enable_x64(True):
        maps = jnp.asarray(random(*shape))
        expected = jax.image.resize(maps, (shape[0], 2 * shape[1], 2 * shape[2], shape[3]), "bilinear")
        np.testing.assert_allclose(upsample_bilinear_2x(maps), expected, rtol=1e-12)


def test_a_crop_does_not_gather_the_image():
    with jax.enable_x64(True):
        calls = compare(crop, random(B, H, W, C))
    assert {call.kind for call in calls} == {"all-reduce"}, calls
    assert max(call.bytes for call in calls) == 8 * 8 * C * 8  # the crop


@pytest.mark.parametrize(("operation", "rows"), [(partial(conv, kernel=3, stride=2), 20), (attention, 6), (crop, 18)])
def test_rows_that_do_not_divide_evenly_are_replicated(operation, rows):
    with jax.enable_x64(True):
        compare(operation, random(B, rows, W, C))
