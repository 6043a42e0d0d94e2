"""Loading converted weights, whole or as initial values for training."""

import json

import jax
import numpy as np
import pytest
from published_files import FORMATS, SMALL, state_dict
from safetensors.numpy import load_file, save_file

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import IMAGENET, XRV, InputSpec
from cxrjax.models.network import Network
from cxrjax.weights import convert, init_from_converted, load_converted

LABELS = ("Atelectasis", "Mass", "Pleural_Thickening", "", "Edema")


def network(classes: int = 2, **options) -> Network:
    return Network.from_model(
        create("densenet_small", classes=classes, **{"input_spec": XRV, "seed": 3} | SMALL | options)
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory, grey_weights):
    """Weights with named outputs for torchxrayvision's inputs."""
    folder = tmp_path_factory.mktemp("converted")
    file = FORMATS["zip"](folder, grey_weights)
    convert(file, "densenet_small", folder / "out", input_spec="xrv", labels=LABELS, options=SMALL)
    return folder / "out"


def equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def body(network: Network) -> tuple:
    return {name: module for name, module in network.params.items() if name != "classifier"}, network.stats


def test_outputs_are_taken_by_name_and_in_order(converted):
    before, whole = network(), load_converted(converted)
    after, notes = init_from_converted(before, "densenet_small", converted, ["Edema", "Pleural_Thickening"])
    assert equal(body(after), body(whole))
    for leaf in ("kernel", "bias"):
        taken, source = (network.params["classifier"]["output"][leaf] for network in (after, whole))
        np.testing.assert_array_equal(taken, source[..., np.array([4, 2])])
    assert notes == ("the outputs for Edema, Pleural_Thickening are those of the weights",)
    assert after.definition is before.definition


def test_a_finding_without_an_output_leaves_the_head_initial(converted):
    before = network()
    after, notes = init_from_converted(before, "densenet_small", converted, ["Edema", "Fracture"])
    assert equal(body(after), body(load_converted(converted)))
    assert equal(after.params["classifier"], before.params["classifier"])
    assert notes == ("the weights have no output for Fracture", "classifier starts from initial values")


def test_a_head_of_another_kind_stays_initial(converted):
    before = network(hidden=6)
    after, notes = init_from_converted(before, "densenet_small", converted, ["Edema", "Mass"])
    assert equal(after.params["classifier"], before.params["classifier"])
    assert equal(body(after), body(load_converted(converted)))
    assert notes[-1] == "classifier starts from initial values"


@pytest.mark.parametrize(
    ("options", "note"),
    [({"head": "drop"}, "the weights have no head"), ({}, "the weights have no names for their 5 outputs")],
)
def test_weights_without_named_outputs_fill_the_rest(tmp_path, grey_weights, options, note):
    file = FORMATS["safetensors"](tmp_path, grey_weights)
    convert(file, "densenet_small", tmp_path / "out", options=SMALL, **options)
    before = Network.from_model(create("densenet_small", classes=5, **SMALL))
    after, notes = init_from_converted(before, "densenet_small", tmp_path / "out", ["A", "B", "C", "D", "E"])
    assert notes == (note, "classifier starts from initial values")
    assert equal(after.params["classifier"], before.params["classifier"])
    np.testing.assert_array_equal(after.stats["norm0"]["mean"], grey_weights["features.norm0.running_mean"])


