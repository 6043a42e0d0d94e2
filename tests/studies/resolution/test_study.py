"""The study of resolution on tiny networks: its numbers are those of its tables, in folds, in jobs and after a kill."""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from sklearn import metrics

from cxrjax.cli.main import main
from cxrjax.config import load_config
from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions
from cxrjax.studies.resolution import plan
from cxrjax.train.experiment import Experiment

RECIPE = """
from cxrjax.config import load_config


def get_config(arg=""):
    config = load_config(f"demo:{arg or 32}")
    config.study.sizes, config.study.folds, config.study.paper = (16, 32), (0, 2), "resolution"
    config.study.fine = config.study.coarse = config.study.control = ()
    config.study.erf_images, config.evaluate.bootstrap_resamples = 2, 30
    return config
"""
MORE = ("split.name=folds", "split.folds=3", "train.monitor=val_loss", "data.findings=('Cardiomegaly','Mass')")
RUNS = ("16px-fold0", "32px-fold0", "16px-fold2", "32px-fold2")


@pytest.fixture(scope="module")
def study_command(tmp_path_factory, tiny_overrides):
    """`study_command(workdir, *more)`: arguments of `main`."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.py"
    recipe.write_text(RECIPE)
    keys = [f"--config.{override}" for override in (*tiny_overrides, *MORE)]

    def command(workdir, *more):
        return ["study", "resolution", "--config", str(recipe), "--workdir", str(workdir), *more, *keys]

    return command


@pytest.fixture(scope="module")
def whole(study_command, tmp_path_factory):
    """The directory of a study that was never interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    assert main(study_command(directory)) == 0
    return directory


def stored(directory):
    """Return the results of a study, without times."""
    result = json.loads((directory / "study.json").read_text())
    del result["provenance"]["training, seconds"]
    return result


def table(directory, run, split="test"):
    return Predictions.read(directory / "runs" / run / "predictions" / f"{split}.parquet")


def auroc(predictions, k):
    label_mask = predictions.label_mask[:, k]
    return metrics.roc_auc_score(predictions.label[label_mask, k], predictions.logit[label_mask, k])


def test_scores_are_means_over_folds_of_disjoint_patients(whole):
    result = stored(whole)
    for size in ("16", "32"):
        folds = [table(whole, f"{size}px-fold{fold}") for fold in (0, 2)]
        assert not set(folds[0].patient) & set(folds[1].patient)
        for k, row in enumerate(result["scores"][f"{size} px"]["scores"][:-1]):
            by_fold = [auroc(predictions, k) for predictions in folds]
            assert row["auroc"] == pytest.approx(np.mean(by_fold))
            assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
            assert [group["auroc"][f"{size} px"][row["finding"]] for group in result["groups"]] == pytest.approx(
                by_fold
            )
        assert result["scores"][f"{size} px"]["images"] == sum(map(len, folds))
    assert [(group["seed"], group["fold"]) for group in result["groups"]] == [(0, 0), (0, 2)]


def test_each_fold_has_its_own_ensembles_fitted_on_its_validation_images(whole):
    from cxrjax.metrics.ensemble import combine, fit_logistic, fit_weights

    result = stored(whole)
    for group in result["groups"]:
        fold = group["fold"]
        validation, test = (
            [table(whole, f"{size}px-fold{fold}", split) for size in (16, 32)] for split in ("validation", "test")
        )
        fitted_on = np.stack([member.logit for member in validation]), validation[0].label, validation[0].label_mask
        weights, regressions = fit_weights(*fitted_on).weights, fit_logistic(*fitted_on)
        for k, (finding, by_size) in enumerate(group["weights"].items()):
            assert list(by_size.values()) == pytest.approx(weights[k].tolist())
            for name, learnt in (("stacked", weights), ("voted", None), ("logistic", regressions)):
                combined = combine(test, learnt)
                assert group["auroc"][name][finding] == pytest.approx(auroc(combined, k))
                written = Predictions.read(whole / "predictions" / f"{name}-fold{fold}.parquet")
                np.testing.assert_array_equal(written.logit, combined.logit)
    for finding, by_size in result["weights"].items():
        for size, weight in by_size.items():
            assert weight == pytest.approx(np.mean([group["weights"][finding][size] for group in result["groups"]]))


