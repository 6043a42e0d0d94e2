"""The command line: the full pipeline on a tiny phantom, and one error line for every mistake."""

import importlib.abc
import importlib.machinery
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cxrjax.cli.demo import run_demo
from cxrjax.cli.main import main
from cxrjax.config import default, flatten
from cxrjax.metrics.predictions import Predictions


class FakeTensorFlow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Pretends that TensorFlow is installed, and fails if it is imported."""

    def find_spec(self, fullname, path, target=None):
        return importlib.machinery.ModuleSpec(fullname, self) if fullname.partition(".")[0] == "tensorflow" else None

    def exec_module(self, module):
        raise AssertionError(f"{module.__name__} was imported")


@pytest.fixture(autouse=True)
def _no_tensorflow(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [FakeTensorFlow(), *sys.meta_path])


def run(capsys, *arguments):
    """Return the exit code, standard output, and standard error as one line."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    arguments = ["train", "--config", "demo:32", "--workdir", str(directory)]
    assert main([*arguments, *(f"--config.{override}" for override in tiny_overrides)]) == 0
    return directory


def test_prepare_reports_its_result_and_reuses_it(capsys, tmp_path):
    arguments = ("prepare", "cxr_phantom", "--data-dir", tmp_path / "d", "--size", 32, "--patients", 5, "--json")
    code, out, err = run(capsys, *arguments, tmp_path / "first.json")
    assert code == 0, err
    assert "images of 5 patients" in out
    first = json.loads((tmp_path / "first.json").read_text())
    code, out, _ = run(capsys, *arguments, tmp_path / "second.json")
    assert code == 0
    assert "already prepared" in out
    assert json.loads((tmp_path / "second.json").read_text())["fingerprint"] == first["fingerprint"]


def test_evaluate_writes_predictions_scores_and_a_report(capsys, trained, tmp_path):
    code, _, err = run(capsys, "evaluate", trained, "--resamples", 50, "--json", tmp_path / "scores.json")
    assert code == 0, err
    result = json.loads((tmp_path / "scores.json").read_text())
    predictions = Predictions.read(trained / "predictions" / "test.parquet")
    assert result["images"] == len(predictions)
    mean = result["scores"][-1]
    assert mean["finding"] == "mean"
    assert mean["auroc_low"] <= mean["auroc"] <= mean["auroc_high"]
    page = (trained / "report" / "index.html").read_text()
    assert "Reticulation" in page
    table = trained / "predictions" / "test.parquet"
    code, _, _ = run(capsys, "score", "--predictions", table, "--resamples", 50, "--json", tmp_path / "again.json")
    assert code == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert [row["auroc"] for row in again["scores"]] == [row["auroc"] for row in result["scores"]]


