"""Peak memory of small programs, counted by hand; tests/planning/test_plan.py compares training steps with XLA."""

import jax
import jax.numpy as jnp
import pytest

from cxrjax.planning.memory_estimate import peak_bytes

N = 100
ROWS, SQUARE = jax.ShapeDtypeStruct((10, N), jnp.float32), jax.ShapeDtypeStruct((N, N), jnp.float32)
MAP, KERNEL = 4 * 10 * N, 4 * N * N


def held(function, *shapes, **options):
    return peak_bytes(jax.make_jaxpr(function)(*shapes).jaxpr, **options)


def test_intermediates_live_until_the_next_product():
    # The product and its tanh, then that and the result.
    assert held(lambda x, w, v: jnp.tanh(2 * (x @ w)) @ v, ROWS, SQUARE, SQUARE) == 2 * MAP


def test_reductions_are_fused_with_their_operands():
    assert held(lambda x: jnp.exp(x).sum(), SQUARE) == 4
    assert held(lambda x, w: jnp.exp(x @ w).sum(), ROWS, SQUARE) == MAP + 4


def test_unneeded_results_take_no_memory():
    assert held(lambda x, w: ((x @ w) @ w, x.sum())[1], ROWS, SQUARE) == 4


@jax.custom_jvp
def tanh(x):
    return jnp.tanh(x)


@tanh.defjvp
def _(primals, tangents):  # JAX's own in 0.10; in 0.12 it is one operation
    y, (tangent,) = tanh(*primals), tangents
    return y, tangent * (1 - y) + tangent * (1 - y) * y


def layers(x, kernels):
    for kernel in kernels:
        x = tanh(x @ kernel)
    return x


@pytest.mark.parametrize("depth", [3, 6])
def test_gradients_keep_every_map_and_remat_one_per_layer(depth):
    def gradient(step):
        return lambda x, *kernels: jax.grad(lambda x: step(x, kernels).sum())(x)

    plain = held(gradient(layers), ROWS, *[SQUARE] * depth)
    assert 2 * depth * MAP <= plain <= (2 * depth + 2) * MAP  # of each layer the product, and the map for the next
    again = jax.checkpoint(lambda x, kernel: layers(x, [kernel]))
    recomputing = lambda x, kernels: again(recomputing(x, kernels[:-1]), kernels[-1]) if kernels else x  # noqa: E731
    less = held(gradient(recomputing), ROWS, *[SQUARE] * depth)
    assert depth * MAP <= less <= (depth + 3) * MAP


def test_loops_hold_one_iteration():
    def looped(xs, w):
        return jax.lax.map(lambda x: (jnp.tanh(x @ w) @ w).sum(), xs)

    many = jax.ShapeDtypeStruct((7, 10, N), jnp.float32)
    assert held(looped, many, SQUARE) == pytest.approx(2 * MAP, abs=100)


def test_size_of_sets_the_bytes_per_device():
    halves = held(lambda x, w: (x @ w) @ w, ROWS, SQUARE, size_of=lambda aval: 2 * aval.size)
    assert halves == held(lambda x, w: (x @ w) @ w, ROWS, SQUARE) / 2
