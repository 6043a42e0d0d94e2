"""The attention-fusion network: parameter counts, attention against NumPy, weights of whole networks in its trunks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from scipy.special import softmax

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.attention_fusion import MAX_WEIGHTS, Attention, dot_product_attention
from cxrjax.models.layers import LayerFactory
from cxrjax.models.network import Network, parameter_count


def numpy_attention(query, key, value):
    scores = np.einsum("bnc,bmc->bnm", query, key) / np.sqrt(query.shape[-1])
    return np.einsum("bnm,bmd->bnd", softmax(scores, axis=-1), value)


def direct_attention(query, key, value):
    scores = jnp.einsum("bnc,bmc->bnm", query, key) / jnp.sqrt(query.shape[-1])
    return jnp.einsum("bnm,bmd->bnd", jax.nn.softmax(scores, axis=-1), value)


@pytest.mark.parametrize("block_size", [64, 25, 16, 7])
def test_blocked_attention_equals_direct_attention(block_size):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, c)) for n, c in ((50, 8), (30, 8), (30, 5)))
    with jax.enable_x64(True):
        ours, back = jax.vjp(
            lambda *arrays: dot_product_attention(*arrays, block_size=block_size),
            *map(jnp.asarray, (query, key, value)),
        )
        np.testing.assert_allclose(ours, numpy_attention(query, key, value), rtol=1e-10, atol=1e-14)
        whole, back_whole = jax.vjp(direct_attention, *map(jnp.asarray, (query, key, value)))
        for one, other in zip(back(ours), back_whole(whole), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_memory_is_linear_in_the_number_of_positions():
    """Residuals of the backward pass: about twice for twice the positions, where all weights would be 4 times."""

    def kept(positions: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, positions, 8), jnp.float32)] * 3
        backward = jax.eval_shape(
            lambda *a: jax.vjp(lambda *b: dot_product_attention(*b, block_size=256), *a)[1], *shapes
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(8192) / kept(4096) < 2.1


def test_blocks_shrink_with_the_number_of_positions():
    """2,048 queries on one device, or 512 on each of four: never more than 2^22 weights."""

    def most(queries: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, n, 8), jnp.float32) for n in (queries, 8192, 8192)]
        back = jax.make_jaxpr(lambda *a: jax.vjp(dot_product_attention, *a)[1](jnp.ones(shapes[0].shape)))(*shapes)
        return max(int(n) * int(m) for n, m in re.findall(r"f32\[1,(\d+),(\d+)\]", str(back)))

    assert most(2048) == most(512) == MAX_WEIGHTS
    assert most(256) == MAX_WEIGHTS // 2


def test_the_module_applies_linear_layers_and_attention():
    rng = np.random.default_rng(1)
    module = Attention(LayerFactory(np.dtype("float32"), 0), 6)
    queries, keys = (rng.normal(size=(2, *size, 6)).astype(np.float32) for size in ((3, 4), (5, 2)))
    linear = lambda layer, x: x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])  # noqa: E731
    query, key, value = (
        linear(layer, maps.reshape(2, -1, 6))
        for layer, maps in ((module.query, queries), (module.key, keys), (module.value, keys))
    )
    ours = module(jnp.asarray(queries), jnp.asarray(keys))
    np.testing.assert_allclose(ours, numpy_attention(query, key, value).reshape(2, 3, 4, 6), atol=1e-5)


def test_parameter_count_is_the_papers():
    """10,638,528 in the paper, of which 117,255 are statistics: Keras counts 7 weights of its input normalisation."""
    network = Network.from_model(create("attention_fusion", classes=14))
    assert parameter_count(network) == 10_521_273
    assert parameter_count(network.stats) == 117_255 - 7


def test_parameter_counts_of_the_baselines_are_the_papers():
    def total(name):
        network = Network.from_model(create(name, classes=14, hidden=512))
        return parameter_count(network) + parameter_count(network.stats)

    assert total("densenet121") == 7_569_486
    assert total("efficientnet_b0") == 4_712_625 - 7  # as above


@pytest.mark.parametrize(("attention", "match", "size"), [("self", "up", (8, 8)), ("cross", "down", (2, 2))])
def test_features_are_composed_of_the_trunks_and_attention(attention, match, size):
    model = create("attention_fusion_small", classes=3, attention=attention, match=match)
    model.gate[...] = gate = jnp.arange(1.0, 1 + len(model.gate[...]))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 1)), jnp.float32)
    named = jax.jit(lambda x: model.features(x), compiler_options=FAST_COMPILE)(images)
    fused = named["fused"]
    assert fused.shape == (2, *size, 16)
    pair = [model.dense_reduction(named["dense"]), model.efficient_reduction(named["efficient"])]
    pair = [jax.image.resize(maps, (2, *size, 8), "bilinear") for maps in pair]
    np.testing.assert_allclose(fused, jnp.concatenate(pair, axis=-1), atol=1e-4)
    if attention == "self":
        change = gate[0] * model.attention[0](fused, fused)
    else:
        first, second = fused[..., :8], fused[..., 8:]
        change = jnp.concatenate(
            [gate[0] * model.attention[0](first, second), gate[1] * model.attention[1](second, first)], axis=-1
        )
    np.testing.assert_allclose(named["final"], fused + change, atol=1e-4)
    logits = np.asarray(named["final"]).mean((1, 2)) @ np.asarray(model.classifier.output.kernel[...])
    np.testing.assert_allclose(model.head(named), logits + np.asarray(model.classifier.output.bias[...]), atol=1e-4)


def test_the_gate_starts_closed():
    model = create("attention_fusion_small", classes=3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 1)), jnp.float32)
    named = jax.jit(lambda x: model.features(x), compiler_options=FAST_COMPILE)(images)
    np.testing.assert_array_equal(named["final"], named["fused"])


def test_whole_networks_fill_its_trunks():
    """`member_arrays` selects exactly the arrays of the trunk."""
    model = create("attention_fusion", classes=2)
    for member, architecture in model.members.items():
        full, trunk = flat(create(architecture, classes=5)), flat(getattr(model, member))
        taken = model.member_arrays(member, full)
        assert {name: array.shape for name, array in taken.items()} == {n: a.shape for n, a in trunk.items()}
    np.testing.assert_array_equal(taken["stages.6.0.kernel"], full["stages.6.0.block.0.0.kernel"])


def flat(model) -> dict[str, np.ndarray]:
    network = Network.from_model(model)
    leaves, _ = jax.tree_util.tree_flatten_with_path((network.params, network.stats))
    return {".".join(str(entry.key) for entry in path[1:]): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize(
    ("options", "message"), [({"match": "side"}, "unknown match 'side'"), ({"attention": "none"}, "unknown attention")]
)
def test_bad_options_are_named(options, message):
    with pytest.raises(CxrError, match=message):
        create("attention_fusion_small", classes=2, **options)
