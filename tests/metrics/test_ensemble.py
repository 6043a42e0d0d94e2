"""Ensembles against plain probabilities, JAX's gradient and SciPy's optimizers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit, softmax

from cxrjax.errors import CxrError
from cxrjax.metrics.ensemble import MixtureLikelihood, align, combine, fit_logistic, fit_weights, stack, vote
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import score


def simulated(seed=0, scales=3, images=400, findings=4, noise=1.5):
    """Simulate scales of different skill, so that the best weights are neither equal nor all on one scale."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, findings)) < 0.3).astype(float)
    skill = rng.uniform(0.3, 1.5, (scales, 1, findings))
    logits = skill * np.where(labels, 1.5, -1.5) + noise * rng.normal(size=(scales, images, findings))
    return logits, labels, rng.random((images, findings)) < 0.9


def uniform(findings, scales):
    return np.full((findings, scales), 1 / scales)


def plain_loss(v, logits, labels, label_mask):
    """Equations 2 and 3 as written, for autodiff."""
    weights = jax.nn.softmax(v, axis=1)
    p = (weights.T[:, None, :] * jax.nn.sigmoid(logits)).sum(0)
    return -jnp.where(label_mask, labels * jnp.log(p) + (1 - labels) * jnp.log1p(-p), 0).sum() / label_mask.sum(
        dtype=v.dtype
    )


def test_loss_and_gradient_match_the_equations_and_jax_grad():
    logits, labels, label_mask = simulated()
    v = np.random.default_rng(1).normal(size=(4, 3))
    loss, gradient = MixtureLikelihood.from_logits(logits, labels, label_mask).loss(v)
    with jax.enable_x64(True):
        expected = jax.value_and_grad(plain_loss)(*map(jnp.asarray, (v, logits, labels, label_mask)))
    assert loss == pytest.approx(float(expected[0]), abs=1e-13)
    np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("noise", [0.7, 1.5, 4.0])
def test_fit_approaches_the_best_loss(noise):
    logits, labels, label_mask = simulated(noise=noise)
    fit = fit_weights(logits, labels, label_mask)

    def mixture_loss(weights):  # over the simplex itself, not through a softmax
        p = (weights.reshape(4, 3).T[:, None, :] * expit(logits)).sum(0)
        return -np.where(label_mask, labels * np.log(p) + (1 - labels) * np.log1p(-p), 0).sum() / label_mask.sum()

    best = minimize(
        mixture_loss, np.full(12, 1 / 3), method="SLSQP", bounds=[(1e-9, 1)] * 12,
        options={"maxiter": 500, "ftol": 1e-12},
        constraints={"type": "eq", "fun": lambda w: w.reshape(4, 3).sum(1) - 1},
    )  # fmt: skip
    assert best.success
    assert fit.loss[0] == pytest.approx(mixture_loss(uniform(4, 3)), abs=1e-12)
    assert fit.loss[-1] == pytest.approx(mixture_loss(fit.weights), abs=1e-12)
    assert best.fun <= fit.loss[-1] + 1e-9
    assert fit.loss[-1] - best.fun < 0.02 * (fit.loss[0] - best.fun)
    assert len(fit.loss) == 101


def test_weights_sum_to_1_and_favour_the_better_scale():
    rng = np.random.default_rng(0)
    labels = (rng.random((500, 2)) < 0.4).astype(float)
    good, noise = 3 * (2 * labels - 1) + rng.normal(size=(500, 2)), rng.normal(size=(500, 2))
    logits = np.stack([good, noise])
    logits[:, :, 1] = logits[::-1, :, 1]  # the second finding's good scale is the other
    weights = fit_weights(logits, labels, np.ones((500, 2), bool)).weights
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    assert weights[0, 0] > 0.95
    assert weights[1, 1] > 0.95


