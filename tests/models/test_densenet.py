import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network, parameter_count

TINY = {"growth_rate": 4, "block_config": (2, 1), "stem_channels": 4}


def test_parameter_counts():
    assert parameter_count(create("densenet121", classes=14)) == 6_968_206
    # 7,569,486 in the paper, whose tool adds the batch statistics.
    network = Network.from_model(create("densenet121", classes=14, hidden=512))
    assert parameter_count(network) + parameter_count(network.stats) == 7_569_486


def test_stages_halve_and_odd_sizes_round_as_in_torch():
    network = Network.from_model(
        create("densenet121", classes=3, growth_rate=4, block_config=(1, 1, 1, 1), stem_channels=4)
    )
    images = jax.ShapeDtypeStruct((2, 131, 97, 3), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    # (n + 1) // 2 for the stem's padded convolution and pooling, n // 2 for the transitions.
    assert {name: maps.shape[1:3] for name, maps in features.items()} == {
        "stem": (33, 25), "block1": (33, 25), "block2": (16, 12), "block3": (8, 6), "block4": (4, 3), "final": (4, 3),
    }  # fmt: skip
    assert list(features) == ["stem", "block1", "block2", "block3", "block4", "final"]


@pytest.mark.parametrize(("remat", "linear"), [("none", False), ("layer", True)])
def test_layer_remat_makes_memory_linear_in_depth(remat, linear):
    def residual_bytes(depth: int) -> int:
        """Bytes that the forward pass stores for the backward pass, parameters included."""
        options = {"growth_rate": 4, "block_config": (depth,), "pooling": "average"}
        network = Network.from_model(create("densenet_small", classes=2, remat=remat, **options))

        def backward(network, images):
            def run(params):
                return dataclasses.replace(network, params=params).apply(images, train=True)[0]

            return jax.vjp(run, network.params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, network, jax.ShapeDtypeStruct((2, 128, 128, 1), jnp.uint8)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    shallow, middle, deep = residual_bytes(3), residual_bytes(6), residual_bytes(9)
    bend = ((deep - middle) - (middle - shallow)) / (middle - shallow)
    assert bend < 0.02 if linear else bend > 0.15
    if linear:  # of three layers: their new maps, 2 x 32 x 32 x 4 float32, and little else
        assert middle - shallow < 1.3 * 3 * 2 * 32 * 32 * 4 * 4


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_a_training_step_updates_the_statistics_once(remat):
    network = Network.from_model(create("densenet_small", classes=2, remat=remat, **TINY))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)

    @jax.jit
    def step(network, images):
        def loss(params):
            logits, stats = dataclasses.replace(network, params=params).apply(images, train=True)
            return logits.sum(), stats

        return jax.grad(loss, has_aux=True)(network.params)[1]

    once = step(network, images)
    for before, after in zip(jax.tree.leaves(network.stats), jax.tree.leaves(once), strict=True):
        assert not np.array_equal(before, after)
    # The same images again: the mean has moved 1 - 0.9^2 of the way to theirs, after 1 - 0.9 the first time.
    twice = step(dataclasses.replace(network, stats=once), images)
    first, second = once["norm0"]["mean"], twice["norm0"]["mean"]
    np.testing.assert_allclose(second, 1.9 * first, rtol=1e-5)


def test_inference_keeps_the_statistics():
    network = Network.from_model(create("densenet_small", classes=2, **TINY))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    _, stats = jax.jit(lambda network: network.apply(images))(network)
    jax.tree.map(np.testing.assert_array_equal, stats, network.stats)


def test_bfloat16_is_close_to_float32():
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), np.uint8)
    logits = {}
    for dtype in ("bfloat16", "float32"):
        network = Network.from_model(create("densenet_small", classes=5, dtype=dtype, seed=2))
        assert {leaf.dtype for leaf in jax.tree.leaves((network.params, network.stats))} == {np.dtype("float32")}
        logits[dtype], stats = jax.jit(lambda network: network.apply(images, train=True))(network)
        assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype("float32")}
        assert logits[dtype].dtype == jnp.float32
    assert 1e-5 < relative_error(logits["bfloat16"], logits["float32"]) < 0.03


def test_statistics_are_of_the_global_batch_on_any_mesh():
    network = Network.from_model(create("densenet_small", classes=2, **TINY))
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), np.uint8)
    apply = jax.jit(lambda network, images: network.apply(images, train=True))
    expected = apply(network, images)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "space"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "space"))
    sharded = apply(jax.device_put(network, replicated), jax.device_put(images, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, sharded)


def test_too_small_images_are_refused():
    network = Network.from_model(
        create("densenet121", classes=2, growth_rate=2, block_config=(1, 1, 1, 1), stem_channels=2)
    )
    with pytest.raises(CxrError, match="too small"):
        jax.eval_shape(lambda n, i: n.apply(i)[0], network, jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.uint8))


def test_one_value_per_channel_cannot_train():
    network = Network.from_model(create("densenet_small", classes=2, **TINY))
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)
    with pytest.raises(CxrError, match="larger batch"):
        jax.eval_shape(lambda n, i: n.apply(i, train=True)[0], network, images)
