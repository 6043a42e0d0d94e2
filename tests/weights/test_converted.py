"""Converted weights, put into networks: whole, or as the start of a training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_files import FORMATS, SMALL, state_dict
from safetensors.numpy import load_file, save_file

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import IMAGENET, XRV, InputSpec
from cxrjax.models.network import Network
from cxrjax.weights import convert, load_converted, start_from

LABELS = ("Atelectasis", "Mass", "Pleural_Thickening", "", "Edema")


def network(classes: int = 2, **how) -> Network:
    return Network.from_model(create("densenet_small", classes=classes, **{"inputs": XRV, "seed": 3} | SMALL | how))


@pytest.fixture(scope="module")
def converted(tmp_path_factory, grey_weights):
    """Weights with named outputs for torchxrayvision's inputs."""
    folder = tmp_path_factory.mktemp("converted")
    file = FORMATS["zip"](folder, grey_weights)
    convert(file, "densenet_small", folder / "out", inputs="xrv", labels=LABELS, options=SMALL)
    return folder / "out"


def equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def body(of: Network) -> tuple:
    return {name: module for name, module in of.params.items() if name != "classifier"}, of.stats


def test_outputs_are_taken_by_name_and_in_order(converted):
    before, whole = network(), load_converted(converted)
    after, notes = start_from(before, "densenet_small", converted, ["Edema", "Pleural_Thickening"])
    assert equal(body(after), body(whole))
    for part in ("kernel", "bias"):
        taken, given = (of.params["classifier"]["output"][part] for of in (after, whole))
        np.testing.assert_array_equal(taken, given[..., np.array([4, 2])])
    assert notes == ("the outputs for Edema, Pleural_Thickening are those of the weights",)
    assert after.definition is before.definition


def test_a_finding_without_an_output_gets_a_fresh_head(converted):
    before = network()
    after, notes = start_from(before, "densenet_small", converted, ["Edema", "Fracture"])
    assert equal(body(after), body(load_converted(converted)))
    assert equal(after.params["classifier"], before.params["classifier"])
    assert notes == ("the weights have no output for Fracture", "classifier starts from initial values")


def test_another_head_is_fresh(converted):
    before = network(hidden=6)
    after, notes = start_from(before, "densenet_small", converted, ["Edema", "Mass"])
    assert equal(after.params["classifier"], before.params["classifier"])
    assert equal(body(after), body(load_converted(converted)))
    assert notes[-1] == "classifier starts from initial values"


@pytest.mark.parametrize(
    ("how", "note"),
    [({"head": "drop"}, "the weights have no head"), ({}, "the weights have no names for their 5 outputs")],
)
def test_weights_that_name_no_outputs_give_the_rest(tmp_path, grey_weights, how, note):
    file = FORMATS["safetensors"](tmp_path, grey_weights)
    convert(file, "densenet_small", tmp_path / "out", options=SMALL, **how)
    before = Network.from_model(create("densenet_small", classes=5, **SMALL))
    after, notes = start_from(before, "densenet_small", tmp_path / "out", ["A", "B", "C", "D", "E"])
    assert notes == (note, "classifier starts from initial values")
    assert equal(after.params["classifier"], before.params["classifier"])
    np.testing.assert_array_equal(after.stats["norm0"]["mean"], grey_weights["features.norm0.running_mean"])


def test_the_result_has_the_networks_types(converted):
    with jax.enable_x64(True):
        after, _ = start_from(network(dtype="float64"), "densenet_small", converted, ["Edema", "Mass"])
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(np.float64)}
        assert {leaf.dtype for leaf in jax.tree.leaves(load_converted(converted, dtype="float64"))} == {
            np.dtype(np.float64)
        }
    bf16, _ = start_from(network(dtype="bfloat16"), "densenet_small", converted, ["Edema", "Mass"])
    assert {leaf.dtype for leaf in jax.tree.leaves(bf16)} == {np.dtype(np.float32)}
    assert load_converted(converted, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("how", "name", "message"),
    [
        ({}, "densenet121", "weights of densenet_small, and the network is densenet121: .*model.name=densenet_small"),
        ({"inputs": None}, "densenet_small", "expect inputs xrv, and the network takes grey: .*model.inputs=xrv"),
        ({"inputs": IMAGENET}, "densenet_small", "takes imagenet: give --config.model.inputs=xrv"),
        (
            {"growth": 5},
            "densenet_small",
            r"has shape .* and the network's has .*are: growth=4, blocks=\(2, 1\)",
        ),
        ({"blocks": (2, 2)}, "densenet_small", "is missing and .* more; its options are"),
        ({"blocks": (1, 1)}, "densenet_small", "is not in the network|has shape"),
    ],
)
def test_what_does_not_fit_names_the_mend(converted, how, name, message):
    with pytest.raises(CxrError, match=message):
        start_from(network(**how), name, converted, ["Edema", "Mass"])


