import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np

from cxrjax.models import create
from cxrjax.models.input_spec import GREY, prepare
from cxrjax.models.network import Network, parameter_count

TINY = {"growth_rate": 4, "block_config": (1, 1), "stem_channels": 4}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)


def tiny(**changes) -> Network:
    return Network.from_model(create("densenet_small", **{"classes": 2, **TINY, **changes}))


def test_model_and_from_model_are_inverse():
    model = create("densenet_small", classes=2, **TINY)
    network = Network.from_model(model)
    again = Network.from_model(network.model())
    assert jax.tree.structure(network) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, network, again)
    expected = model(prepare(jnp.asarray(IMAGES), GREY, jnp.float32))
    np.testing.assert_allclose(network.apply(IMAGES)[0], expected, rtol=1e-6)


def test_trees_are_plain_dicts_with_names_as_keys():
    network = tiny()

    def walk(tree):
        if isinstance(tree, jax.Array):
            return
        assert type(tree) is dict
        for name, subtree in tree.items():
            assert type(name) is str
            walk(subtree)

    walk(network.params)
    walk(network.stats)
    assert network.params["denseblock1"]["denselayer1"]["conv2"]["kernel"].shape == (3, 3, 8, 4)
    assert network.stats["norm5"]["var"].shape == network.params["norm5"]["scale"].shape


def test_equal_networks_share_a_compilation_and_others_do_not():
    traced = []

    @jax.jit
    def apply(network):
        traced.append(network.dtype)
        return network.apply(IMAGES)[0]

    first = tiny(seed=1)
    for network in (first, tiny(seed=2), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        apply(network)
    assert len(traced) == 1
    apply(tiny(remat="layer"))
    apply(tiny(dtype="bfloat16"))
    assert traced == ["float32", "float32", "bfloat16"]


def test_weights_depend_on_the_seed_alone():
    leaves = [jax.tree.leaves(tiny(seed=seed).params) for seed in (3, 3, 4)]
    for one, same in zip(leaves[0], leaves[1], strict=True):
        np.testing.assert_array_equal(one, same)
    assert any(not np.array_equal(one, other) for one, other in zip(leaves[0], leaves[2], strict=True))


def test_initial_weights_are_distributed_as_torchvisions():
    network = Network.from_model(create("densenet121", classes=14))
    kernel = np.asarray(network.params["denseblock4"]["denselayer16"]["conv1"]["kernel"])  # 992 inputs
    assert abs(kernel.mean()) < 3e-4
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 992), rtol=0.01)
    output = network.params["classifier"]["output"]
    np.testing.assert_allclose(np.abs(output["kernel"]).max(), 1 / np.sqrt(1024), rtol=0.01)
    np.testing.assert_array_equal(output["bias"], 0)


def test_features_keep_their_order_through_jit():
    network = tiny()
    features = jax.jit(lambda network: network.model().features(prepare(jnp.asarray(IMAGES), GREY, jnp.float32)))(
        network
    )
    assert list(features) == ["stem", "block1", "block2", "final"]
    np.testing.assert_allclose(network.model().head(features), network.apply(IMAGES)[0], rtol=1e-5)


def test_parameter_count_takes_modules_networks_and_trees():
    model = create("densenet_small", classes=2, **TINY)
    network = Network.from_model(model)
    assert parameter_count(model) == parameter_count(network) == parameter_count(network.params)
    assert parameter_count({"a": np.zeros((2, 3)), "b": np.zeros(())}) == 7
    assert parameter_count(jax.eval_shape(lambda: network.params)) == parameter_count(network)


def test_monte_carlo_dropout_varies_with_the_key_only():
    network = tiny(dropout=0.5)
    apply = jax.jit(lambda network, key: network.apply(IMAGES, key=key)[0])
    one, same, other = (apply(network, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    copied = dataclasses.replace(network, params=jax.tree.map(jnp.copy, network.params))
    np.testing.assert_array_equal(network.apply(IMAGES)[0], copied.apply(IMAGES)[0])