def test_the_page_has_the_folds_the_paper_and_what_it_cannot_prove(whole):
    page = (whole / "report" / "index.html").read_text()
    text = re.sub(r"<[^>]+>|\s+", " ", page)
    for phrase in ("AUROC over 2 folds, mean ± standard deviation", "stacked: AUROC in each fold", "Fold 2",
                   "Phantom data: not comparable", "0.816 ± 0.004", "drawn by a program", "are from fold 0",
                   "Cardiomegaly falls with image size", "The stacked ensemble is the best on every finding",
                   "Sizes of the paper that were not run here: 256 px, 512 px, 1024 px and 2048 px",
                   "The scatter plot of original image sizes is missing", "corrected t-test over folds"):  # fmt: skip
        assert phrase in text, phrase
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "Pneumothorax rises" not in text, "these findings do not include it"
    values = np.array([group["auroc"]["stacked"]["Mass"] for group in stored(whole)["groups"]])
    assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in text
    for figure in ("auc", "weights", "roc", "training", "erf", "gradcam"):
        assert (whole / "figures" / f"{figure}.svg").read_bytes()[:5] == b"<?xml"
        assert (whole / "figures" / f"{figure}.pdf").read_bytes()[:5] == b"%PDF-"


def test_nothing_is_done_twice_unless_the_checkpoint_changed(whole, study_command):
    def times():
        names = ("metrics.jsonl", "validation.parquet", "test.parquet", "receptive-field.npz")
        files = (file for name in names for file in (whole / "runs").rglob(name))
        return {file: file.stat().st_mtime_ns for file in files}

    before, first = times(), stored(whole)
    assert len(before) == 4 * len(RUNS)
    made = whole / "runs" / RUNS[1] / "predictions" / "made-of.json"
    mark = json.loads(made.read_text())
    made.write_text(json.dumps(mark | {"step": -1}))
    assert main(study_command(whole)) == 0
    after = times()
    redone = {file.name for file in after if after[file] != before[file]}
    assert redone == {"validation.parquet", "test.parquet"}
    assert {file.parents[1].name for file in after if after[file] != before[file]} == {RUNS[1]}
    assert json.loads(made.read_text()) == mark
    assert stored(whole) == first


