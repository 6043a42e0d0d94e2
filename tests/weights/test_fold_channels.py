"""Folding three channels to one: exact where it claims to be, and its error measured where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from load_published import load_published
from parity import relative_error
from published_files import FORMATS, SMALL, state_dict

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import IMAGENET, INPUT_SPECS, UNIT, InputSpec, one_channel, prepare
from cxrjax.models.network import Network
from cxrjax.weights import convert, load_converted
from cxrjax.weights.convert import fold_channels

CONV = "features.conv0.weight"


def images(side: int = 48) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (2, side, side, 1), np.uint8)


def stem_maps(network: Network) -> np.ndarray:
    """The first maps, after norm, ReLU and pooling."""
    model = network.model()
    return np.asarray(model.features(prepare(jnp.asarray(images()), network.input_spec, jnp.float32))["stem"])


def load_both(tmp_path, weights, input_spec: str) -> tuple[Network, Network, list[str]]:
    """The network with three channels as published, the folded one, and the conversion's notes."""
    original = create("densenet_small", classes=5, input_spec=INPUT_SPECS[input_spec], **SMALL)
    load_published(original, weights)
    file = FORMATS["safetensors"](tmp_path, weights)
    report = convert(file, "densenet_small", tmp_path / "out", input_spec=input_spec, channels=1, options=SMALL)
    return Network.from_model(original), load_converted(tmp_path / "out"), list(report.notes)


@jax.jit
def logits(network: Network) -> jax.Array:
    return network.apply(images())[0]


def test_equal_normalisation_folds_exactly(tmp_path, small_weights):
    three, one, notes = load_both(tmp_path, small_weights, "unit")
    assert one.input_spec == INPUT_SPECS["unit-grey"]
    assert relative_error(logits(one), logits(three)) < 1e-5
    assert any("folded to 1, exact;" in note for note in notes)


def test_imagenet_normalisation_folds_exactly_but_at_the_edge(tmp_path, small_weights):
    three, one, notes = load_both(tmp_path, small_weights, "imagenet")
    assert one.input_spec == INPUT_SPECS["imagenet-grey"]
    ours, theirs = stem_maps(one), stem_maps(three)
    inner = np.s_[:, 1:-1, 1:-1]  # 5 x 5 / 2 with padding 2, then 2 x 2 / 2: only the outermost positions see padding
    assert relative_error(ours[inner], theirs[inner]) < 1e-5
    assert relative_error(ours, theirs) > 1e-3
    assert any("exact but at the edge" in note for note in notes)
    assert relative_error(logits(one), logits(three)) < 0.2  # the cost of the edge at 48 px


def test_filters_equal_in_all_channels_fold_exactly_with_imagenet(tmp_path, small_weights):
    alike = np.repeat(small_weights[CONV][:, :1], 3, axis=1)
    three, one, _ = load_both(tmp_path, small_weights | {CONV: alike}, "imagenet")
    assert relative_error(stem_maps(one), stem_maps(three)) < 1e-5


def test_the_measured_errors_are_right(small_weights):
    model = create("densenet_small", classes=5, input_spec=IMAGENET, **SMALL)
    load_published(model, small_weights)
    network = Network.from_model(model)
    arrays = {("conv0", "kernel"): np.asarray(network.params["conv0"]["kernel"]),
              ("norm0", "mean"): np.asarray(network.stats["norm0"]["mean"])}  # fmt: skip
    folded = fold_channels(model, arrays)
    assert not folded.exact
    assert folded.inner_error < 1e-6
    assert 1e-3 < folded.edge_error < 1
    wrong = dict(folded.arrays)
    wrong["norm0", "mean"] = arrays["norm0", "mean"]  # without the constant the interior differs too
    np.testing.assert_array_less(1e-3, np.abs(wrong["norm0", "mean"] - folded.arrays["norm0", "mean"]).max())


def test_a_convolution_without_padding_folds_exactly_into_its_bias(tmp_path):
    weights = state_dict("simple_cnn", classes=2, input_spec=IMAGENET)
    original = create("simple_cnn", classes=2, input_spec=IMAGENET)
    load_published(original, weights)
    file = FORMATS["zip"](tmp_path, weights)
    report = convert(file, "simple_cnn", tmp_path / "out", input_spec="imagenet", channels=1)
    assert relative_error(logits(load_converted(tmp_path / "out")), logits(Network.from_model(original))) < 1e-5
    assert any("folded to 1, exact;" in note for note in report.notes)


def test_folding_one_channel_is_refused(tmp_path, grey_weights):
    file = FORMATS["zip"](tmp_path, grey_weights)
    with pytest.raises(CxrError, match=r"w.pth: these weights take one channel already"):
        convert(file, "densenet_small", tmp_path / "out", channels=1, options=SMALL)
    assert not (tmp_path / "out").exists()


def test_one_channel_has_the_sum_of_three():
    assert one_channel(UNIT) == InputSpec(1, (0.0,), (1.0,))
    spec = one_channel(IMAGENET)
    for grey in (0.0, 0.3, 1.0):
        three = sum((grey - mean) / std for mean, std in zip(IMAGENET.mean, IMAGENET.std, strict=True))
        assert 3 * (grey - spec.mean[0]) / spec.std[0] == pytest.approx(three, abs=1e-12)
