"""Freezing and rates by module: what is frozen keeps its bits, and the rest moves by its own rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from cxrjax import config as configs
from cxrjax.data import Batch
from cxrjax.distributed.mesh import batch_shardings, make_mesh, replicated
from cxrjax.distributed.placement import put_batch
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.train.optimizer import TrainableParams, make_optimizer
from cxrjax.train.state import TrainState
from cxrjax.train.step import make_train_step


@pytest.fixture
def network() -> Network:
    return Network.from_model(
        create("densenet_small", classes=3, growth_rate=4, block_config=(1, 1), stem_channels=4, hidden=5)
    )


def learning(network, *overrides) -> TrainableParams:
    return TrainableParams.from_config(network, configs.load_config("demo", overrides))


def train(network, learning, accumulate=1, name="sgd", steps=2):
    rng = np.random.default_rng(0)
    batch = Batch(
        image=rng.integers(0, 256, (8, 32, 32, 1), np.uint8), label=rng.integers(0, 2, (8, 3)).astype(np.float32),
        label_mask=np.ones((8, 3), bool), example_mask=np.ones(8, bool), record=np.arange(8, dtype=np.int32),
    )  # fmt: skip
    mesh = make_mesh(1, 1)
    optimizer = make_optimizer(
        configs.load_config("demo", [f"optimizer.name={name}", "optimizer.grad_clip_norm=0"]).optimizer
    )
    step = make_train_step(network, optimizer, optax.constant_schedule(0.05), mesh, accumulate, learning)
    state = jax.device_put(TrainState.create(network, optimizer, 0, learning), replicated(mesh))
    for _ in range(steps):
        state, _ = step(state, put_batch(batch, batch_shardings(mesh)))
    return jax.device_get(state)


def moved(before, after) -> set[str]:
    before, after = flatten_dict(before), flatten_dict(after)
    return {".".join(map(str, path)) for path in before if not np.array_equal(before[path], after[path])}


HEAD = {"classifier.hidden.kernel", "classifier.hidden.bias", "classifier.output.kernel", "classifier.output.bias"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_backbone_keeps_its_bits_and_its_statistics(network, accumulate):
    state = train(network, learning(network, "train.freeze=backbone"), accumulate, name="adamw")
    assert moved(network.params, state.params) == HEAD
    assert moved(network.stats, state.stats) == set()
    learns = sum(leaf.size for path, leaf in flatten_dict(network.params).items() if ".".join(path) in HEAD)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert moments == [(learns,), (learns,)]  # nothing is kept for what does not learn


def test_statistics_of_a_frozen_backbone_may_move(network):
    state = train(network, learning(network, "train.freeze=backbone", "train.batch_norm=batch"))
    assert moved(network.params, state.params) == HEAD
    assert len(moved(network.stats, state.stats)) == len(flatten_dict(network.stats))


def test_statistics_may_be_frozen_alone(network):
    state = train(network, learning(network, "train.batch_norm=frozen"))
    assert moved(network.params, state.params) == {".".join(path) for path in flatten_dict(network.params)}
    assert moved(network.stats, state.stats) == set()


def test_a_frozen_backbone_is_the_network_at_inference(network):
    """The step of the head alone, computed by hand from features at inference."""
    one = train(network, learning(network, "train.freeze=backbone"), steps=1)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (8, 32, 32, 1), np.uint8))
    label = jnp.asarray(rng.integers(0, 2, (8, 3)).astype(np.float32))

    def loss(head):
        params = {**network.params, "classifier": head}
        logits, _ = dataclasses.replace(network, params=params).apply(images)
        return optax.sigmoid_binary_cross_entropy(logits, label).mean()

    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.jit(jax.grad(loss))(network.params["classifier"])
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, network.params["classifier"], gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.params["classifier"], expected
    )


def test_modules_are_frozen_by_name(network):
    state = train(network, learning(network, "train.freeze=conv0, denseblock1.denselayer1.norm1"))
    every = {".".join(path) for path in flatten_dict(network.params)}
    frozen = {name for name in every if name.startswith(("conv0.", "denseblock1.denselayer1.norm1."))}
    assert moved(network.params, state.params) == every - frozen
    assert frozen == {"conv0.kernel", "denseblock1.denselayer1.norm1.scale", "denseblock1.denselayer1.norm1.bias"}


def test_each_module_moves_by_its_own_rate(network):
    multipliers = {"backbone": 0.5, "norm5": 3, "denseblock2": {"denselayer1": {"conv2": 0.25}}}
    override = f"optimizer.lr_multipliers={multipliers}"
    plain = flatten_dict(train(network, learning(network), steps=1).params)
    ours = flatten_dict(train(network, learning(network, override), steps=1).params)
    start = flatten_dict(network.params)
    for path, before in start.items():
        name = ".".join(path)
        factor = {"classifier": 1, "norm5": 3}.get(path[0], 0.5)
        factor = 0.25 if name.startswith("denseblock2.denselayer1.conv2") else factor
        expected = np.asarray(before) + factor * (plain[path] - np.asarray(before))
        np.testing.assert_allclose(ours[path], expected, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.freeze=backbon", "names backbon, which this network does not have: did you mean backbone"),
        ("train.freeze=conv0,denseblock9", "train.freeze names denseblock9.*did you mean denseblock"),
        ("train.freeze=backbone,classifier", "leaves nothing to train"),
        ("optimizer.lr_multipliers.conv1=2", "optimizer.lr_multipliers names conv1.*did you mean conv0"),
        ("optimizer.lr_multipliers.conv0=-1", "optimizer.lr_multipliers.conv0 is -1.0, and must be at least"),
        ("optimizer.lr_multipliers.conv0=x", "optimizer.lr_multipliers.conv0 takes a value of type float, not 'x'"),
        ("optimizer.lr_multipliers=conv0", "optimizer.lr_multipliers holds keys"),
        ("train.batch_norm=freeze", "must be one of auto, batch, frozen; did you mean"),
    ],
)
def test_what_is_wrong_is_named(network, override, message):
    with pytest.raises(CxrError, match=message):
        learning(network, override)
