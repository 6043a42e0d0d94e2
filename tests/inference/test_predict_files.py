"""A trained network gives the same results for image files and for records of a prepared data set."""

import json

import cv2
import numpy as np
import pytest

from cxrjax import config as configs
from cxrjax.cli.main import main
from cxrjax.data.images import encode
from cxrjax.data.records import open_records
from cxrjax.errors import CxrError
from cxrjax.inference.image_files import find_images
from cxrjax.inference.load_run import load_model, load_run, predict
from cxrjax.metrics.predictions import Predictions
from cxrjax.models.input_spec import GREY, check_range, prepare
from cxrjax.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_overrides):
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(configs.load_config("demo:32", [*tiny_overrides, "train.epochs=1"]), directory)
    return directory


@pytest.fixture(scope="module")
def images(run, phantom_data, tmp_path_factory):
    """The test part's first five images as files, and what `evaluate` predicts for them."""
    experiment, network, _ = load_run(run)
    predictions = predict(experiment, network, "test")
    rows = experiment.examples("test").row[:5]
    folder = tmp_path_factory.mktemp("images")
    records = open_records(phantom_data, "cxr_phantom", "32")
    for row in rows:
        (folder / f"{records.id[row]}.png").write_bytes(encode(records.image(row)))
    return folder, dict(zip((f"{name}.png" for name in predictions.id[:5]), predictions.logit, strict=False))


def test_files_and_records_give_the_same_logits(run, images, tmp_path, capsys):
    folder, expected = images
    arguments = ["predict", str(run), str(folder), "--batch-size", "3", "--out", str(tmp_path / "p.csv")]
    assert main([*arguments, "--json", str(tmp_path / "p.json")]) == 0
    table = Predictions.read(tmp_path / "p.csv")
    assert len(table) == 5
    for name, logit in zip(table.id, table.logit, strict=True):
        np.testing.assert_allclose(logit, expected[name], rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["failed"] == {}
    first = written["images"][0]
    assert first["id"] in capsys.readouterr().out
    np.testing.assert_allclose(list(first["probability"].values()), 1 / (1 + np.exp(-expected[first["id"]])), atol=1e-5)


def test_a_bad_file_fails_alone_with_exit_code_1(run, images, tmp_path, capsys):
    folder, _ = images
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    good = sorted(folder.iterdir())[0]
    assert main(["predict", str(run), str(bad), str(good), "--json", str(tmp_path / "p.json")]) == 1
    written = json.loads((tmp_path / "p.json").read_text())
    assert [image["id"] for image in written["images"]] == [good.name]
    assert "not a PNG, JPEG or DICOM image" in written["failed"][str(bad)]
    assert f"1 failed: {bad}" in capsys.readouterr().err.replace("\n", " ")


def test_prepared_images_are_used_unchanged(run, images, tmp_path):
    folder, expected = images
    files = sorted(folder.iterdir())
    grey = np.stack([cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files])[..., None]
    network = load_model(run).network
    np.save(tmp_path / "x.npy", np.asarray(prepare(grey, network.input_spec, np.float32)))
    arguments = [str(run), str(tmp_path / "x.npy"), "--json", str(tmp_path / "p.json"), "--batch-size", "2"]
    assert main(["predict", *arguments]) == 0
    for file, image in zip(files, json.loads((tmp_path / "p.json").read_text())["images"], strict=True):
        ours = list(image["probability"].values())
        np.testing.assert_allclose(ours, 1 / (1 + np.exp(-expected[file.name])), atol=1e-5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 32, 32, 1), np.uint8), "prepared images are floats"),
        (np.random.default_rng(0).uniform(0, 1, (1, 32, 32, 1)).astype(np.float32), "expects black at -2 and white"),
        (np.random.default_rng(0).uniform(-100, 100, (1, 32, 32, 1)).astype(np.float32), "hold values from"),
        (np.full((1, 32, 32, 1), np.nan, np.float32), "hold values from nan"),
        (np.zeros((1, 32, 32, 3), np.float32), "must be B x H x W x 1"),
        (np.zeros((), np.float32), "an array of shape ()"),
        (np.zeros((0, 32, 32, 1), np.float32), "an array of shape (0, 32, 32, 1)"),
    ],
)
def test_images_prepared_otherwise_are_errors(run, tmp_path, capsys, array, message):
    np.save(tmp_path / "x.npy", array)
    assert main(["predict", str(run), str(tmp_path / "x.npy")]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--batch-size", "-1"], ["--size", "-5"]])
def test_numbers_out_of_range_are_errors(run, images, capsys, arguments):
    assert main(["predict", str(run), str(images[0]), *arguments]) == 1
    assert "must be a whole number above 0" in capsys.readouterr().err.replace("\n", " ")


def test_one_constant_image_is_an_error():
    good = np.random.default_rng(0).uniform(-2, 2, (2, 8, 8, 1)).astype(np.float32)
    check_range(good, GREY)
    good[1] = -1
    with pytest.raises(CxrError, match="hold values"):
        check_range(good, GREY)


def test_hidden_files_are_skipped(run, images, tmp_path):
    (tmp_path / "._c.png").write_bytes(b"of a Mac")
    (tmp_path / "a.png").write_bytes(sorted(images[0].iterdir())[0].read_bytes())
    assert find_images([tmp_path]) == [tmp_path / "a.png"]


def test_duplicate_file_names_become_paths(run, images, tmp_path):
    folder, _ = images
    one = sorted(folder.iterdir())[0]
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.png").write_bytes(one.read_bytes())
    assert (
        main(["predict", str(run), str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "p.json")]) == 0
    )
    names = [image["id"] for image in json.loads((tmp_path / "p.json").read_text())["images"]]
    assert names == [str(tmp_path / "a" / "x.png"), str(tmp_path / "b" / "x.png")]


def test_missing_paths_are_errors(tmp_path):
    with pytest.raises(CxrError, match="does not exist"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(CxrError, match="no images in"):
        find_images([tmp_path])
    with pytest.raises(CxrError, match="not the directory of a run"):
        load_model(tmp_path)