def test_findings_are_fitted_independently():
    logits, labels, label_mask = simulated()
    label_mask[:, 2] = False
    weights = fit_weights(logits, labels, label_mask).weights
    np.testing.assert_allclose(weights[2], 1 / 3, atol=1e-15)
    alone = fit_weights(logits[:, :, :1], labels[:, :1], label_mask[:, :1]).weights
    np.testing.assert_allclose(weights[0], alone[0], atol=1e-4)  # Adam is blind to the gradient's scale


def test_confident_wrong_models_stay_finite():
    labels = np.array([[1.0], [0.0], [1.0], [0.0]])
    logits = np.array([[[-100.0], [100.0], [-100.0], [100.0]], [[100.0], [-100.0], [100.0], [100.0]]])
    label_mask = np.ones((4, 1), bool)
    loss, gradient = MixtureLikelihood.from_logits(logits, labels, label_mask).loss(np.zeros((1, 2)))
    assert loss == pytest.approx((3 * np.log(2) + 100) / 4)  # three shares of a half, one certain mistake of both
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] > 0.3
    fit = fit_weights(logits, labels, label_mask)
    assert np.isfinite(fit.loss).all()
    assert fit.weights[0, 1] > 0.99
    both_wrong = MixtureLikelihood.from_logits(np.full((2, 1, 1), -1000.0), np.ones((1, 1)), np.ones((1, 1), bool))
    assert both_wrong.loss(np.zeros((1, 2)))[0] == 1000
    assert np.isfinite(fit_weights(logits, labels, label_mask, learning_rate=1e3, decay=1).loss).all()


@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_logistic_stacking_matches_scipys_minimum(strength):
    logits, labels, label_mask = simulated()
    result = fit_logistic(logits, labels, label_mask, inverse_regularization=strength)
    for k in range(4):
        x, y = logits[:, label_mask[:, k], k].T, labels[label_mask[:, k], k]

        def loss(w, x=x, y=y):
            margin = np.where(y > 0, 1, -1) * (x @ w[1:] + w[0])
            return np.logaddexp(0, -margin).sum() + w[1:] @ w[1:] / (2 * strength)

        best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-7})
        np.testing.assert_allclose([result.intercept[k], *result.coefficients[k]], best.x, atol=2e-5)
        residual = expit(x @ result.coefficients[k] + result.intercept[k]) - y  # the score equations
        np.testing.assert_allclose(residual.sum(), 0, atol=1e-6)
        np.testing.assert_allclose(x.T @ residual, -result.coefficients[k] / strength, atol=1e-6)
    assert result.voted == ("",) * 4
    expected = np.stack([logits[:, :, k].T @ result.coefficients[k] + result.intercept[k] for k in range(4)], axis=1)
    np.testing.assert_allclose(result.combine(logits), expected, atol=1e-12)


def test_logistic_stacking_votes_without_both_classes():
    logits, labels, label_mask = simulated()
    labels[:, 1] = 0
    label_mask[:, 2] = False
    label_mask[:, 3] &= labels[:, 3] > 0
    result = fit_logistic(logits, labels, label_mask)
    assert result.voted == ("", "no positive example", "no known label", "no negative example")
    np.testing.assert_array_equal(result.combine(logits)[:, 1:], vote(logits)[:, 1:])
    hidden = np.where(label_mask, labels, 1 - labels)  # what is unknown has no say
    np.testing.assert_array_equal(fit_logistic(logits, hidden, label_mask).coefficients, result.coefficients)


def test_logistic_stacking_of_separable_classes_stays_finite():
    labels = np.array([[1.0], [0.0], [1.0], [0.0]])
    logits = np.array([100, 50])[:, None, None] * (2 * labels - 1)
    result = fit_logistic(logits, labels, np.ones((4, 1), bool))
    assert np.isfinite(result.coefficients).all()
    assert ((result.combine(logits) > 0) == (labels > 0)).all()


def test_stack_is_the_mean_of_probabilities():
    logits, _, _ = simulated(noise=3)
    weights = softmax(np.random.default_rng(3).normal(size=(4, 3)), axis=1)
    mean = (weights.T[:, None, :] * expit(logits)).sum(0)
    np.testing.assert_allclose(stack(logits, weights), logit(mean), atol=1e-12)
    np.testing.assert_allclose(vote(logits), logit(expit(logits).mean(0)), atol=1e-12)


