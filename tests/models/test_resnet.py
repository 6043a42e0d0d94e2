from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error

from cxrjax.errors import CxrError
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.models import create
from cxrjax.models.layers import LayerFactory
from cxrjax.models.network import Network, parameter_count
from cxrjax.models.resnet import Bottleneck

TINY = {"layers": (1, 2), "width": 4}


@cache
def cached_model(name: str) -> Any:
    return create(name, classes=2)


def grey(count: int, height: int, width: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).integers(0, 256, (count, height, width, 1), np.uint8))


@pytest.mark.parametrize(
    ("name", "published"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)],
)
def test_parameter_counts_are_torchvisions(name, published):
    features = (512 if name in ("resnet18", "resnet34") else 2048) + 1
    assert parameter_count(cached_model(name)) == published - 998 * features  # 2 classes instead of 1000


def test_the_small_resnet_has_the_parameters_of_its_options():
    """Counted by hand: basic blocks (1, 1, 1) of 16, 32, 64 channels, 5x5 stem, both poolings in the head."""
    stem = 5 * 5 * 16 + 2 * 16
    first = 2 * (3 * 3 * 16 * 16 + 2 * 16)
    wider = lambda c: 9 * c * 2 * c + 9 * 4 * c * c + c * 2 * c + 3 * 2 * 2 * c  # noqa: E731
    head = 2 * 64 * 7 + 7
    assert parameter_count(create("resnet_small", classes=7)) == stem + first + wider(16) + wider(32) + head


def test_stages_halve_and_odd_sizes_round_up():
    network = Network.from_model(create("resnet50", classes=3, width=4))
    images = jax.ShapeDtypeStruct((2, 131, 97, 3), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    assert list(features) == ["stem", "layer1", "layer2", "layer3", "final"]
    assert {name: maps.shape[1:] for name, maps in features.items()} == {
        "stem": (33, 25, 4), "layer1": (33, 25, 16), "layer2": (17, 13, 32), "layer3": (9, 7, 64), "final": (5, 4, 128),
    }  # fmt: skip


def test_bfloat16_is_close_to_float32():
    images = grey(4, 32, 32)
    logits = {}
    for dtype in ("bfloat16", "float32"):
        network = Network.from_model(create("resnet_small", classes=5, dtype=dtype, seed=2))
        assert {leaf.dtype for leaf in jax.tree.leaves((network.params, network.stats))} == {np.dtype("float32")}
        logits[dtype], stats = jax.jit(lambda network: network.apply(images, train=True))(network)
        assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype("float32")}
        assert logits[dtype].dtype == jnp.float32
    assert 1e-5 < relative_error(logits["bfloat16"], logits["float32"]) < 0.03


def test_initial_values_are_distributed_as_torchvisions():
    layer2 = cached_model("resnet50").layer2[0]
    for conv, fan_out in ((layer2.conv1, 128), (layer2.conv2, 9 * 128), (layer2.downsample[0], 512)):
        kernel = np.asarray(conv.kernel[...])
        assert abs(kernel.std() / np.sqrt(2 / fan_out) - 1) < 0.01
        assert abs(kernel.mean()) < 0.01 * kernel.std() * 3
    for norm in (layer2.bn3, layer2.downsample[1]):
        np.testing.assert_array_equal(norm.scale[...], 1)
        np.testing.assert_array_equal(norm.bias[...], 0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # 7x7/2 and 3x3/2, then 3x3 convolutions at strides 4, 8, 16, 32, the first of each stage at half of that.
        ("resnet18", (11, 43, 99, 211, 435)),
        ("resnet34", (11, 59, 11 + 48 + 8 + 7 * 16, 179 + 16 + 11 * 32, 547 + 32 + 5 * 64)),
        ("resnet50", (11, 35, 91, 267, 427)),
        ("resnet101", (11, 35, 91, 91 + 16 + 22 * 32, 811 + 32 + 2 * 64)),
    ],
)
def test_receptive_fields(name, sizes):
    fields = receptive_fields(Network.from_model(cached_model(name)))
    assert tuple(field.size for field in fields.values()) == sizes
    assert [field.stride for field in fields.values()] == [4, 4, 8, 16, 32]
    assert not any(field.whole for field in fields.values())


@pytest.mark.parametrize(("name", "published"), [("resnet50", 483), ("resnet101", 1027)])
def test_receptive_fields_are_as_published_with_late_strides(name, published):
    """Araujo, Norris & Sim 2019 calculated TF-Slim's networks, where a stage's last block has the stride of the next.

    torchvision's first block of a stage has it, so its fields are smaller: 427 and 971 px.
    """
    model = create(name, classes=2)
    factory, channels = LayerFactory(jnp.float32, 0), 64
    for stage, width in ((1, 64), (2, 128), (3, 256), (4, 512)):
        blocks = nnx.List()
        last = len(getattr(model, f"layer{stage}")) - 1
        for number in range(last + 1):
            blocks.append(Bottleneck(factory, channels, width, stride=2 if number == last and stage < 4 else 1))
            channels = 4 * width
        setattr(model, f"layer{stage}", blocks)
    assert list(receptive_fields(Network.from_model(model)).values())[-1].size == published


def test_one_pixel_images_leave_one_position():
    """As in torchvision: all convolutions are padded."""
    network = Network.from_model(create("resnet50", classes=2, width=4))
    image = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, image)
    assert features["final"].shape == (1, 1, 1, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "bottlenek"}, "unknown block 'bottlenek': did you mean 'bottleneck'"),
        ({"layers": ()}, "at least one stage"),
        ({"layers": 3}, "layers must be a sequence"),
        ({"layers": (1, 0)}, "blocks of a stage must be"),
        ({"stem_kernel": 4}, "odd stem_kernel"),
        ({"stem_pool": "2"}, "unknown stem_pool '2'"),
        ({"width": 0}, "width must be"),
        ({"growth_rate": 8}, "unknown option of resnet_small 'growth_rate'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(CxrError, match=message):
        create("resnet_small", classes=3, **options)
