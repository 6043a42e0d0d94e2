"""Losses against PyTorch, SciPy and scikit-learn, also for extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.metrics import log_loss

from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import SOFTMAX_LOSSES, log_odds
from cxrjax.train.losses import LOSSES, label_prevalence, make_loss, masked_bce

PREVALENCE = np.array([0.1, 0.5, 0.25])

# Sums over the known labels and norms of their gradients that PyTorch 2.13 and torchvision 0.29.2 give in float64 for
# the examples below: binary_cross_entropy_with_logits with `weight`, and sigmoid_focal_loss.
PYTORCH = {
    "bce": ({}, 15.442099182641826, 1.8514136530061986),
    "weighted_bce": ({}, 10.733977072573587, 1.336857502037094),
    "weighted_bce literal": ({"weighting": "literal"}, 4.708122110068239, 0.820139981399278),
    "focal": ({}, 3.4361019112319817, 0.4832779518581631),
    "focal balanced": ({"weighting": "balanced"}, 6.090139388899926, 0.9708364990946615),
    "focal other": ({"weighting": "balanced", "alpha": 0.75, "gamma": 0.5}, 8.083939242993425, 1.1053624059203604),
}


def examples():
    """Logits -6 to 6 of four images and three findings, with a fifth of the labels unknown."""
    index = np.arange(12).reshape(4, 3)
    return np.linspace(-6, 6, 12).reshape(4, 3), np.isin(index % 4, (0, 3)).astype(np.float64), index % 5 != 4


def loss_named(name, **options):
    return make_loss(name, prevalence=PREVALENCE if name == "weighted_bce" else None, **options)


@pytest.mark.parametrize("case", PYTORCH)
def test_values_and_gradients_match_pytorch(case):
    options, value, norm = PYTORCH[case]
    loss = loss_named(case.split()[0], **options)
    logits, label, label_mask = examples()
    assert loss.mean(logits, label, label_mask) == pytest.approx(value / label_mask.sum(), rel=1e-12)  # float64

    single = [jnp.asarray(x, jnp.float32) for x in (logits, label)]
    total, gradient = jax.value_and_grad(lambda z: loss(z, single[1], jnp.asarray(label_mask), jnp.ones(4, bool))[0])(
        single[0]
    )
    assert float(total) == pytest.approx(value, rel=1e-6)
    assert float(jnp.linalg.norm(gradient)) == pytest.approx(norm, rel=1e-6)


def test_cross_entropy_matches_pytorch():
    logits, classes, label_mask = examples()[0] * [1, -0.5, 0.25], [2, 0, 1, 1], np.ones((4, 3), bool)
    label_mask[2, 1] = False  # the third image has no class
    loss = make_loss("cross_entropy")

    def total(z):
        return loss(z, jnp.eye(3)[jnp.asarray(classes)], jnp.asarray(label_mask), jnp.ones(4, bool))

    (value, count), back = jax.vjp(total, jnp.asarray(logits, jnp.float32))
    gradient = back((jnp.ones(()), jnp.zeros(())))[0] * jnp.asarray([1, -0.5, 0.25])[None]
    assert float(count) == 3
    assert float(value) == pytest.approx(13.701945001205015, rel=1e-6)
    assert float(jnp.linalg.norm(gradient)) == pytest.approx(1.567671654813804, rel=1e-6)
    one_hot = np.eye(3)[classes]
    expected = log_loss(one_hot[[0, 1, 3]], np.exp(log_softmax(logits, axis=1))[[0, 1, 3]])
    assert loss.mean(logits, one_hot, label_mask) == pytest.approx(expected, rel=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    logits=hnp.arrays(np.float32, (4, 3), elements=st.floats(-20, 20, width=32)),
    label=hnp.arrays(np.bool_, (4, 3)),
    label_mask=hnp.arrays(np.bool_, (4, 3)),
    example_mask=hnp.arrays(np.bool_, (4,)),
)
def test_mean_over_known_labels_matches_sklearn(logits, label, label_mask, example_mask):
    total, count = masked_bce(
        jnp.array(logits), jnp.array(label, jnp.float32), jnp.array(label_mask), jnp.array(example_mask)
    )
    mask = label_mask & example_mask[:, None]
    assert float(count) == mask.sum()
    if mask.any():
        probability = 1 / (1 + np.exp(-logits[mask].astype(np.float64)))
        expected = log_loss(label[mask], probability, labels=[False, True])
        np.testing.assert_allclose(float(total / count), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(masked_bce.mean(logits, label, mask), expected, rtol=1e-7, atol=1e-12)
    else:
        assert float(total) == 0
        assert np.isnan(masked_bce.mean(logits, label, mask))


def closed_form(name, logit, y, k=0):
    """Return the loss and its derivative in float64, as written in the papers."""
    right = logit if y else -logit  # the logit of the true answer
    weight = {"bce": 1, "focal": 0.25, "weighted_bce": 1 - PREVALENCE[k] if y else PREVALENCE[k]}[name]
    miss, log_p = expit(-right), log_expit(right)
    if name == "focal":
        slope = -(miss**2) * (miss - 2 * expit(right) * log_p)
        return -weight * miss**2 * log_p, weight * slope * (1 if y else -1)
    return -weight * log_p, -weight * miss * (1 if y else -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["bce", "weighted_bce", "focal"])
def test_extreme_logits_keep_their_value_and_gradient(name, dtype):
    loss, ones = loss_named(name), jnp.ones((7, 3), bool)
    logits = jnp.tile(jnp.array([[-100.0], [-30.0], [-2.0], [0.0], [2.0], [30.0], [100.0]], dtype), (1, 3))
    for y in (0.0, 1.0):
        total, gradient = jax.value_and_grad(lambda z, y=y: loss(z, jnp.full((7, 3), y), ones, ones[:, 0])[0])(logits)
        cells = [[closed_form(name, z, y, k) for k in range(3)] for z in np.asarray(logits[:, 0], np.float64)]
        value, slope = np.moveaxis(np.array(cells), -1, 0)
        assert gradient.dtype == dtype
        np.testing.assert_allclose(float(total), value.sum(), rtol=1e-5)
        tolerance = 1e-5 if dtype == jnp.float32 else 4e-3
        np.testing.assert_allclose(np.asarray(gradient, np.float64), slope, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_of_exclusive_classes(dtype):
    loss, logits = make_loss("cross_entropy"), jnp.array([[100.0, -100.0], [100.0, -100.0]], dtype)

    def total(z):
        return loss(z, jnp.eye(2), jnp.ones((2, 2), bool), jnp.ones(2, bool))[0]

    value, gradient = jax.value_and_grad(total)(logits)
    assert float(value) == 200
    np.testing.assert_allclose(np.asarray(gradient, np.float64), [[0, 0], [1, -1]], atol=1e-30)


def test_many_images_are_counted_exactly_in_bfloat16():
    logits, label_mask = jnp.zeros((1000, 3), jnp.bfloat16), jnp.ones((1000, 3), bool)
    assert float(masked_bce(logits, jnp.ones((1000, 3)), label_mask, label_mask[:, 0])[1]) == 3000


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_labels_and_padding_have_no_gradient(name):
    loss, label_mask, example_mask = (
        loss_named(name),
        jnp.ones((3, 3), bool).at[0, 1].set(False),
        jnp.array([True, False, True]),
    )

    def total(z):
        return loss(z, jnp.eye(3), label_mask, example_mask)[0]

    gradient = np.asarray(jax.grad(total)(jnp.ones((3, 3))))
    counts = np.broadcast_to(loss.counts(label_mask, example_mask), (3, 3))
    np.testing.assert_array_equal(gradient != 0, counts)
    assert counts.sum() == (3 if name in SOFTMAX_LOSSES else 5)


def test_microbatches_add_up():
    logits, label, label_mask = (
        jnp.asarray(x, t) for x, t in zip(examples(), (jnp.float32, jnp.float32, bool), strict=True)
    )
    for name in LOSSES:
        loss = loss_named(name)
        parts = [loss(*(x[i : i + 2] for x in (logits, label, label_mask)), jnp.ones(2, bool)) for i in (0, 2)]
        whole = loss(logits, label, label_mask, jnp.ones(4, bool))
        np.testing.assert_allclose(np.sum(parts, axis=0), np.array(whole), rtol=1e-6)
        assert int(whole[1]) == np.asarray(loss.counts(label_mask, jnp.ones(4, bool))).sum()


def test_soft_labels_are_expectations_of_hard_ones():
    label_mask = np.ones((1, 3), bool)
    for name in ("bce", "weighted_bce"):
        loss, logits = loss_named(name), np.array([[1.0, -2.0, 0.5]])
        hard = [loss.mean(logits, np.full((1, 3), y), label_mask) for y in (0, 1)]
        assert loss.mean(logits, np.full((1, 3), 0.3), label_mask) == pytest.approx(0.7 * hard[0] + 0.3 * hard[1])


def test_counter_weights_balance_both_classes():
    rng = np.random.default_rng(0)
    label, label_mask = (rng.random((500, 3)) < [0.05, 0.5, 0.3]) * 1.0, rng.random((500, 3)) < 0.8
    prevalence = label_prevalence(label, label_mask)
    np.testing.assert_allclose(prevalence, [label[label_mask[:, k], k].mean() for k in range(3)])
    zero = np.zeros((500, 3))  # every label costs log 2 times its weight
    for k in range(3):
        sums = [
            make_loss("weighted_bce", prevalence=prevalence).mean(zero, label, mask) * mask.sum()
            for mask in (label_mask & (label == y) & (np.arange(3) == k) for y in (0, 1))
        ]
        assert sums[0] == pytest.approx(sums[1])


def test_prevalence_without_labels_is_one_half():
    label_mask = np.array([[True, False, True], [True, False, True]])
    np.testing.assert_array_equal(label_prevalence(np.array([[1, 1, 0], [0, 1, 0]]), label_mask), [0.5, 0.5, 0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fokal", {}, "did you mean 'focal'"),
        ("bce", {"alpha": 0.5}, "unknown option of the loss bce 'alpha'"),
        ("focal", {"gama": 2}, "did you mean 'gamma'"),
        ("focal", {"alpha": 0}, "alpha in"),
        ("focal", {"gamma": -1}, "gamma of at least 0"),
        ("focal", {"gamma": "two"}, "gamma=two"),
        ("focal", {"weighting": "uniforn"}, "did you mean 'uniform'"),
        ("weighted_bce", {}, "needs the prevalence"),
        ("weighted_bce", {"prevalence": [0.5, 1.5]}, "one fraction from 0 to 1 per finding"),
        ("weighted_bce", {"prevalence": [float("nan")]}, "one fraction from 0 to 1 per finding"),
        ("weighted_bce", {"prevalence": [0.5], "weighting": "x"}, "choose from counter, literal"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(CxrError, match=message):
        make_loss(name, **options)


def test_softmax_of_findings_that_are_not_exclusive():
    logits, label = np.random.default_rng(0).normal(0, 3, (20, 4)), np.eye(4)[np.arange(20) % 4]
    loss, label_mask = make_loss("softmax"), np.ones((20, 4), bool)
    assert loss.mean(logits, label, label_mask) == pytest.approx(log_loss(label, softmax(logits, axis=1)))
    label[:10, 0], label[15:] = 1, 0  # two findings, and none
    expected = -(label * log_softmax(logits, axis=1)).sum(1)
    assert loss.mean(logits, label, label_mask) == pytest.approx(expected.mean())
    label_mask[3, 1] = False
    assert loss.mean(logits, label, label_mask) == pytest.approx(np.delete(expected, 3).mean())
    assert loss.accuracy(logits, label, label_mask) == ((softmax(logits, axis=1) > 0.5) == label)[label_mask].mean()
    np.testing.assert_allclose(expit(log_odds(logits, "softmax")), softmax(logits, axis=1), rtol=1e-12)


def test_log_odds_of_exclusive_classes_give_their_softmax():
    logits = np.random.default_rng(0).normal(0, 3, (20, 6))
    np.testing.assert_allclose(expit(log_odds(logits, "cross_entropy")), softmax(logits, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(log_odds(logits, "focal"), logits)


def test_accuracy_of_findings_and_of_classes():
    logits = np.array([[1.0, -1.0, 2.0], [-1.0, -2.0, -3.0], [0.5, 3.0, 1.0]])
    label = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]], float)
    label_mask = np.ones((3, 3), bool)
    label_mask[0, 2] = False
    assert make_loss("bce").accuracy(logits, label, label_mask) == 5 / 8  # wrong are [0, 1], [2, 0] and [2, 2]
    classes = np.eye(3)[[2, 1, 1]]
    label_mask[0, 2] = True
    assert make_loss("cross_entropy").accuracy(logits, classes, label_mask) == 2 / 3
    label_mask[2, 0] = False
    assert make_loss("cross_entropy").accuracy(logits, classes, label_mask) == 1 / 2
    assert np.isnan(make_loss("bce").accuracy(logits, label, np.zeros((3, 3), bool)))
