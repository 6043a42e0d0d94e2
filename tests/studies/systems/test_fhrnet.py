"""FHRNet in stages, jointly and alternating: through `train`, and through its study, which compares the heads."""

import json

import jax
import numpy as np
import pytest
from scipy.special import log_expit, logit
from scipy.stats import spearmanr

from cxrjax.cli.main import main
from cxrjax.inference.load_run import load_model
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.tables import read
from cxrjax.models.backbone import Architecture
from cxrjax.models.hrnet import ARCHITECTURES, HRNet
from cxrjax.models.input_spec import GREY
from cxrjax.train.monitoring import read_metrics

FEW = (
    "data.stored_size=32", "data.image_size=32", "data.num_threads=1", "split.name=random",
    "split.fractions=(0.5, 0.25, 0.25)", "train.batch_size=4", "train.steps_per_epoch=3", "train.epochs=1",
    "train.log_every_steps=1", "evaluate.bootstrap_resamples=20", "evaluate.batch_size=16",
    "data.findings=('Mass','Pleural Effusion')", "model.options.backbone=hrnet_tiny",
)  # fmt: skip
JOINT = ("train.stages={}", "model.options.stage=joint")


def command(name, directory, phantom_data, *overrides):
    arguments = [*name, "--workdir", str(directory), f"--config.data.data_dir={phantom_data}"]
    return main([*arguments, *(f"--config.{override}" for override in (*FEW, *overrides))])


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """Branches of two resolutions, which compile in a fraction of the time."""
    settings = {"width": 4, "num_modules": (1,), "num_blocks": 1, "stem_channels": 4, "stem_blocks": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "hrnet_tiny", Architecture(HRNet, GREY, settings, "of these tests"))
        yield


@pytest.fixture(scope="module", params=["staged", "joint", "alternating"])
def study(request, tmp_path_factory, phantom_data):
    overrides = {"staged": (), "joint": JOINT, "alternating": (*JOINT, "train.heads=alternating")}[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    name = ("study", "fhrnet", "--config", "fhrnet:phantom")
    assert command(name, directory, phantom_data, *overrides) == 0
    return request.param, directory


def predictions(kind, directory, arm):
    runs = directory / "runs" / ("stages" if kind == "staged" else kind)
    directory_of_arm = {"global": runs / "stages" / "1", "local": runs / "stages" / "2", "fusion": runs}[arm]
    folder = directory_of_arm / "predictions" if kind == "staged" else runs / "predictions" / arm
    return Predictions.read(folder / "test.parquet"), runs


def test_the_study_compares_three_heads_and_their_consistency(study):
    kind, directory = study
    result = json.loads((directory / "study.json").read_text())
    assert list(result["scores"]) == ["global", "local", "fusion"]
    tables = {arm: predictions(kind, directory, arm)[0] for arm in ("global", "local", "fusion")}
    assert all(np.ptp(tables["fusion"].logit - tables[arm].logit) > 0 for arm in ("global", "local"))
    sums = read(predictions(kind, directory, "fusion")[1] / "predictions" / "consistency.parquet")
    for k, finding in enumerate(tables["fusion"].findings):
        expected = log_expit(tables["global"].logit[:, k]) + log_expit(tables["local"].logit[:, k])
        np.testing.assert_allclose(sums.numbers(f"sum_{finding}"), expected)
        np.testing.assert_allclose(sums.numbers(f"prob_{finding}"), tables["fusion"].probability[:, k])
        rank = spearmanr(expected, tables["fusion"].logit[:, k]).statistic
        assert result["consistency"][finding] == pytest.approx(rank, abs=1e-6)
    page = (directory / "report" / "index.html").read_text()
    assert ("heads of one network" in page) == (kind != "staged")


def test_each_way_of_training_moves_what_it_should(study):
    kind, directory = study
    _, run = predictions(kind, directory, "fusion")
    network = load_model(run).network
    names = list(network.params)
    if kind == "staged":
        first, second = (load_model(run / "stages" / n).network for n in ("1", "2"))
        moved = [{name for name in names if differ(a.params[name], b.params[name])}
                 for a, b in ((first, second), (second, network))]  # fmt: skip
        assert moved == [{"local_branch"}, {"classifier"}]
        return
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train_loss" in row]
    losses = [row["train_loss"] for row in rows]
    assert len(losses) == 3
    # Three losses of about log 2 at first: their sum, or one of them.
    assert (losses[0] > 1.2) == (kind == "joint")


def differ(first, second):
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("study", ["joint"], indirect=True)
def test_the_geometric_mean_can_be_the_prediction(study):
    kind, directory = study
    run = directory / "runs" / "joint"
    stored = json.loads((run / "config.json").read_text())
    stored["model"]["options"]["prediction"] = "geometric-mean"
    other = directory / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(stored))
    for name in ("checkpoints", "metrics.jsonl", "run.json"):
        (other / name).symlink_to(run / name)
    assert main(["evaluate", str(other), "--resamples", "0"]) == 0
    assert json.loads((other / "calibration.json").read_text())["passes"] == 0, "only the fusion has dropout"
    ours = Predictions.read(other / "predictions" / "test.parquet")
    branches = [predictions(kind, directory, arm)[0].probability for arm in ("global", "local")]
    np.testing.assert_allclose(ours.logit, logit(np.sqrt(branches[0] * branches[1])), atol=1e-4)


def test_train_takes_the_literal_reading(phantom_data, tmp_path):
    """Softmax over findings that are not exclusive, one matrix for all heads, the weighted sum, the masked image."""
    more = ("loss.name=softmax", "model.options.fusion=weighted", "model.options.heads=shared",
            "model.options.region=mask")  # fmt: skip
    name = ("train", "--config", "fhrnet:phantom")
    assert command(name, tmp_path / "run", phantom_data, *JOINT, *more) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--resamples", "0"]) == 0
    table = Predictions.read(tmp_path / "run" / "predictions" / "test.parquet")
    np.testing.assert_allclose(table.probability.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.stages={}", "model.options.stage=local"), "or use an fhrnet with model.options.stage=joint"),
        ((*JOINT, "study.arms=('global', 'local', 'fusion', 'mean')"), "its heads global, local, fusion as arms"),
        (("train.stages={}", "train.stages.one.seed=1"), "each of the 1 train.stages"),
    ],
)
def test_arms_that_are_neither_stages_nor_heads_are_refused(phantom_data, tmp_path, capsys, overrides, message):
    name = ("study", "fhrnet", "--config", "fhrnet:phantom")
    assert command(name, tmp_path / "study", phantom_data, *overrides) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study").exists()
