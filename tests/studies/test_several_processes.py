"""Several processes train, predict and explain as one; the main process writes the report."""

import json

import numpy as np
import pytest
from processes import finish, start

from cxrjax.cli.main import main
from cxrjax.inference.load_run import load_run, predict
from cxrjax.metrics.predictions import Predictions

RECIPE = """
from cxrjax.config import load_config


def get_config(arg=""):
    config = load_config(f"demo:{arg or 32}")
    config.study.sizes, config.study.folds, config.study.paper = (16, 32), (), "resolution"
    config.study.fine = config.study.coarse = config.study.control = ()
    config.study.erf_images, config.evaluate.bootstrap_resamples = 2, 30
    return config
"""
MORE = (
    "mesh.data=2",
    "train.epochs=1",
    "mesh.space=2",
    "train.monitor=val_loss",
    "data.findings=('Cardiomegaly','Mass')",
)
RUNS = ("16px", "32px")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studied(tmp_path_factory, tiny_overrides):
    """Arguments of a study, its directory, and what its two processes wrote as JSON."""
    directory = tmp_path_factory.mktemp("study")
    recipe = directory / "recipe.py"
    recipe.write_text(RECIPE)
    keys = [f"--config.{override}" for override in (*tiny_overrides, *MORE)]
    arguments = ["study", "resolution", "--config", str(recipe), "--workdir", str(directory / "study"), *keys]
    ended = finish(start([*arguments, "--json", str(directory / "result.json")], 2))
    assert [code for code, _ in ended] == [0, 0], ended
    return arguments, directory / "study", json.loads((directory / "result.json").read_text())


def test_all_train_and_predict_and_the_main_process_reports(studied):
    _, directory, result = studied
    assert json.loads((directory / "study.json").read_text())["scores"] == result["scores"]
    assert (directory / "report" / "index.html").is_file()
    for name in RUNS:
        run = directory / "runs" / name
        assert json.loads((run / "run.json").read_text())["processes"] == 2
        experiment, network, _ = load_run(run, mesh=(1, 1))
        for split in ("validation", "test"):
            written = Predictions.read(run / "predictions" / f"{split}.parquet")
            expected = predict(experiment, network, split)
            assert written.id.tolist() == expected.id.tolist()
            np.testing.assert_allclose(written.logit, expected.logit, rtol=1e-4, atol=1e-5)


def test_one_process_has_nothing_left_to_do(studied):
    arguments, directory, result = studied
    made = {file: file.stat().st_mtime_ns for file in (directory / "runs").glob("*/predictions/*.*")}
    assert len(made) == len(RUNS) * len(("validation", "test", "made-of", "receptive-field"))
    assert main(arguments) == 0
    again = json.loads((directory / "study.json").read_text())
    for study in (again, result):
        study["provenance"].pop("training, seconds", None)
    assert again == {key: value for key, value in result.items() if key != "report"}
    assert {file: file.stat().st_mtime_ns for file in made} == made


def test_the_main_process_explains_on_its_local_devices(studied):
    _, directory, _ = studied
    run = directory / "runs" / "32px"
    ended = finish(start(["explain", str(run), "gradcam", "--images", "2"], 2))
    assert [code for code, _ in ended] == [0, 0], ended
    maps = run / "explain" / "gradcam" / "Mass" / "maps.npz"
    with np.load(maps) as stored:
        expected = dict(stored)
    maps.unlink()
    assert main(["explain", str(run), "gradcam", "--images", "2", "--mesh", "data=1"]) == 0
    with np.load(maps) as stored:
        assert stored["id"].tolist() == expected["id"].tolist()
        np.testing.assert_allclose(stored["map"], expected["map"], rtol=1e-3, atol=1e-6)
