import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss

from cxrjax.train.loop import mean_bce
from cxrjax.train.losses import masked_bce


@settings(deadline=None, max_examples=30)
@given(
    logits=hnp.arrays(np.float32, (4, 3), elements=st.floats(-20, 20, width=32)),
    label=hnp.arrays(np.bool_, (4, 3)),
    known=hnp.arrays(np.bool_, (4, 3)),
    valid=hnp.arrays(np.bool_, (4,)),
)
def test_mean_equals_sklearn_over_what_is_known(logits, label, known, valid):
    total, count = masked_bce(jnp.array(logits), jnp.array(label, jnp.float32), jnp.array(known), jnp.array(valid))
    mask = known & valid[:, None]
    assert float(count) == mask.sum()
    if mask.any():
        probability = 1 / (1 + np.exp(-logits[mask].astype(np.float64)))
        expected = log_loss(label[mask], probability, labels=[False, True])
        np.testing.assert_allclose(float(total / count), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            mean_bce(logits.astype(np.float64), label * 1.0, mask), expected, rtol=1e-7, atol=1e-12
        )
    else:
        assert float(total) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("logit", [-100.0, 100.0, 0.0])
def test_extreme_logits_are_finite_in_value_and_gradient(dtype, logit):
    def loss(z, y):
        return masked_bce(z, jnp.full((1, 1), y), jnp.ones((1, 1), bool), jnp.ones((1,), bool))[0]

    z = jnp.full((1, 1), logit, dtype)
    for y in (0.0, 1.0):
        value, gradient = jax.value_and_grad(loss)(z, y)
        assert jnp.isfinite(value)
        np.testing.assert_allclose(np.float64(gradient[0, 0]), 1 / (1 + np.exp(-logit)) - y, atol=4e-3)


def test_unknown_and_padding_have_no_gradient():
    def loss(z):
        known = jnp.array([[True, False], [True, True]])
        return masked_bce(z, jnp.ones((2, 2)), known, jnp.array([True, False]))[0]

    gradient = jax.grad(loss)(jnp.zeros((2, 2)))
    np.testing.assert_array_equal(gradient, [[-0.5, 0.0], [0.0, 0.0]])
