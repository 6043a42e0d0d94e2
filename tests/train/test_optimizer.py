"""The optimizers against optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cxrjax import config as configs
from cxrjax.train.optimizer import make_optimizer, schedule


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax raises float decays to integer counts
        yield


def options(**changes):
    config = configs.default().optimizer
    config.update(changes)
    return config


def test_cosine_with_warmup_rises_to_the_rate_and_falls_to_zero():
    rate = schedule(options(learning_rate=0.1, schedule="cosine", warmup_fraction=0.1), 100)
    values = np.array([rate(step) for step in range(101)])
    np.testing.assert_allclose(values[:11], np.linspace(0, 0.1, 11), rtol=1e-5)
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(values[10:], expected, rtol=1e-5, atol=1e-8)


def test_constant_and_plateau_hold_the_rate():
    for name in ("constant", "plateau"):
        rate = schedule(options(learning_rate=0.1, schedule=name), 10)
        assert rate(0) == rate(9) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_steps_equal_optax_with_the_rate_inside(name):
    ours = make_optimizer(options(name=name, learning_rate=0.01, weight_decay=0.1))
    reference = {
        "adam": optax.adam(0.01),
        "adamw": optax.adamw(0.01, weight_decay=0.1, mask={"w": True, "b": False}),
        "sgd": optax.sgd(0.01, momentum=0.9),
    }[name]
    params = expected = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    state, reference_state = ours.init(params), reference.init(params)
    for gradient in ({"w": jnp.full((2, 3), x), "b": jnp.array([x, -x, x * x])} for x in (0.5, -2.0, 0.1)):
        direction, state = ours.update(gradient, state, params)
        params = jax.tree.map(lambda p, d: p - 0.01 * d, params, direction)
        update, reference_state = reference.update(gradient, reference_state, expected)
        expected = optax.apply_updates(expected, update)
    for ours_leaf, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours_leaf, theirs, rtol=1e-6, atol=1e-8)


def test_clip_bounds_the_global_norm():
    ours = make_optimizer(options(name="sgd", beta1=0.0, grad_clip_norm=1.0))
    gradient = {"w": jnp.full((4,), 10.0)}
    direction, _ = ours.update(gradient, ours.init(gradient), gradient)
    assert optax.tree.norm(direction) == pytest.approx(1.0)


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
def test_only_tpus_keep_the_whole_from_the_shape_of_its_parts(platform, barriers):
    ours = make_optimizer(options(name="sgd"))
    gradient = {"w": jnp.ones((2, 14)), "b": jnp.ones(14)}
    traced = jax.jit(lambda gradient: ours.update(gradient, ours.init(gradient), gradient)).trace(gradient)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == barriers
