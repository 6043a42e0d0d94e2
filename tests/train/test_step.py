"""The training step matches one plain optax step, on any mesh and with any number of microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cxrjax import config as configs
from cxrjax.data import Batch
from cxrjax.distributed.mesh import batch_shardings, make_mesh, replicated
from cxrjax.distributed.placement import put_batch
from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.train.losses import masked_bce
from cxrjax.train.optimizer import make_optimizer
from cxrjax.train.state import TrainState
from cxrjax.train.step import make_predict_step, make_train_step

TINY = {"growth_rate": 4, "block_config": (1, 1), "stem_channels": 4}


def make_batch(seed=0, n=8, size=32):
    rng = np.random.default_rng(seed)
    return Batch(
        image=rng.integers(0, 256, (n, size, size, 1), np.uint8),
        label=rng.integers(0, 2, (n, 3)).astype(np.float32),
        label_mask=rng.random((n, 3)) < 0.8,
        example_mask=np.ones(n, bool),
        record=np.arange(n, dtype=np.int32),
    )


def network(dtype="float32", **options):
    return Network.from_model(create("densenet_small", classes=3, dtype=dtype, **TINY, **options))


def run(net, batch, mesh, accumulate=1, steps=2, name="sgd"):
    optimizer = make_optimizer(
        configs.load_config("demo", [f"optimizer.name={name}", "optimizer.grad_clip_norm=0"]).optimizer
    )
    step = make_train_step(net, optimizer, optax.constant_schedule(0.05), mesh, accumulate)
    state = jax.device_put(TrainState.create(net, optimizer, 0), replicated(mesh))
    placed = put_batch(batch, batch_shardings(mesh))
    for _ in range(steps):
        state, metrics = step(state, placed)
    return jax.device_get((state.params, state.stats, metrics))


def relative(a, b):
    flat_a, flat_b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(np.float64) for t in (a, b))
    return np.linalg.norm(flat_a - flat_b) / np.linalg.norm(flat_b)


def test_one_step_is_plain_gradient_descent():
    net, batch = network(), make_batch()

    def loss(params):
        logits, stats = dataclasses.replace(net, params=params).apply(jnp.asarray(batch.image), train=True)
        total, count = masked_bce(
            logits, *(jnp.asarray(x) for x in (batch.label, batch.label_mask, batch.example_mask))
        )
        return total / count, stats

    (value, stats), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(net.params)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, net.params, gradient)
    params, new_stats, metrics = run(net, batch, make_mesh(1, 1), steps=1)
    assert relative(params, expected) < 1e-6
    assert relative(new_stats, stats) < 1e-6
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 2)])
def test_any_mesh_matches_one_device(shape):
    with jax.enable_x64(True):
        net, batch = network("float64"), make_batch()
        one = run(net, batch, make_mesh(1, 1))
        many = run(net, batch, make_mesh(*shape))
    assert relative(many[0], one[0]) < 1e-10
    assert relative(many[1], one[1]) < 1e-10


def test_the_accumulated_gradient_matches_the_whole_batch():
    """Every microbatch has the same images, so that batch statistics agree as well."""
    with jax.enable_x64(True):
        net, half = network("float64"), make_batch(n=4)
        doubled = Batch(*(np.repeat(x, 2, axis=0) for x in half))  # microbatches take every second row
        whole, accumulated = run(net, doubled, make_mesh(1, 1)), run(net, doubled, make_mesh(1, 1), accumulate=2)
    assert relative(accumulated[0], whole[0]) < 1e-10


def test_padding_and_unknown_labels_change_nothing():
    net, batch = network(), make_batch()._replace(example_mask=np.arange(8) < 6)
    counts = batch.label_mask & batch.example_mask[:, None]
    other = batch._replace(
        label=np.where(counts, batch.label, 1 - batch.label), label_mask=batch.label_mask | ~batch.example_mask[:, None]
    )
    first, second = run(net, batch, make_mesh(1, 1)), run(net, other, make_mesh(1, 1))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_falls_and_all_statistics_change():
    net, batch = network(), make_batch()
    one, many = (run(net, batch, make_mesh(1, 1), steps=steps, name="adamw") for steps in (1, 40))
    assert many[2]["loss"] < 0.7 * one[2]["loss"]
    for before, after in zip(jax.tree.leaves(net.stats), jax.tree.leaves(one[1]), strict=True):
        assert not np.array_equal(before, after)


def test_the_predict_step_is_inference_on_any_mesh():
    net, batch = network(), make_batch()
    expected = jax.jit(lambda n, x: n.apply(x)[0])(net, batch.image)
    for shape in ((1, 1), (2, 4)):
        mesh = make_mesh(*shape)
        image = put_batch(batch, batch_shardings(mesh)).image
        np.testing.assert_allclose(make_predict_step(mesh)(net, image), expected, rtol=2e-5, atol=2e-6)
