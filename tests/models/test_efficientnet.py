import dataclasses
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from parity import relative_error

from cxrjax.errors import CxrError
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.models import create
from cxrjax.models.efficientnet import B0_CONFIG, MBConv
from cxrjax.models.layers import skip_init
from cxrjax.models.network import Network, parameter_count

TINY = {"stem_channels": 8, "block_config": ((1, 3, 1, 8, 2), (2, 5, 2, 8, 2)), "pooling": "average"}


def uninitialized(name: str, **options) -> Network:
    """A network with zeros as initial values, where only shapes matter."""
    with skip_init():
        return Network.from_model(create(name, **{"classes": 3, **options}))


def grey(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (*shape, 1), np.uint8)


@pytest.mark.parametrize(
    ("variant", "parameters", "dropout"),
    [(0, 5_288_548, 0.2), (1, 7_794_184, 0.2), (2, 9_109_994, 0.3), (3, 12_233_232, 0.3), (4, 19_341_616, 0.4)],
)
def test_parameters_and_dropout_are_torchvisions(variant, parameters, dropout):
    with skip_init():
        model = create(f"efficientnet_b{variant}", classes=1000)
    assert parameter_count(model) == parameters
    assert model.classifier.dropout == dropout


def test_counts_of_the_attention_fusion_paper():
    # Keras also counts 7 values of a layer that normalises the images: three means, three variances and the number of
    # images.
    b0 = uninitialized("efficientnet_b0", hidden=512, classes=14)
    assert parameter_count(b0) + parameter_count(b0.stats) + 7 == 4_712_625
    b3 = uninitialized("efficientnet_b3")
    parameters, statistics = (parameter_count(cut_at_stage_6(tree)) for tree in (b3.params, b3.stats))
    assert statistics + 7 == 35_655
    assert parameters + statistics + 7 == 2_338_417


def cut_at_stage_6(tree):
    """The arrays before stage 6's first depthwise convolution."""
    stages = tree["stages"]
    return {**{number: stages[number] for number in range(6)}, 6: stages[6][0]["block"][0]}


def test_the_cut_is_where_the_attention_fusion_paper_has_it():
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    features = jax.eval_shape(
        lambda network, images: network.model().features(images), uninitialized("efficientnet_b3"), images
    )
    assert features["stage6_expansion"].shape == (1, 14, 14, 816)


def test_stages_halve_and_odd_sizes_round_as_in_torch():
    features = jax.eval_shape(
        lambda network, images: network.model().features(images),
        uninitialized("efficientnet_b0"),
        jax.ShapeDtypeStruct((2, 131, 97, 3), jnp.float32),
    )
    assert {name: maps.shape[1:] for name, maps in features.items()} == {
        "stem": (66, 49, 32), "stage1": (66, 49, 16),
        "stage2_expansion": (66, 49, 96), "stage2": (33, 25, 24),
        "stage3_expansion": (33, 25, 144), "stage3": (17, 13, 40),
        "stage4_expansion": (17, 13, 240), "stage4": (9, 7, 80),
        "stage5_expansion": (9, 7, 480), "stage5": (9, 7, 112),
        "stage6_expansion": (9, 7, 672), "stage6": (5, 4, 192),
        "stage7_expansion": (5, 4, 1152), "stage7": (5, 4, 320),
        "final": (5, 4, 1280),
    }  # fmt: skip
    assert list(features)[:4] == ["stem", "stage1", "stage2_expansion", "stage2"]
    assert list(features)[-1] == "final"


def test_expanded_maps_are_convolution_norm_and_silu():
    @jax.jit
    def run(network):
        model = network.model()
        features = model.features(jax.random.normal(jax.random.key(0), (1, 16, 16, 1)))
        conv, norm = model.stages[2][0].block[0]
        return features["stage2_expansion"], jax.nn.silu(norm(conv(features["stage1"]), train=False))

    maps, expected = run(Network.from_model(create("efficientnet_small", classes=2, **TINY)))
    np.testing.assert_allclose(maps, expected, rtol=1e-5)
    assert relative_error(maps, 0 * maps + 1) > 0.1


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_unused_expanded_maps_cost_nothing(remat, monkeypatch):
    def cost() -> tuple[float, int]:
        network = Network.from_model(create("efficientnet_small", classes=2, remat=remat, **TINY))

        def loss(params, images):
            return dataclasses.replace(network, params=params).apply(images, train=True)[0].sum()

        images = jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.uint8)
        program = jax.jit(jax.grad(loss)).lower(network.params, images).compile(FAST_COMPILE)
        return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes

    expected, block = cost(), MBConv.__call__

    def without_expanded(self, maps, train, survival=None):
        return maps, block(self, maps, train, survival)[1]

    monkeypatch.setattr(MBConv, "__call__", without_expanded)
    assert cost() == expected


@pytest.mark.parametrize("variant", [0, 3])
def test_receptive_fields(variant):
    depth = {0: 1.0, 3: 1.4}[variant]
    fields = receptive_fields(uninitialized(f"efficientnet_b{variant}"), image_size=512)
    size, stride = 3, 2
    for number, (_, kernel, first, _, count) in enumerate(B0_CONFIG, start=1):
        for step in [first] + [1] * (math.ceil(count * depth) - 1):
            size, stride = size + (kernel - 1) * stride, stride * step
        field = fields[f"stage{number}"]
        assert (field.size, field.stride, field.whole) == (size, stride, True)  # squeeze-and-excitation reads all
    assert size == {0: 851, 3: 1407}[variant]
    assert not fields["stem"].whole