def test_a_run_that_another_process_trains_is_named_and_nothing_is_trained(study_command, tmp_path, capsys):
    busy = tmp_path / "runs" / RUNS[3]
    busy.mkdir(parents=True)
    with (busy / ".lock").open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(study_command(tmp_path)) == 1
        error = " ".join(capsys.readouterr().err.split())
        assert f"other processes are training {RUNS[3]} (process 4711)" in error
        assert "rerun this command when they have finished" in error
        assert [run.name for run in (tmp_path / "runs").iterdir()] == [RUNS[3]]
        assert main(study_command(tmp_path, "--only", RUNS[3])) == 1
        assert "another process (id 4711) is training" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--only", "16px-fold1"),
            "has no run 16px-fold1; its runs are 16px-fold0, 32px-fold0, 16px-fold2, 32px-fold2",
        ),
        (("--config.study.folds=(0, 3)",), "give folds from 0 to 2, each once"),
        (("--config.study.folds=(1, 1)",), "give folds from 0 to 2, each once"),
        (("--config.split.name=random",), "set split.name=folds"),
        (("--config.study.seeds=()",), "one training seed or more"),
        (("--config.study.sizes=(32, 16)",), "in increasing order"),
        (("--config.study.sizes=(16,)",), "two sizes or more"),
        (("--config.data.image_size=16",), "in the run at 32 px: set study.sizes instead"),
        (("--config.study.paper=fhrnet",), "must be one of"),
        (("--config.loss.name=cross_entropy",), "set loss.name=bce"),
        (("--config.mesh.data=3",), "set mesh.data to 2"),
        (("--config.train.per_device_batch_size=3",), "set train.per_device_batch_size to a divisor of 4"),
        (("--config.study.sizes=(16, 64)",), "more than the 32 px that are stored"),
    ],
)
def test_mistakes_are_found_before_training(study_command, tmp_path, capsys, more, message):
    command = study_command(tmp_path / "study")
    assert main([*command, *more]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study").exists()


def test_only_belongs_to_the_resolution_study(capsys, tmp_path):
    assert main(["study", "transfer", "--workdir", str(tmp_path), "--only", "densenet"]) == 1
    assert "--only is for the resolution study" in " ".join(capsys.readouterr().err.split())


def test_rates_and_batches_are_the_papers_or_scale_linearly(shared):
    table1 = json.loads((shared / "papers" / "tables.json").read_text())["resolution"]["table1"]
    for spec in ("resolution", "resolution:table", "resolution:512,table"):
        runs = plan(spec, [], load_config(spec))
        assert len(runs) == 4 * 5
        for size, row in table1.items():
            for fold in range(5):
                config = runs[f"{size}px-fold{fold}"].config
                assert (config.optimizer.learning_rate, config.train.batch_size) == (row["learning_rate"], row["batch"])
                assert (config.split.fold, config.data.image_size) == (fold, int(size))
    linear = plan("resolution:linear", [], load_config("resolution:linear"))
    rates = {size: linear[f"{size}px-fold0"].config.optimizer.learning_rate for size in table1}
    assert {size: linear[f"{size}px-fold0"].config.train.batch_size for size in table1} == {
        size: row["batch"] for size, row in table1.items()
    }
    assert rates == {"256": 5e-4, "512": 2.5e-4, "1024": 5e-4 * 168 / 512, "2048": 5e-4 * 42 / 512}
    assert table1["2048"]["learning_rate"] == pytest.approx(2 * rates["2048"], rel=2e-4), "linear for a batch of 84"


def test_the_phantom_is_the_same_study_on_small_networks():
    runs = plan("resolution:phantom", [], load_config("resolution:phantom"))
    assert list(runs)[:4] == ["32px-fold0", "64px-fold0", "128px-fold0", "32px-fold1"]
    assert len(runs) == 15
    assert {run.config.data.dataset for run in runs.values()} == {"cxr_phantom"}


@pytest.mark.parametrize("argument", ["300", "lineer", "table,linear", "256,512", "1024,phantom"])
def test_unknown_arguments_of_the_recipe_are_refused(argument):
    with pytest.raises(CxrError, match=f"invalid argument resolution:{argument}: "):
        load_config(f"resolution:{argument}")


def test_the_effective_batch_is_the_tables_on_any_number_of_devices(tiny):
    assert len(jax.devices()) == 8
    for size, (batch, fits) in {256: (512, 8), 512: (256, 8), 1024: (168, 8), 2048: (42, 7)}.items():
        assert load_config(f"resolution:{size}").train.batch_size == batch
        for devices in range(1, 9):
            config = tiny(f"train.batch_size={batch}", f"mesh.data={devices}")
            experiment = Experiment.open(config)
            if batch % devices:
                largest = max(n for n in range(1, devices + 1) if batch % n == 0)
                with pytest.raises(CxrError, match=rf"train\.batch_size = {batch} .*set mesh\.data to {largest}, "):
                    _ = experiment.accumulation_steps
                continue
            assert experiment.accumulation_steps == 1
            for per_device in (1, batch // devices):
                with config.unlocked():
                    config.train.per_device_batch_size = per_device
                assert Experiment.open(config).accumulation_steps * devices * per_device == batch
        assert max(n for n in range(1, 9) if batch % n == 0) == fits


def test_a_batch_size_that_is_no_multiple_of_the_microbatches_is_refused_with_the_fix(tiny):
    config = tiny("train.batch_size=42", "mesh.data=2", "train.per_device_batch_size=4")
    with pytest.raises(CxrError, match=r"2 devices x 4 images\): set train\.per_device_batch_size to a divisor of 21"):
        _ = Experiment.open(config).accumulation_steps


def started(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "cxrjax.cli.main", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def checkpoints(directory, run):
    """Content and time of everything that a run's checkpoints are made of."""
    files = sorted(file for file in (directory / "runs" / run / "checkpoints").rglob("*") if file.is_file())
    assert files
    return {file: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.slow
def test_a_killed_study_resumes(whole, study_command, tmp_path):
    process = started(study_command(tmp_path))
    under_way = tmp_path / "runs" / RUNS[1] / "checkpoints" / "last"
    deadline = time.monotonic() + 200
    while not any(under_way.glob("[0-9]*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == sorted(RUNS[:2])
    assert json.loads((tmp_path / "runs" / RUNS[1] / "run.json").read_text())["steps"] == 0, "it is not at its end"
    before = checkpoints(tmp_path, RUNS[0])
    finished(started(study_command(tmp_path)))
    assert checkpoints(tmp_path, RUNS[0]) == before
    assert stored(tmp_path) == stored(whole)


@pytest.mark.slow
def test_jobs_of_single_runs_side_by_side_make_the_same_study(whole, study_command, tmp_path):
    jobs = [started(study_command(tmp_path, "--only", run)) for run in RUNS[1:3]]
    for job in jobs:
        finished(job)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent == tmp_path / "runs") == sorted(RUNS[1:3])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "a job writes in its own directory only"
    before = {run: checkpoints(tmp_path, run) for run in RUNS[1:3]}
    predicted = {run: (tmp_path / "runs" / run / "predictions" / "test.parquet").stat().st_mtime_ns for run in before}
    finished(started(study_command(tmp_path)))
    for run, files in before.items():
        assert checkpoints(tmp_path, run) == files
        assert (tmp_path / "runs" / run / "predictions" / "test.parquet").stat().st_mtime_ns == predicted[run]
    assert stored(tmp_path) == stored(whole)
