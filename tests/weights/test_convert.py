"""Conversion: all formats and naming styles give the same weights; weights that do not fit give one line, no file."""

import json
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from load_published import load_published
from parity import Parity, relative_error
from published_files import FORMATS, SMALL, STYLES, renamed, state_dict
from safetensors.numpy import save_file
from torchformat import whole_module, write

from cxrjax.cli.arguments import read_names
from cxrjax.cli.main import main
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import IMAGENET, UNIT, XRV
from cxrjax.models.network import Network
from cxrjax.weights import convert, load_converted, read_converted
from cxrjax.weights.converted import sha256


def convert_small(file, out, **options):
    options = {"input_spec": "imagenet", "options": SMALL} | options
    return convert(file, "densenet_small", out, restricted=True, **options)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_key_style_gives_the_same_weights(tmp_path, small_weights, format, style):
    arrays = renamed(small_weights, style)
    report = convert_small(FORMATS[format](tmp_path, arrays), tmp_path / "out")
    model = create("densenet_small", classes=5, input_spec=IMAGENET, **SMALL)
    load_published(model, small_weights)
    jax.tree.map(np.testing.assert_array_equal, load_converted(tmp_path / "out"), Network.from_model(model))
    counters = {name for name in arrays if name.endswith("num_batches_tracked")}
    assert report.used.keys() == arrays.keys() - counters
    other_entries = {"epoch", "arch", "optimizer"} if format == "tar" else set()
    assert report.dropped.keys() == counters | other_entries
    assert report.missing == ()
    assert sum("all names began" in note for note in report.notes) == {"DataParallel": 1, "CheXNet": 2}.get(style, 0)
    assert any("norm.1" in note for note in report.notes) == (style in ("older", "CheXNet"))
    assert any("classifier.0" in note for note in report.notes) == (style == "CheXNet")


@pytest.mark.parametrize(("format", "style"), list(zip(FORMATS, STYLES, strict=True)))
def test_densenet121_gives_the_published_logits(tmp_path, shared, format, style):
    parity = Parity(shared / "parity", "tv-densenet121")
    convert(FORMATS[format](tmp_path, renamed(parity.state_dict(), style)), "densenet121", tmp_path / "out")
    network = load_converted(tmp_path / "out")
    run = jax.jit(lambda network, images: network.model()(images), compiler_options=FAST_COMPILE)
    assert relative_error(run(network, jnp.asarray(parity.images())), parity.results["eval_logits"]) < 1e-4


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_other_families_use_every_key(tmp_path, name):
    arrays = state_dict(name, classes=7)
    report = convert(FORMATS["zip"](tmp_path, renamed(arrays, "DataParallel")), name, tmp_path / "out", channels=1)
    assert len(report.used) + len(report.dropped) == len(arrays)
    assert load_converted(tmp_path / "out").input_spec.channels == 1