def survivals(monkeypatch, *, key, **options) -> list[np.ndarray]:
    """The factors by which each of four blocks multiplies the residuals of 2000 images."""
    factors, block = [], MBConv.__call__

    def watched(self, maps, train, survival=None):
        factors.append(survival)
        return block(self, maps, train, survival)

    @jax.jit
    def watch(network, key):
        network.model().features(jnp.zeros((2000, 2, 2, 1)), key=key)
        return factors

    monkeypatch.setattr(MBConv, "__call__", watched)
    result = watch(Network.from_model(create("efficientnet_small", classes=2, **{**TINY, **options})), key)
    monkeypatch.undo()
    return [None if survival is None else np.asarray(survival) for survival in result]


def test_stochastic_depth_grows_from_zero_and_is_drawn_per_image(monkeypatch):
    images, last = 2000, 0.8
    factors = survivals(monkeypatch, key=jax.random.key(0), stochastic_depth=last)
    assert len(factors) == 4
    for number, factor in enumerate(factors):
        rate = last * number / 4  # torchvision: the probability times block number, divided by the number of blocks
        assert factor.shape == (images, 1, 1, 1)
        assert set(np.unique(factor)) == ({np.float32(0), np.float32(1 / (1 - rate))} if number else {1})
        assert abs((factor == 0).mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / images)
        assert abs(factor.mean() - 1) <= 5 * math.sqrt(rate / (1 - rate) / images)  # the expectation stays
    for one, other in pairwise(factors[1:]):  # blocks, and neighbouring images, draw independently
        assert abs(np.corrcoef(one.ravel() == 0, other.ravel() == 0)[0, 1]) < 5 / math.sqrt(images)
        assert abs(np.corrcoef(one.ravel()[1:] == 0, one.ravel()[:-1] == 0)[0, 1]) < 5 / math.sqrt(images)


def test_stochastic_depth_depends_on_the_key_alone(monkeypatch):
    first, again = (survivals(monkeypatch, key=jax.random.key(1)) for _ in range(2))
    other = survivals(monkeypatch, key=jax.random.key(2))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    assert survivals(monkeypatch, key=None) == [None] * 4


def test_stochastic_depth_drops_or_scales_the_residual():
    options = {**TINY, "block_config": ((1, 3, 1, 8, 2),), "stochastic_depth": 0.8}
    images = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 8, 8, 1)), (64, 8, 8, 1))

    @jax.jit
    def run(network, key):
        model = network.model()
        plain = model.features(images)
        before = model.stages[1][0](plain["stem"], False)[1][0]
        return before, plain["stage1"][0] - before, model.features(images, key=key)["stage1"]

    network = Network.from_model(create("efficientnet_small", classes=2, **options))
    before, residual, drawn = jax.device_get(run(network, jax.random.key(3)))
    dropped = np.array([np.allclose(maps, before, atol=1e-5) for maps in drawn])
    assert 0.2 < dropped.mean() < 0.6  # 0.4 is expected
    for maps in drawn[~dropped]:
        np.testing.assert_allclose(maps, before + residual / 0.6, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_is_active_in_training_only():
    network = Network.from_model(create("efficientnet_small", classes=2, stochastic_depth=0.9, **TINY))
    images, key = grey(8, 16, 16), jax.random.key(0)
    apply = jax.jit(lambda key, train: network.apply(images, train=train, key=key)[0], static_argnums=1)
    np.testing.assert_array_equal(apply(key, False), apply(None, False))
    assert relative_error(apply(key, True), apply(None, True)) > 0.01


def test_layer_remat_stores_little_of_a_block():
    def residual_bytes(remat: str) -> int:
        """Bytes that the forward pass stores for the backward pass."""
        network = Network.from_model(
            create("efficientnet_small", classes=2, remat=remat, block_config=((6, 3, 1, 8, 6),))
        )

        def backward(network, images):
            def run(params):
                return dataclasses.replace(network, params=params).apply(images, train=True)[0]

            return jax.vjp(run, network.params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, network, jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.uint8)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert residual_bytes("layer") < 0.1 * residual_bytes("none")


def test_bfloat16_is_close_to_float32():
    logits = {}
    for dtype in ("bfloat16", "float32"):
        network = Network.from_model(create("efficientnet_small", classes=5, dtype=dtype, seed=2))
        run = jax.jit(lambda network: network.apply(grey(4, 64, 64), train=True), compiler_options=FAST_COMPILE)
        logits[dtype], stats = run(network)
        assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype("float32")}
        assert logits[dtype].dtype == jnp.float32
    assert 1e-5 < relative_error(logits["bfloat16"], logits["float32"]) < 0.05


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_config": "112"}, "sequence"),
        ({"block_config": ()}, "sequence"),
        ({"block_config": ((1, 3, 1, 8),)}, r"is \(expansion, kernel"),
        ({"block_config": ((1, 4, 1, 8, 1),)}, "odd"),
        ({"block_config": ((1, 3, 1, 8, 0),)}, "blocks of a stage"),
        ({"width_mult": 0.0}, "above 0"),
        ({"depth_mult": -1.0}, "above 0"),
        ({"stochastic_depth": 1.0}, "stochastic_depth"),
        ({"last_channels_mult": 0}, "last_channels_mult"),
        ({"blok": 1}, "did you mean 'block_config'"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(CxrError, match=message):
        create("efficientnet_small", classes=2, **option)