def test_stack_of_confident_models():
    extreme = np.array([[[100.0]], [[100.0]], [[-800.0]]])
    np.testing.assert_allclose(stack(extreme[:2], uniform(1, 2)), [[100.0]])
    np.testing.assert_allclose(stack(-extreme[:2], uniform(1, 2)), [[-100.0]])
    np.testing.assert_allclose(stack(extreme[[0, 2]], uniform(1, 2)), [[0.0]], atol=1e-12)
    np.testing.assert_allclose(stack(extreme[[0, 2]], np.array([[0.0, 1.0]])), [[-800.0]])  # a weight of none
    assert np.isfinite(stack(np.full((2, 1, 1), -1e300), uniform(1, 2))).all()


def tables():
    logits, labels, label_mask = simulated(images=40)
    names = np.array([f"i{i:02}" for i in range(40)])
    first = Predictions(names, np.repeat(names[::2], 2), tuple("ABCD"), logits[0], labels, label_mask)
    other = np.random.default_rng(0).permutation(40)
    columns = [2, 0, 3, 1]
    second = Predictions(
        names[other], first.patient[other], ("C", "A", "D", "B"), logits[1][other][:, columns],
        labels[other][:, columns], label_mask[other][:, columns],
    )  # fmt: skip
    return first, second, logits


def test_align_and_combine():
    first, second, logits = tables()
    aligned = align([first, second])
    np.testing.assert_array_equal(aligned[1].logit, logits[1])
    np.testing.assert_array_equal(aligned[1].id, first.id)
    assert aligned[1].findings == first.findings
    np.testing.assert_array_equal(combine([first, second]).logit, vote(logits[:2]))
    weights = np.array([[1.0, 0.0]] * 4)
    np.testing.assert_allclose(combine([first, second], weights).logit, logits[0], atol=1e-12)
    learnt = fit_logistic(logits[:2], first.label, first.label_mask)
    np.testing.assert_allclose(combine([first, second], learnt).logit, learnt.combine(logits[:2]), atol=1e-12)
    assert score(combine([first, second]), resamples=0).mean.findings == 4


def test_align_refuses_different_tables():
    first, second, _ = tables()
    with pytest.raises(CxrError, match=r"table 2 .* findings: D"):
        align([first, second.select(["A", "B", "C"])])
    with pytest.raises(CxrError, match=r"table 2 .* 2 images \(i\d\d, x\)"):
        align([first, replace(second, id=np.array(["x", *second.id[1:]]))])
    with pytest.raises(CxrError, match=r"the label of i\d\d, [A-D]; predict"):
        align([first, replace(second, label=1 - second.label)])
    with pytest.raises(CxrError, match="no predictions"):
        align([])


def test_bad_input_is_refused():
    logits, labels, label_mask = simulated()
    with pytest.raises(CxrError, match="do not fit"):
        fit_weights(logits[:, 1:], labels, label_mask)
    with pytest.raises(CxrError, match="no label is known"):
        fit_weights(logits, labels, np.zeros_like(label_mask))
    with pytest.raises(CxrError, match="scale 2 is not finite"):
        fit_weights(np.where(np.arange(3)[:, None, None] == 1, np.nan, logits), labels, label_mask)
    with pytest.raises(CxrError, match="out of range"):
        fit_weights(logits, labels, label_mask, decay=1.5)
    with pytest.raises(CxrError, match=r"inverse_regularization=0"):
        fit_logistic(logits, labels, label_mask, inverse_regularization=0)
    with pytest.raises(CxrError, match="no label is known"):
        fit_logistic(logits, labels, np.zeros_like(label_mask))
    with pytest.raises(CxrError, match="findings x scales"):
        stack(logits, uniform(3, 4))
    with pytest.raises(CxrError, match="sum to 1"):
        stack(logits, np.full((4, 3), 0.5))