def test_the_card_describes_the_weights(tmp_path, small_weights):
    file = FORMATS["safetensors"](tmp_path, small_weights)
    report = convert_small(file, tmp_path / "out", labels=["Mass", "Nodule", "", "Hernia", "Edema"], input_spec="unit")
    card, arrays = read_converted(tmp_path / "out")
    assert card == report.card
    assert (card.architecture, card.classes, card.input_spec, card.options) == ("densenet_small", 5, UNIT, SMALL)
    assert card.labels == ("Mass", "Nodule", "", "Hernia", "Edema")
    assert (card.source, card.source_sha256) == ("w.safetensors", sha256(file))
    assert card.sha256 == sha256(tmp_path / "out" / "weights.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["used"]["features.conv0.weight"] == "conv0.kernel"
    assert set(written["used"].values()) == set(arrays)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("format", ["safetensors", "zip", "legacy"])
def test_other_types_become_float32_with_a_note(tmp_path, small_weights, format, dtype):
    arrays = {name: a.astype(dtype) if a.dtype == np.float32 else a for name, a in small_weights.items()}
    report = convert_small(FORMATS[format](tmp_path, arrays), tmp_path / "out")
    kernel = load_converted(tmp_path / "out").params["conv0"]["kernel"]
    expected = arrays["features.conv0.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)
    assert f"{np.dtype(dtype).name} values were written as float32" in report.notes


def test_a_dropped_head_is_reported(tmp_path, small_weights):
    file = FORMATS["zip"](tmp_path, renamed(small_weights, "CheXNet"))
    report = convert_small(file, tmp_path / "out", head="drop")
    assert "the head (5 outputs) was dropped" in report.notes
    assert report.missing == ("classifier.output.bias", "classifier.output.kernel")
    assert {key for key in report.dropped if "tracked" not in key} == {
        "module.densenet121.classifier.0.weight", "module.densenet121.classifier.0.bias"
    }  # fmt: skip
    assert report.card.classes == 0
    with pytest.raises(CxrError, match="without a head"):
        load_converted(tmp_path / "out")
    _, arrays = read_converted(tmp_path / "out")
    np.testing.assert_array_equal(arrays["norm0.mean"], small_weights["features.norm0.running_mean"])


def test_a_head_of_several_layers_can_be_dropped(tmp_path, small_weights):
    arrays = {name: array for name, array in small_weights.items() if not name.startswith("classifier")}
    layers = {"classifier.0.weight": np.ones((9, 8), np.float32), "classifier.3.weight": np.ones((2, 9), np.float32)}
    file = FORMATS["zip"](tmp_path, arrays | layers)
    with pytest.raises(CxrError, match=r"classifier.bias is missing: --head drop"):
        convert_small(file, tmp_path / "out")
    assert layers.keys() <= convert_small(file, tmp_path / "out", head="drop").dropped.keys()
    headless = FORMATS["safetensors"](tmp_path, arrays)
    assert "the head was dropped" in convert_small(headless, tmp_path / "headless", head="drop").notes


def test_torchxrayvision_weights_carry_inputs_and_labels(tmp_path, grey_weights):
    labels = ["Atelectasis", "Mass", "", "Hernia", "Lung Opacity"]
    arrays = grey_weights | {"op_threshs": np.full(5, np.nan, np.float32)}
    model = whole_module("torchxrayvision.models.DenseNet", arrays, targets=labels)
    for legacy in (False, True):
        file = write(tmp_path / "xrv.pt", model, legacy=legacy)
        report = convert_small(file, tmp_path / f"out{legacy}", input_spec=None)
        assert report.card.input_spec == XRV
        assert report.card.labels == tuple(labels)
        assert "thresholds" in report.dropped["op_threshs"]
        assert any("torchxrayvision.models.DenseNet" in note for note in report.notes)
        with pytest.raises(CxrError, match="inputs must be xrv, not grey"):
            convert_small(file, tmp_path / "other", input_spec="grey")
    plain = FORMATS["safetensors"](tmp_path, arrays)
    assert convert_small(plain, tmp_path / "plain", input_spec=None).card.input_spec == XRV
    model = create("densenet_small", classes=5, input_spec=XRV, **SMALL)
    assert len(load_published(model, grey_weights).arrays) == len(report.used)
    jax.tree.map(np.testing.assert_array_equal, Network.from_model(model), load_converted(tmp_path / "plain"))


def test_one_channel_needs_an_input_spec(tmp_path, grey_weights):
    file = FORMATS["zip"](tmp_path, grey_weights)
    with pytest.raises(CxrError, match=r"takes 1 channels and inputs imagenet give 3: .* imagenet-grey, .*xrv"):
        convert_small(file, tmp_path / "out", input_spec="imagenet")
    assert convert_small(file, tmp_path / "out", input_spec="xrv").card.input_spec == XRV


def test_three_channels_are_folded_on_request_only(tmp_path, small_weights):
    file = FORMATS["zip"](tmp_path, small_weights)
    with pytest.raises(CxrError, match=r"takes 3 channels and inputs grey give 1: .* imagenet, unit, .*channels=1"):
        convert_small(file, tmp_path / "out", input_spec=None)


CONV = "features.denseblock1.denselayer2.conv2.weight"


def change_array(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            change_array(CONV, lambda a: a[:, :5].copy()), rf"\(1 faults\): {CONV} has shape \(4, 5, 3, 3\)", id="shape"
        ),
        pytest.param(lambda arrays: arrays | {"extra.weight": np.ones(2)}, "unexpected extra.weight", id="extra"),
        pytest.param(
            lambda arrays: {name: a for name, a in arrays.items() if name != CONV}, f"missing {CONV}", id="missing"
        ),
        pytest.param(
            change_array(CONV, lambda a: a * np.float32(np.nan)), f"{CONV} holds values that are not finite", id="nan"
        ),
        pytest.param(change_array(CONV, lambda a: a.astype(np.float64) * 1e300), "not finite", id="beyond float32"),
        pytest.param(change_array(CONV, lambda a: a.astype(np.int32)), f"{CONV} is int32", id="whole numbers"),
    ],
)
def test_weights_that_do_not_fit_give_one_line_and_no_file(tmp_path, small_weights, format, change, message):
    file = FORMATS[format](tmp_path, change(small_weights))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CxrError, match=message) as caught:
        convert_small(file, tmp_path / "out")
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_gives_one_line_and_no_file(tmp_path, small_weights, format):
    file = FORMATS[format](tmp_path, small_weights)
    content = file.read_bytes()
    for fraction in (0, 0.01, 0.3, 0.9, 0.999):
        file.write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(CxrError, match=file.name):
            convert_small(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_names_for_one_array_are_refused(tmp_path, small_weights):
    older = {STYLES["older"](CONV): small_weights[CONV]}
    with pytest.raises(CxrError, match=rf"{CONV} and .*conv\.2\.weight are both|conv\.2\.weight and .* are both"):
        convert_small(FORMATS["safetensors"](tmp_path, small_weights | older), tmp_path / "out")


def test_the_architecture_that_fits_is_named(tmp_path):
    arrays = state_dict("resnet18", classes=3)
    file = FORMATS["zip"](tmp_path, renamed(arrays, "DataParallel"))
    for other in ("resnet34", "densenet121"):
        with pytest.raises(CxrError, match=rf"weights of resnet18, not of {other}: use --arch resnet18"):
            convert(file, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["Mass"]}, "1 labels for 5 outputs"),
        ({"labels": ["Mass", "Edema", "Mass", "", ""]}, "'Mass' is given twice"),
        ({"labels": ["Mass"], "head": "drop"}, "the head was dropped"),
        ({"input_spec": "imagenett"}, "did you mean 'imagenet'"),
        ({"options": SMALL | {"groth": 3}}, "did you mean 'growth_rate'"),
        ({"options": SMALL | {"dtype": "float64"}}, "dtype is not an option of an architecture"),
        ({"options": SMALL | {"name": "resnet18"}}, "name is not an option of an architecture"),
        ({"options": SMALL | {"growth_rate": "a"}}, "growth_rate must be a whole number above 0"),
        ({"options": SMALL | {"block_config": 3}}, "block_config must be a sequence of layer counts"),
        ({"options": SMALL | {"last_norm": {1}}}, "options must be numbers, texts, and lists"),
        ({"channels": 2}, "1 channel only"),
        ({"head": "keeps"}, "did you mean 'keep'"),
    ],
)
def test_bad_arguments_are_named(tmp_path, small_weights, arguments, message):
    with pytest.raises(CxrError, match=message):
        convert_small(FORMATS["zip"](tmp_path, small_weights), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_a_file_is_refused(tmp_path, small_weights):
    file = FORMATS["zip"](tmp_path, small_weights)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CxrError, match="is a file"):
        convert_small(file, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_impossible_options_are_refused_quickly(tmp_path, small_weights):
    start = time.process_time()
    with pytest.raises(CxrError, match="do not fit this network"):
        convert_small(FORMATS["zip"](tmp_path, small_weights), tmp_path / "out", options=SMALL | {"growth_rate": 10**7})
    assert time.process_time() - start < 20  # drawing these values would take hours
    with pytest.raises(CxrError, match=r"dense must hold options of that trunk"):
        convert(tmp_path / "w.pth", "attention_fusion", tmp_path / "out", options={"dense": 3})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_the_same_conversion_is_overwritten(tmp_path, small_weights, grey_weights):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(small_weights, file)
    save_file(grey_weights, other)
    out = tmp_path / "out"
    convert_small(file, out)
    before = contents(out)
    convert_small(file, out)
    assert contents(out) == before
    for source, architecture, message in (
        (other, "densenet_small", r"out holds densenet_small from a\.safetensors already: give another --out"),
        (file, "densenet121", r"out holds densenet_small from a\.safetensors already"),
        (out / "weights.safetensors", "densenet_small", r"would be overwritten: give another --out"),
    ):
        with pytest.raises(CxrError, match=message):
            convert(source, architecture, out)
    (out / "card.json").write_text("hello")
    with pytest.raises(CxrError, match=r"card\.json that cannot be read: give another --out"):
        convert_small(file, out)
    (out / "card.json").unlink()
    with pytest.raises(CxrError, match=r"without a card\.json: give another --out"):
        convert_small(file, out)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(CxrError, match="directory of a run: give another --out"):
        convert_small(file, run)
    assert contents(run) == {"config.json": b"{}"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_the_directory_as_it_was(tmp_path, small_weights, monkeypatch, exists):
    file, out = FORMATS["safetensors"](tmp_path, small_weights), tmp_path / "out"
    if exists:
        convert_small(file, out)
    before = contents(out) if exists else {}

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(sys.modules["cxrjax.weights.convert"], "write_json", disk_full)
    with pytest.raises(OSError, match="No space"):
        convert_small(file, out, labels=["A", "B", "C", "D", "E"])
    assert out.exists() == exists
    assert (contents(out) if exists else {}) == before


def test_a_damaged_neck_is_an_error(tmp_path):
    """One missing or misshapen key is an error; an absent neck is dropped."""
    arrays = state_dict("hrnet_small", classes=3)
    neck = [name for name in arrays if name.startswith("incre_modules")]
    kernel = next(name for name in neck if name.endswith("conv2.weight"))
    whole = {name: array for name, array in arrays.items() if name not in neck}
    damages = ({name: arrays[name] for name in arrays if name != kernel}, arrays | {kernel: arrays[kernel][:1].copy()})
    for number, damaged in enumerate(damages):
        file = tmp_path / f"{number}.safetensors"
        save_file(damaged, file)
        with pytest.raises(CxrError, match=rf"\(1 faults\): .*{kernel}"):
            convert(file, "hrnet_small", tmp_path / "out", head="drop")
    file = FORMATS["safetensors"](tmp_path, whole)
    notes = convert(file, "hrnet_small", tmp_path / "out", head="drop").notes
    assert "module incre_modules was dropped: it does not fit" in notes
    assert not any("final_layer" in note for note in notes)


def test_labels_are_names_or_a_file(tmp_path):
    many = ",".join(f"Finding {number}" for number in range(100))
    assert read_names(many) == many.split(",")
    assert read_names("x" * 300) == ["x" * 300]
    (tmp_path / "labels.txt").write_text("Mass\n\nEdema\n")
    assert read_names(str(tmp_path / "labels.txt")) == ["Mass", "", "Edema"]
    assert read_names("") == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": "Mass"}, "its labels are not a list of texts"),
        ({"labels": ["A", "B", "C", "D", 5]}, "its labels are not a list of texts"),
        ({"labels": ["Mass"]}, "it has 1 labels for 5 outputs"),
        ({"classes": True}, "its classes are True"),
        ({"options": {"seed": 3}}, "seed is not an option of an architecture"),
    ],
)
def test_a_card_with_wrong_entries_is_refused(tmp_path, small_weights, entries, message):
    convert_small(FORMATS["safetensors"](tmp_path, small_weights), tmp_path / "out")
    card = tmp_path / "out" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | entries))
    with pytest.raises(CxrError, match=rf"card\.json is not a card of converted weights \({message}"):
        read_converted(tmp_path / "out")