def test_a_replaceable_module_that_does_not_fit_is_dropped_and_said(tmp_path):
    """HRNet's neck belongs to its head: the public one does not fit the half one."""
    weights = state_dict("hrnet_small", classes=3, neck="half")
    file = FORMATS["zip"](tmp_path, weights)
    with pytest.raises(CxrError, match=r"missing|shape"):
        convert(file, "hrnet_small", tmp_path / "out", options={"neck": "eighth"})
    report = convert(file, "hrnet_small", tmp_path / "out", options={"neck": "eighth"}, head="drop")
    assert any("module incre_modules was dropped" in note for note in report.notes)
    assert {path.split(".")[0] for path in report.missing} >= {"classifier", "incre_modules"}
    assert len(report.used) + len(report.dropped) == len(weights)
    before = Network.from_model(create("hrnet_small", classes=2, neck="eighth", seed=5))
    after, notes = start_from(before, "hrnet_small", tmp_path / "out", ["Edema", "Mass"])
    assert "incre_modules starts from initial values" in notes
    assert equal(after.params["incre_modules"], before.params["incre_modules"])
    np.testing.assert_array_equal(after.stats["bn1"]["mean"], weights["bn1.running_mean"])
    assert load_converted(tmp_path / "out", classes=2).classes == 2


def test_a_head_of_another_size_is_not_built(converted):
    with pytest.raises(CxrError, match="5 outputs, not 7"):
        load_converted(converted, classes=7)
    assert load_converted(converted, classes=5, remat="layer").model().remat == "layer"


@pytest.fixture
def copy(converted, tmp_path):
    """A directory of converted weights to spoil."""
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_card(directory, **entries):
    card = json.loads((directory / "card.json").read_text())
    (directory / "card.json").write_text(json.dumps(card | entries))


def test_weights_that_the_card_does_not_describe_are_refused(copy):
    file = copy / "weights.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"norm0.mean": arrays["norm0.mean"] + 1}, file)
    with pytest.raises(CxrError, match=r"weights.safetensors is not the file that card.json describes"):
        load_converted(copy)
    file.unlink()
    with pytest.raises(CxrError, match=r"weights.safetensors cannot be read"):
        load_converted(copy)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "cxrjax weights 9"}, "its format is not"),
        ({"colour": "blue"}, "colour"),
        ({"inputs": {"channels": 2}}, "2 channels"),
        ({"options": SMALL | {"growth": 6}}, "does not fit densenet_small of this version"),
        ({"architecture": "densenet_tiny"}, "did you mean 'densenet_small'"),
    ],
)
def test_a_card_that_says_something_else_is_refused(copy, entries, message):
    change_card(copy, **entries)
    with pytest.raises(CxrError, match=message):
        load_converted(copy)


def test_a_directory_without_a_card_is_named(tmp_path):
    with pytest.raises(CxrError, match=r"card.json is missing: make it with cxrjax weights convert"):
        load_converted(tmp_path)
    (tmp_path / "card.json").write_text("hello")
    with pytest.raises(CxrError, match=r"card.json is not a card"):
        load_converted(tmp_path)


def test_the_card_keeps_any_inputs_exactly(tmp_path, small_weights):
    file = FORMATS["safetensors"](tmp_path, small_weights)
    convert(file, "densenet_small", tmp_path / "out", inputs="imagenet", channels=1, options=SMALL)
    inputs = load_converted(tmp_path / "out").inputs
    assert isinstance(inputs, InputSpec)
    before = Network.from_model(create("densenet_small", classes=2, inputs=inputs, **SMALL))
    start_from(before, "densenet_small", tmp_path / "out", ["A", "B"])
    with pytest.raises(CxrError, match=r"model\.inputs=imagenet-grey"):
        start_from(
            Network.from_model(create("densenet_small", classes=2, **SMALL)), "densenet_small", tmp_path / "out", "AB"
        )
