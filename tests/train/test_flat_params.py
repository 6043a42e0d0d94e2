"""Flat training states: same values, same steps, few arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cxrjax.data import Batch
from cxrjax.distributed.mesh import batch_shardings, make_mesh, replicated
from cxrjax.distributed.placement import put_batch
from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.train import experiment, loop
from cxrjax.train.monitoring import read_metrics
from cxrjax.train.optimizer import as_one_vector
from cxrjax.train.state import FlatTree, TrainState, flatten_for_mesh, flatten_params, is_flat, unflatten_params
from cxrjax.train.step import make_predict_step, make_train_step

LEAVES = arrays.arrays(
    st.sampled_from([np.float32, np.float16, np.int32]), arrays.array_shapes(min_dims=0, max_dims=3, max_side=3)
)
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)


@settings(deadline=None)
@given(tree=TREES)
def test_flat_trees_round_trip(tree):
    few = FlatTree.from_tree(jax.tree.map(jnp.asarray, tree))
    vectors = {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.ndim == 1}
    others = sum(leaf.ndim != 1 for leaf in jax.tree.leaves(tree))
    assert len(jax.tree.leaves(few)) == len(vectors) + others
    back = few.to_tree()
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for ours, expected in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def small(seed=0, **options):
    options = {"growth_rate": 4, "block_config": (1, 1), "stem_channels": 4} | options
    return Network.from_model(create("densenet_small", classes=3, seed=seed, **options))


def test_networks_of_one_shape_have_one_layout():
    one, other = flatten_params(small(0)), flatten_params(small(1))
    assert one.params.layout is other.params.layout
    assert (
        jax.tree.structure(one) == jax.tree.structure(other) != jax.tree.structure(flatten_params(small(growth_rate=8)))
    )


def test_large_arrays_are_not_copied():
    """Neither flattening nor unflattening copies them."""
    network = small()
    few = flatten_params(network)
    back = unflatten_params(few)
    kernels = lambda tree: [leaf for leaf in jax.tree.leaves(tree.params) if leaf.ndim == 4]  # noqa: E731
    assert kernels(network)
    for before, between, after in zip(kernels(network), kernels(few), kernels(back), strict=True):
        assert before is between is after


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_flat_state_takes_the_same_steps(shape):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        batch = Batch(
            image=rng.integers(0, 256, (4, 32, 32, 1), np.uint8),
            label=(rng.random((4, 3)) < 0.5).astype(np.float32),
            label_mask=np.ones((4, 3), bool),
            example_mask=np.ones(4, bool),
            record=np.arange(4, dtype=np.int32),
        )
        network, optimizer = small(dtype="float64"), as_one_vector(optax.scale_by_adam())
        mesh = make_mesh(*shape)
        step = make_train_step(network, optimizer, optax.constant_schedule(0.05), mesh)
        apart, few = (jax.device_put(TrainState.create(network, optimizer, 0), replicated(mesh)) for _ in range(2))
        batch, few = put_batch(batch, batch_shardings(mesh)), flatten_params(few)
        for _ in range(3):
            apart, expected = step(apart, batch)
            few, metrics = step(few, batch)
            assert is_flat(few)
            assert not is_flat(apart)
            assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(few))
            np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-10)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)  # noqa: E731
        jax.tree.map(close, unflatten_params(few), apart)


def test_a_flat_network_predicts_the_same():
    network, step = small(), make_predict_step(make_mesh(1, 1))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    np.testing.assert_allclose(step(flatten_params(network), images), step(network, images), rtol=1e-6, atol=1e-6)


def test_unflattening_a_nested_network_returns_it():
    network = small()
    assert unflatten_params(network) is network


def test_a_flat_densenet121_state_has_few_arrays():
    optimizer = as_one_vector(optax.scale_by_adam())
    network = Network.from_model(create("densenet121", classes=14))
    state = jax.eval_shape(lambda: TrainState.create(network, optimizer, 0))
    few = jax.eval_shape(flatten_params, state)
    assert len(jax.tree.leaves(state)) == 612
    assert len(jax.tree.leaves(few)) == 612 - (2 * 121 + 1) + 1 - 2 * 121 + 1


class FakeGpuMesh:
    """A stand-in for a mesh of accelerators."""

    devices = np.array([[type("Device", (), {"platform": "gpu"})()]])


def test_states_are_flat_on_accelerators_only():
    network = small()
    assert is_flat(flatten_for_mesh(network, FakeGpuMesh()))
    assert flatten_for_mesh(network, make_mesh(1, 1)) is network


def test_flat_and_nested_states_train_alike_and_share_checkpoints(tiny, tmp_path, monkeypatch):
    """A checkpoint written by one kind resumes as the other."""
    were_flat, make = [], loop.make_train_step
    overrides = (
        "train.epochs=2",
        "train.steps_per_epoch=2",
        "optimizer.schedule=constant",
        "optimizer.warmup_fraction=0",
    )

    def recorded(*args, **kwargs):
        step = make(*args, **kwargs)

        def record(state, batch):
            were_flat.append(is_flat(state))
            return step(state, batch)

        return record

    monkeypatch.setattr(loop, "make_train_step", recorded)
    loop.train(tiny(*overrides), tmp_path / "apart")
    loop.train(tiny(*overrides, "train.epochs=1"), tmp_path / "both")
    for module in (loop, experiment):
        monkeypatch.setattr(module, "flatten_for_mesh", lambda tree, _: flatten_params(tree))
    loop.train(tiny(*overrides), tmp_path / "both")
    assert were_flat == [False] * 6 + [True] * 2
    apart, both = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("apart", "both"))
    assert [row["step"] for row in both] == [row["step"] for row in apart]
    for row, expected in zip(both, apart, strict=True):
        for name in expected.keys() - {"seconds", "data_wait_fraction"}:
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, err_msg=name)