def test_an_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(CxrError, match="unknown network 'densenet112': did you mean 'densenet121'"):
        convert(tmp_path / "w.pth", "densenet112", tmp_path / "out")


def test_the_command_converts_and_reports(capsys, tmp_path, small_weights):
    file = FORMATS["tar"](tmp_path, renamed(small_weights, "CheXNet"))
    (tmp_path / "labels.txt").write_text("Mass\nNodule\n\nHernia\nEdema\n")
    command = [
        "weights",
        "convert",
        file,
        "--arch",
        "densenet_small",
        "--out",
        tmp_path / "out",
        "--inputs",
        "imagenet",
    ]
    command += ["--labels", tmp_path / "labels.txt", "--channels", 1, "--json", tmp_path / "result.json"]
    command += [word for option in SMALL.items() for word in ("--option", "{}={}".format(*option))]
    code = main([str(word) for word in command])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "densenet_small, 5 outputs, inputs imagenet-grey" in out
    assert "3 input channels folded to 1" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["card"]["labels"] == ["Mass", "Nodule", "", "Hernia", "Edema"]
    assert result == json.loads((tmp_path / "out" / "report.json").read_text())
    assert load_converted(tmp_path / "out").classes == 5

    code = main([str(word) for word in (*command[:4], "resnet_small", "--out", tmp_path / "b", *command[7:9])])
    assert code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        main([str(word) for word in (*command[:9], "--option", "growth_rate")])
    assert "'growth_rate' is not KEY=VALUE" in capsys.readouterr().err


def test_memory_stays_below_twice_the_file(tmp_path):
    """Measured on the allocations of NumPy and Python; the file itself is mapped."""
    options = {"growth_rate": 128, "block_config": (4, 4), "stem_channels": 64, "pooling": "average"}
    file = FORMATS["zip"](tmp_path, state_dict("densenet_small", classes=5, **options))
    size = file.stat().st_size
    assert size > 10e6
    tracemalloc.start()
    convert(file, "densenet_small", tmp_path / "out", options=options, restricted=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size
