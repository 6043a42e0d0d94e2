import jax
import numpy as np
import pytest
from load_published import load_published
from parity import Parity

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network

CONV = "features.denseblock1.denselayer1.conv2.weight"
RUNNING = "features.denseblock1.denselayer1.norm1.running_var"


def small():
    return create("densenet_small", classes=3, growth_rate=4, block_config=(1, 1), stem_channels=4)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """A state dict for `small`, with names and layout of PyTorch written by hand."""
    shapes = {"features.conv0.weight": (4, 1, 5, 5)}
    norms = {"norm0": 4, "denseblock1.denselayer1.norm1": 4, "denseblock1.denselayer1.norm2": 8, "transition1.norm": 8,
             "denseblock2.denselayer1.norm1": 4, "denseblock2.denselayer1.norm2": 8, "norm5": 8}  # fmt: skip
    for name, channels in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"features.{name}.{part}"] = (channels,)
        shapes[f"features.{name}.num_batches_tracked"] = ()
    for block in (1, 2):
        shapes[f"features.denseblock{block}.denselayer1.conv1.weight"] = (8, 4, 1, 1)
        shapes[f"features.denseblock{block}.denselayer1.conv2.weight"] = (4, 8, 3, 3)
    shapes |= {"features.transition1.conv.weight": (4, 8, 1, 1), "classifier.weight": (3, 16), "classifier.bias": (3,)}
    rng = np.random.default_rng(0)
    return {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_array_is_filled_in_our_layout(weights):
    model = small()
    fitted = load_published(model, weights)
    network = Network.from_model(model)
    layer = network.params["denseblock1"]["denselayer1"]
    np.testing.assert_array_equal(layer["conv2"]["kernel"][1, 2, 5, 3], weights[CONV][3, 5, 1, 2])
    np.testing.assert_array_equal(
        network.params["classifier"]["output"]["kernel"][7, 2], weights["classifier.weight"][2, 7]
    )
    np.testing.assert_array_equal(network.stats["denseblock1"]["denselayer1"]["norm1"]["var"], weights[RUNNING])
    np.testing.assert_array_equal(layer["norm1"]["scale"], weights[RUNNING.replace("running_var", "weight")])
    assert len(fitted.arrays) == len(jax.tree.leaves((network.params, network.stats))) == len(weights) - 7
    assert sum(array.size for array in fitted.arrays.values()) == sum(
        a.size for n, a in weights.items() if not n.endswith("tracked")
    )
    assert len(fitted.dropped) == 7
    assert "features.norm0.num_batches_tracked" in fitted.dropped


def test_densenet121_uses_every_published_key(shared):
    parity = Parity(shared / "parity", "tv-densenet121")
    fitted = load_published(create("densenet121", classes=1000), parity.state_dict())
    assert len(fitted.arrays) + len(fitted.dropped) == len(parity.about["state"])
    assert sum(array.size for array in fitted.arrays.values()) == parity.about["parameters"] + sum(
        array.size for name, array in parity.results.items() if name.startswith("running/")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(CONV), f"1 faults\\): missing {CONV}$"),
        (lambda w: w.pop(RUNNING), f"missing {RUNNING}$"),
        (lambda w: w.update({"fc.weight": w["classifier.weight"]}), "unexpected fc.weight$"),
        (lambda w: w.update({"fc.num_batches_tracked": np.zeros(())}), "unexpected fc.num_batches_tracked$"),
        (
            lambda w: w.update({CONV: w[CONV][:, :5]}),
            r"conv2.weight has shape \(4, 5, 3, 3\), needed is \(4, 8, 3, 3\)$",
        ),
        (lambda w: w.update({CONV: w[CONV].transpose(2, 3, 1, 0)}), r"has shape \(3, 3, 8, 4\)"),
        (lambda w: w.update({CONV: w[CONV].astype(np.int64)}), "is int64, needed is a floating-point type"),
        (lambda w: w.update({CONV: w[CONV] * np.float32(np.nan)}), "not finite"),
        (lambda w: w.update({RUNNING: -w[RUNNING]}), f"{RUNNING} holds negative variances$"),
    ],
)
def test_faults_are_named_and_nothing_changes(weights, change, message):
    change(weights)
    model = small()
    before = Network.from_model(model)
    with pytest.raises(CxrError, match=message):
        load_published(model, weights)
    jax.tree.map(np.testing.assert_array_equal, before, Network.from_model(model))


def test_all_faults_are_listed_at_once(weights):
    del weights[CONV], weights[RUNNING]
    weights["classifier.bias"] = np.zeros(5, np.float32)
    with pytest.raises(CxrError, match="3 faults") as caught:
        load_published(small(), weights)
    assert all(name in str(caught.value) for name in (CONV, RUNNING, "classifier.bias"))


def test_batch_counters_are_optional(weights):
    without_counters = {name: array for name, array in weights.items() if not name.endswith("tracked")}
    assert load_published(small(), without_counters).dropped == {}
