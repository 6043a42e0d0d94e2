"""Three channels folded to one: exact where that is said, and measured where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error
from published_files import FORMATS, SMALL, state_dict

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import IMAGENET, NAMED, UNIT, InputSpec, one_channel, prepare
from cxrjax.models.network import Network
from cxrjax.weights import convert, load_converted
from cxrjax.weights.fold_channels import fold
from cxrjax.weights.published import load_published

CONV = "features.conv0.weight"


def images(side: int = 48) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (2, side, side, 1), np.uint8)


def stem(network: Network) -> np.ndarray:
    """The first maps, after their norm, ReLU and pooling."""
    model = network.model()
    return np.asarray(model.features(prepare(jnp.asarray(images()), network.inputs, jnp.float32))["stem"])


def both(tmp_path, weights, inputs: str) -> tuple[Network, Network, list[str]]:
    """Three channels as published, and one channel, from the file."""
    original = create("densenet_small", classes=5, inputs=NAMED[inputs], **SMALL)
    load_published(original, weights)
    file = FORMATS["safetensors"](tmp_path, weights)
    how = {"inputs": inputs, "channels": 1, "options": SMALL}
    report = convert(file, "densenet_small", tmp_path / "out", **how)
    return Network.from_model(original), load_converted(tmp_path / "out"), list(report.notes)


@jax.jit
def logits(network: Network) -> jax.Array:
    return network.apply(images())[0]


def test_equal_normalisation_folds_exactly(tmp_path, small_weights):
    three, one, notes = both(tmp_path, small_weights, "unit")
    assert one.inputs == NAMED["unit-grey"]
    assert relative_error(logits(one), logits(three)) < 1e-5
    assert any("folded to 1, exact;" in note for note in notes)


def test_imagenet_folds_exactly_but_at_the_edge(tmp_path, small_weights):
    three, one, notes = both(tmp_path, small_weights, "imagenet")
    assert one.inputs == NAMED["imagenet-grey"]
    ours, theirs = stem(one), stem(three)
    inner = np.s_[:, 1:-1, 1:-1]  # 5 x 5 / 2 with 2 zeros around, then 2 x 2 / 2: only the outermost maps see zeros
    assert relative_error(ours[inner], theirs[inner]) < 1e-5
    assert relative_error(ours, theirs) > 1e-3
    assert any("exact but at the edge" in note for note in notes)
    assert relative_error(logits(one), logits(three)) < 0.2  # the price of the edge at 48 px


def test_filters_alike_in_all_channels_fold_exactly_with_imagenet_too(tmp_path, small_weights):
    alike = np.repeat(small_weights[CONV][:, :1], 3, axis=1)
    three, one, _ = both(tmp_path, small_weights | {CONV: alike}, "imagenet")
    assert relative_error(stem(one), stem(three)) < 1e-5


def test_what_is_measured_is_right(small_weights):
    model = create("densenet_small", classes=5, inputs=IMAGENET, **SMALL)
    load_published(model, small_weights)
    network = Network.from_model(model)
    arrays = {("conv0", "kernel"): np.asarray(network.params["conv0"]["kernel"]),
              ("norm0", "mean"): np.asarray(network.stats["norm0"]["mean"])}  # fmt: skip
    folded = fold(model, arrays)
    assert not folded.exact
    assert folded.inside < 1e-6
    assert 1e-3 < folded.edge < 1
    wrong = dict(folded.arrays)
    wrong["norm0", "mean"] = arrays["norm0", "mean"]  # without the constant the interior differs too
    np.testing.assert_array_less(1e-3, np.abs(wrong["norm0", "mean"] - folded.arrays["norm0", "mean"]).max())


def test_a_convolution_without_padding_folds_exactly_into_its_bias(tmp_path):
    weights = state_dict("simple_cnn", classes=2, inputs=IMAGENET)
    original = create("simple_cnn", classes=2, inputs=IMAGENET)
    load_published(original, weights)
    file = FORMATS["zip"](tmp_path, weights)
    report = convert(file, "simple_cnn", tmp_path / "out", inputs="imagenet", channels=1)
    assert relative_error(logits(load_converted(tmp_path / "out")), logits(Network.from_model(original))) < 1e-5
    assert any("folded to 1, exact;" in note for note in report.notes)


def test_one_channel_is_not_folded(tmp_path, grey_weights):
    file = FORMATS["zip"](tmp_path, grey_weights)
    with pytest.raises(CxrError, match=r"w.pth: these weights take one channel already"):
        convert(file, "densenet_small", tmp_path / "out", channels=1, options=SMALL)
    assert not (tmp_path / "out").exists()


def test_one_channel_stands_for_three():
    assert one_channel(UNIT) == InputSpec(1, (0.0,), (1.0,))
    spec = one_channel(IMAGENET)
    for grey in (0.0, 0.3, 1.0):
        three = sum((grey - mean) / std for mean, std in zip(IMAGENET.mean, IMAGENET.std, strict=True))
        assert 3 * (grey - spec.mean[0]) / spec.std[0] == pytest.approx(three, abs=1e-12)
