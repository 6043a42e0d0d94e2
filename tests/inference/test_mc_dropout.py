"""Monte Carlo dropout against NumPy with the same masks, and against its moments in closed form."""

import jax
import numpy as np
import pytest

from cxrjax.distributed.mesh import make_mesh
from cxrjax.errors import CxrError
from cxrjax.explain.inputs import check_images
from cxrjax.inference.mc_dropout import has_dropout, make_pooled_step, stochastic_logits
from cxrjax.models import create
from cxrjax.models.input_spec import prepare
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment, predict_logits

RATE, PASSES = 0.4, 6


@pytest.fixture(scope="module")
def examples(phantom_data):
    from cxrjax import config as configs

    config = configs.load_config("demo:32", [f"data.data_dir={phantom_data}", "data.stored_size=32"])
    experiment = Experiment.open(config)
    return experiment.examples_of_rows(np.arange(7))


def network(hidden, dropout=RATE):
    options = {"growth_rate": 4, "block_config": (1,), "stem_channels": 4, "hidden": hidden, "dropout": dropout}
    return Network.from_model(create("densenet_small", classes=3, **options))


def run(net, examples, passes=PASSES, devices=1, **options):
    options = {"size": 32, "batch": 4, "threads": 1, "seed": 3} | options
    return stochastic_logits(net, examples, make_mesh(devices, 1), passes=passes, **options)


def maps_of(net, examples):
    images = check_images(np.stack([examples.records.image(int(row)) for row in examples.row])[..., None])
    model = net.model()
    return np.asarray(jax.jit(lambda x: model.features(prepare(x, net.input_spec, net.dtype))["final"])(images))


def masks(key, layer, count):
    return np.asarray(jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - RATE, (1, count)))[0]


def test_passes_match_numpy(examples):
    net = network(hidden=5)
    maps = maps_of(net, examples).astype(np.float64)
    vectors = np.concatenate([maps.mean((1, 2)), maps.max((1, 2))], axis=1)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), net.params["classifier"])
    expected = np.zeros((PASSES, len(vectors), 3))
    for n, vector in enumerate(vectors):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(3), n), PASSES)
        for t in range(PASSES):
            kept = vector * masks(keys[t], 0, len(vector)) / (1 - RATE)
            units = np.maximum(kept @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
            units = units * masks(keys[t], 1, len(units)) / (1 - RATE)
            expected[t, n] = units @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(run(net, examples), expected, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 0


def test_passes_depend_on_the_seed_only(examples):
    net = network(hidden=0)
    one = run(net, examples)
    np.testing.assert_allclose(run(net, examples, batch=7), one, atol=1e-6)
    np.testing.assert_allclose(run(net, examples, devices=2), one, atol=1e-6)
    np.testing.assert_array_equal(run(net, examples), one)
    assert not np.allclose(run(net, examples, seed=4), one)


def test_moments_of_a_linear_head_match_closed_forms(examples):
    net = network(hidden=0)
    passes = run(net, examples, passes=4000).astype(np.float64)
    maps = maps_of(net, examples).astype(np.float64)
    vectors = np.concatenate([maps.mean((1, 2)), maps.max((1, 2))], axis=1)
    kernel, bias = (np.asarray(net.params["classifier"]["output"][name], np.float64) for name in ("kernel", "bias"))
    mean = vectors @ kernel + bias
    variance = RATE / (1 - RATE) * (vectors**2 @ kernel**2)
    error = np.sqrt(variance / len(passes))
    assert (np.abs(passes.mean(0) - mean) < 5 * error).all()
    np.testing.assert_allclose(passes.var(0), variance, rtol=0.15)


def test_a_head_without_dropout_is_an_error(examples):
    with pytest.raises(CxrError, match="no dropout"):
        run(network(hidden=0, dropout=0.0), examples)
    with pytest.raises(CxrError, match="2 or more, not 1"):
        run(network(hidden=0), examples, passes=1)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("densenet_small", {"dropout": 0.1}, True),
        ("densenet_small", {"dropout": 0.0, "hidden": 4}, False),
        ("efficientnet_small", {"stochastic_depth": 0.5}, False),  # which is of the features, and not drawn in passes
        ("sequential_cnn", {"image_size": 64}, True),
        ("sequential_cnn_v1", {"image_size": 64}, False),
        ("fhrnet_small", {"stage": "global"}, False),
        ("fhrnet_small", {"stage": "joint"}, True),
        ("fhrnet_small", {"stage": "joint", "prediction": "geometric-mean"}, False),
    ],
)
def test_has_dropout(name, options, expected):
    assert has_dropout(Network.from_model(create(name, classes=2, **options)), (64, 64)) == expected


def test_pooled_features_are_the_mean_of_the_last_maps(examples):
    net = network(hidden=0)
    mesh = make_mesh(1, 1)
    pooled = predict_logits(net, examples, make_pooled_step(mesh), mesh, size=32, batch=4, threads=1)
    np.testing.assert_allclose(pooled, maps_of(net, examples).mean((1, 2)), atol=1e-6)