def test_explain_erf_writes_arrays_figures_and_sizes(capsys, trained):
    code, out, err = run(capsys, "explain", trained, "erf", "--images", 4)
    assert code == 0, err
    assert "equivalent diameter" in " ".join(out.split())
    folder = trained / "explain"
    erf = json.loads((folder / "erf.json").read_text())
    with np.load(folder / "erf.npz") as arrays:
        assert arrays["map"].shape == (32, 32)
        area = np.sort(arrays["map"], axis=None)[::-1].cumsum() / arrays["map"].sum()
    assert erf["area_fraction"] == pytest.approx((np.searchsorted(area, erf["mass"]) + 1) / 32**2, abs=2 / 32**2)

    arguments = ("--images", 2, "--layers", "all", "--untrained", "--width-cm", 35)
    code, out, err = run(capsys, "explain", trained, "erf", *arguments)
    assert code == 0, err
    networks = json.loads((folder / "erf.json").read_text())["networks"]
    assert list(networks) == ["trained", "untrained"]
    for layers in networks.values():
        assert list(layers) == ["stem", "block1", "block2", "final"]
        assert layers["stem"]["theoretical_px"] < layers["block2"]["theoretical_px"]
        for field in layers.values():
            assert 0 < field["diameter_px"] <= 1.2 * field["theoretical_px"]
            assert field["gaussian"]["least_squares"]["diameter_px"] == pytest.approx(field["gaussian_px"])
    with np.load(folder / "erf.npz") as arrays:
        assert np.abs(arrays["trained_final"] - arrays["untrained_final"]).max() > 0.01
    for name in ("erf", "erf-layers", "erf-depth"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_explain_saliency_writes_arrays_images_scores_and_a_report(capsys, trained):
    arguments = ("--findings", "Mass,Cardiomegaly", "--images", 2)
    code, out, err = run(capsys, "explain", trained, "gradcam", *arguments)
    assert code == 0, err
    folder = trained / "explain" / "gradcam"
    scores = json.loads((folder / "scores.json").read_text())
    mass = scores["findings"]["Mass"]
    with np.load(folder / "Mass" / "maps.npz") as arrays:
        assert arrays["map"].shape[1:] == tuple(scores["map"])
        assert len(arrays["map"]) == len(arrays["id"]) == len(arrays["probability"]) == mass["images"]
        assert arrays["map"].min() >= 0
    assert 0 <= mass["hits"] <= mass["images"]
    assert [rate["limit"] for rate in mass["boxes"]["iou"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert scores["overall"]["images"] == sum(finding["images"] for finding in scores["findings"].values())
    assert len(list((folder / "Mass").glob("*.png"))) == min(2, mass["images"])
    assert "IoBB" in (folder / "index.html").read_text()
    assert "IoBB" in out

    arguments = ("--findings", "Mass", "--images", 2, "--steps", 16, "--regions", "all", "--baseline", "mean")
    code, out, err = run(capsys, "explain", trained, "integrated", *arguments)
    assert code == 0, err
    scores = json.loads((trained / "explain" / "integrated" / "scores.json").read_text())
    assert scores["map"] == [32, 32]
    assert 0 <= scores["incompleteness"] < 0.5
    with np.load(trained / "explain" / "integrated" / "Mass" / "maps.npz") as arrays:
        assert arrays["map"].min() < 0 < arrays["map"].max()


@pytest.mark.slow
def test_the_resolution_study_writes_one_report_of_all_sizes(capsys, tiny_overrides, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from cxrjax.config import load_config\n\n\ndef get_config(arg=''):\n"
        "    config = load_config(f'demo:{arg or 32}')\n"
        "    config.study.sizes = (16, 32)\n    config.study.seeds = (0, 1)\n"
        "    config.study.control_size = 32\n    config.study.erf_images = 4\n"
        "    config.evaluate.bootstrap_resamples = 50\n"
        "    return config\n"
    )
    arguments = (
        "study",
        "resolution",
        "--config",
        recipe,
        "--workdir",
        tmp_path / "study",
        "--json",
        tmp_path / "s.json",
    )
    code, out, err = run(capsys, *arguments, *(f"--config.{override}" for override in tiny_overrides))
    assert code == 0, err
    result = json.loads((tmp_path / "s.json").read_text())
    assert set(result["scores"]) == {"16 px", "32 px", "stacked", "voted", "logistic"}
    assert all(abs(sum(weights.values()) - 1) < 1e-9 for weights in result["weights"].values())
    assert {claim["supported"] for claim in result["claims"]} <= {"yes", "no", "undecided"}
    assert sorted(p.name for p in (tmp_path / "study" / "runs").iterdir()) == [
        "16px", "16px-seed1", "32px", "32px-seed1", "control-32px",
    ]  # fmt: skip
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    for text in ("2 training seeds", "drawn by a program", "stacked", "control"):
        assert text in page
    assert "report:" in out


TRAIN = ("train", "--config", "demo:32", "--workdir", "{tmp}", "{data}")
BAD = [
    (("train", "--config", "demo", "--workdir", "{tmp}", "--config.train.epoch=3"), "did you mean train.epochs"),
    (("train", "--config", "nowhere", "--workdir", "{tmp}"), "no config file nowhere"),
    (("train", "--config", "demo", "--workdir", "{tmp}", "--config.data.data_dir={tmp}"), "cxrjax prepare cxr_phantom"),
    (
        ("train", "--config", "demo:32", "--workdir", "{tmp}", "{data}", "--config.data.findings=('Mas',)"),
        "did you mean Mass",
    ),
    (("train", "--config", "demo:32", "--workdir", "{tmp}", "{data}", "--config.model.options.grow=3"), "growth_rate"),
    (("train", "--config", "demo:32", "--workdir", "{tmp}", "{data}", "--config.data.views=LL"), "AP, PA"),
    (("evaluate", "{tmp}"), "is not the directory of a run"),
    (("explain", "{tmp}", "erf"), "is not the directory of a run"),
    (("explain", "{tmp}", "erf", "--threshold", "0.3"), "--threshold has no effect on erf"),
    (("explain", "{tmp}", "layercam", "--steps", "9"), "--steps has no effect on layercam"),
    (("explain", "{tmp}", "gradcam", "--threshold", "3"), "threshold must be above 0"),
    (("score", "--predictions", "{tmp}/none.csv"), "none.csv"),
    (("prepare", "chestxray15", "--data-dir", "{tmp}"), "chestxray14"),
    (("prepare", "chestxray14", "--data-dir", "{tmp}", "--source", "{tmp}"), "no .png image anywhere below"),
    (("study", "resolution", "--config", "densenet121", "--workdir", "{tmp}"), "two sizes"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_a_mistake_is_one_error_line_and_exit_code_1(capsys, tmp_path, phantom_data, arguments, message):
    data = [f"--config.data.data_dir={phantom_data}", "--config.data.stored_size=32"]
    arguments = [
        argument for given in arguments for argument in (data if given == "{data}" else [given.format(tmp=tmp_path)])
    ]
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert message in err
    assert err.startswith("cxrjax: ")
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "arguments", [("frobnicate",), ("demo", "--config.seed=1"), ("train",), ("evaluate", "x", "--nonsense")]
)
def test_usage_errors_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert exit_info.value.code == 2


def test_a_checkpoint_of_another_model_is_an_error(capsys, trained, tmp_path, tiny_overrides):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/best", "checkpoints/last", "run.json"):
        (other / name).symlink_to(trained / name)
    config = json.loads((trained / "config.json").read_text())
    config["model"]["options"]["growth_rate"] = 6
    (other / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "evaluate", other)
    assert code == 1
    assert "is of another model" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_error_line_and_the_run_resumes_once_there_is_space(small_disk, tiny_overrides):
    arguments = ["train", "--config", "demo:32", "--workdir", str(small_disk / "run")]
    arguments = [
        sys.executable,
        "-m",
        "cxrjax.cli.main",
        *arguments,
        *(f"--config.{override}" for override in tiny_overrides),
    ]
    (small_disk / "ballast").write_bytes(bytes(200_000))
    failed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    *before, error = failed.stderr.splitlines()
    assert error.startswith("cxrjax: the disk is full")
    assert "rerun the command to resume" in error
    assert all(re.match("1 of 8 devices are used|32 px, epoch [12]/3", line) for line in before), before
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    resumed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "trained 12 steps" in resumed.stdout


@pytest.mark.slow
def test_the_demo_prepares_trains_and_reports(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from cxrjax.config import load_config\n\n\ndef get_config(arg=''):\n"
        "    config = load_config(f'demo:{arg or 32}')\n"
        "    config.data.stored_size = '32'\n    config.study.sizes = (16, 32)\n    config.study.control_size = 32\n"
        "    config.train.epochs = 1\n    config.train.steps_per_epoch = 3\n"
        "    config.evaluate.bootstrap_resamples = 20\n"
        "    config.study.erf_images = 2\n    options = config.model.options\n"
        "    options.growth_rate, options.block_config, options.stem_channels = 4, (1, 1), 4\n    return config\n"
    )
    result = run_demo(tmp_path / "demo", recipe=str(recipe), patients=60)
    assert Path(result["report"]).is_file()
    assert result["seconds"] > 0


def test_json_on_standard_output_has_nothing_beside_it(capsys, trained):
    code, out, _ = run(capsys, "evaluate", trained, "--resamples", 0, "--json", "-")
    assert code == 0
    assert json.loads(out)["split"] == "test"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.sizes=(32, 16)", "in increasing order"),
        ("data.findings=('Mass',)", "study.fine has Nodule"),
        ("study.control=('Hernia',)", "study.control has Hernia"),
        ("study.erf_estimator=prob", "did you mean probe"),
        ("evaluate.confidence_level=95", "evaluate.confidence_level"),
    ],
)
def test_a_study_checks_its_config_before_training(capsys, tmp_path, phantom_data, override, message):
    arguments = ("study", "resolution", "--config", "demo", "--workdir", tmp_path / "study")
    more = [
        f"--config.{override}"
        for override in (f"data.data_dir={phantom_data}", "data.stored_size=32", "study.sizes=(16, 32)", override)
    ]
    code, _, err = run(capsys, *arguments, *more)
    assert code == 1
    assert message in err
    assert not (tmp_path / "study").exists()


def test_help_lists_every_config_key():
    result = subprocess.run(
        [sys.executable, "-m", "cxrjax.cli.main", "train", "--help"], capture_output=True, text=True, check=True
    )
    for key in flatten(default()):
        assert key in result.stdout


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed"),
        ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:18130"),
    ],
)
@pytest.mark.parametrize("distributed", [True, False])
def test_a_failed_collective_is_blamed_on_another_process_only_in_a_distributed_run(
    error, distributed, monkeypatch, capsys
):
    def fail(_):
        raise error

    monkeypatch.setattr("cxrjax.cli.models.run", fail)
    monkeypatch.setattr("cxrjax.distributed.runtime.is_distributed", lambda: distributed)
    code, _, err = run(capsys, "models")
    assert code == 1
    assert f"({error})" in err if distributed else f"{type(error).__name__}: {error}" in err
    assert ("another process stopped or cannot be reached" in err) == distributed
    assert ("internal error" in err) != distributed


def test_an_unreadable_file_is_not_blamed_on_another_process(monkeypatch, capsys):
    def fail(_):
        raise ValueError('UNKNOWN: Failed to open: "/shared/runs/d/0" [os_error_code=40]')

    monkeypatch.setattr("cxrjax.cli.models.run", fail)
    monkeypatch.setattr("cxrjax.distributed.runtime.is_distributed", lambda: True)
    assert "another process" not in run(capsys, "models")[2]