def test_the_result_has_the_networks_types(converted):
    with jax.enable_x64(True):
        after, _ = init_from_converted(network(dtype="float64"), "densenet_small", converted, ["Edema", "Mass"])
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(np.float64)}
    bf16, _ = init_from_converted(network(dtype="bfloat16"), "densenet_small", converted, ["Edema", "Mass"])
    assert {leaf.dtype for leaf in jax.tree.leaves(bf16)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "densenet121", "weights of densenet_small, and the network is densenet121: .*model.name=densenet_small"),
        (
            {"input_spec": None},
            "densenet_small",
            "expect inputs xrv, and the network takes grey: .*model.input_spec=xrv",
        ),
        ({"input_spec": IMAGENET}, "densenet_small", "takes imagenet: set --config.model.input_spec=xrv"),
        (
            {"growth_rate": 5},
            "densenet_small",
            r"has shape .* and the network's has .*are: growth_rate=4, block_config=\(2, 1\)",
        ),
        ({"block_config": (2, 2)}, "densenet_small", "is missing and .* more; its options are"),
        ({"block_config": (1, 1)}, "densenet_small", "is not in the network|has shape"),
    ],
)
def test_errors_say_what_to_set(converted, options, name, message):
    with pytest.raises(CxrError, match=message):
        init_from_converted(network(**options), name, converted, ["Edema", "Mass"])


def test_a_replaceable_module_that_does_not_fit_is_dropped_with_a_note(tmp_path):
    """HRNet's neck belongs to its head: weights of one neck do not fit another."""
    weights = state_dict("hrnet_small", classes=3, neck="half")
    file = FORMATS["zip"](tmp_path, weights)
    with pytest.raises(CxrError, match=r"missing|shape"):
        convert(file, "hrnet_small", tmp_path / "out", options={"neck": "eighth"})
    report = convert(file, "hrnet_small", tmp_path / "out", options={"neck": "eighth"}, head="drop")
    assert any("module incre_modules was dropped" in note for note in report.notes)
    assert {path.split(".")[0] for path in report.missing} >= {"classifier", "incre_modules"}
    assert len(report.used) + len(report.dropped) == len(weights)
    before = Network.from_model(create("hrnet_small", classes=2, neck="eighth", seed=5))
    after, notes = init_from_converted(before, "hrnet_small", tmp_path / "out", ["Edema", "Mass"])
    assert "incre_modules starts from initial values" in notes
    assert equal(after.params["incre_modules"], before.params["incre_modules"])
    np.testing.assert_array_equal(after.stats["bn1"]["mean"], weights["bn1.running_mean"])


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of the converted weights that a test may damage."""
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_card(directory, **entries):
    card = json.loads((directory / "card.json").read_text())
    (directory / "card.json").write_text(json.dumps(card | entries))


def test_weights_with_another_checksum_are_refused(copy):
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
        ({"input_spec": {"channels": 2}}, "2 channels"),
        ({"options": SMALL | {"growth_rate": 6}}, "does not fit densenet_small of this version"),
        ({"architecture": "densenet_tiny"}, "did you mean 'densenet_small'"),
    ],
)
def test_a_changed_card_is_refused(copy, entries, message):
    change_card(copy, **entries)
    with pytest.raises(CxrError, match=message):
        load_converted(copy)


def test_a_directory_without_a_card_is_named(tmp_path):
    with pytest.raises(CxrError, match=r"card.json is missing: make it with cxrjax weights convert"):
        load_converted(tmp_path)
    (tmp_path / "card.json").write_text("hello")
    with pytest.raises(CxrError, match=r"card.json is not a card"):
        load_converted(tmp_path)


def test_the_card_keeps_the_input_spec_exactly(tmp_path, small_weights):
    file = FORMATS["safetensors"](tmp_path, small_weights)
    convert(file, "densenet_small", tmp_path / "out", input_spec="imagenet", channels=1, options=SMALL)
    spec = load_converted(tmp_path / "out").input_spec
    assert isinstance(spec, InputSpec)
    before = Network.from_model(create("densenet_small", classes=2, input_spec=spec, **SMALL))
    init_from_converted(before, "densenet_small", tmp_path / "out", ["A", "B"])
    with pytest.raises(CxrError, match=r"model\.input_spec=imagenet-grey"):
        init_from_converted(
            Network.from_model(create("densenet_small", classes=2, **SMALL)), "densenet_small", tmp_path / "out", "AB"
        )
