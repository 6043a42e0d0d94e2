"""Several data sets in one run: from the command line, with its weights, masks, ids and refusals."""

import csv
import itertools
import json

import cv2
import numpy as np
import pytest

from cxrjax.cli.main import main
from cxrjax.config import flatten, load_config, read_config
from cxrjax.data.pipeline import training_batches
from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions
from cxrjax.train.experiment import Experiment
from cxrjax.train.run_directory import RunDirectory
from tfds_builders.prepare import prepare

FINDINGS = ("Cardiomegaly", "Effusion", "Fracture")


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_data):
    """The phantom, which draws Cardiomegaly and Pleural Effusion, beside a table of Effusion and Fracture."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "cxr_phantom").symlink_to(phantom_data / "cxr_phantom")
    rng, source = np.random.default_rng(0), tmp_path_factory.mktemp("source")
    with (source / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "who", "Effusion", "Fracture"))
        for n in range(32):
            cv2.imwrite(str(source / f"{n}.png"), rng.integers(0, 256, (40, 40), np.uint8))
            writer.writerow((f"{n}.png", f"p{n // 2}", int(n % 3 == 0), ("1", "0", "-1", "")[n % 4]))
    prepare(
        "table", source=source, data_dir=folder, size=32, name="own", table=source / "table.csv", image_column="path",
        label_columns=("Effusion", "Fracture"), patient_column="who",
    )  # fmt: skip
    return folder


@pytest.fixture
def mixed(tiny, data):
    """`mixed(*overrides) -> config` of a run on both."""
    return lambda *more: tiny(
        f"data.data_dir={data}", f"data.findings={FINDINGS}", "data.mixture.own.split.fractions=0.5,0.2,0.3", *more
    )


def arguments(config):
    recipe = flatten(load_config("demo:32"))
    return [f"--config.{key}={value}" for key, value in flatten(config).items() if value != recipe.get(key)]


def test_train_and_evaluate_from_the_command_line(mixed, data, tmp_path):
    config = mixed(
        "data.weight=0.75", "data.mixture.own.weight=0.25", "data.sampling=balanced", "train.epochs=1",
        "train.monitor=val_loss", "evaluate.bootstrap_resamples=20",
    )  # fmt: skip
    run = tmp_path / "run"
    assert main(["train", "--config", "demo:32", "--workdir", str(run), *arguments(config)]) == 0
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert main(["evaluate", str(run), "--split", "test@own"]) == 0

    about = json.loads((run / "run.json").read_text())
    experiment = Experiment.open(config)
    assert about["identity"]["data"] == experiment.records.fingerprint
    assert about["images"] == {name: len(examples) for name, examples in experiment.examples_by_split.items()}
    listed = [line.split(",")[0] for line in (run / "split.csv").read_text().splitlines()[2:]]
    assert {name.split("/")[0] for name in listed} == {"cxr_phantom", "own"}

    test = Predictions.read(run / "predictions" / "test.parquet")
    ours = np.char.startswith(test.id, "own/")
    assert 0 < ours.sum() < len(test)
    assert not test.label_mask[ours, 0].any()  # nobody said anything of the heart there
    assert test.label_mask[~ours, 0].any()
    assert not test.label_mask[~ours, 2].any()
    second = Predictions.read(run / "predictions" / "test@own.parquet")
    assert second.id.tolist() == test.id[ours].tolist()
    np.testing.assert_allclose(second.logit, test.logit[ours], atol=1e-5)
    records = experiment.records
    row = {name: k for k, name in enumerate(records.id.tolist())}
    rows = [row[name] for name in test.id]
    assert test.patient.tolist() == records.patient[rows].tolist()
    np.testing.assert_array_equal(
        test.label_mask[:, 1], records.labels[rows, 1] != -1
    )  # the phantom hedges now and then
    np.testing.assert_array_equal(test.label[:, 1] == 1, records.labels[rows, 1] == 1)


def test_training_draws_by_weight(mixed):
    for weights, share in (((3, 1), 0.25), ((1, 1), 0.5)):
        experiment = Experiment.open(mixed(f"data.weight={weights[0]}", f"data.mixture.own.weight={weights[1]}"))
        batches = training_batches(
            experiment.examples("train"), size=32, batch_size=8, augment=experiment.augment, seed=0, threads=0,
            sampling=experiment.sampling,
        )  # fmt: skip
        rows = np.stack([batch.record for batch in itertools.islice(batches, 40)])
        batches.close()
        origin = experiment.records.origin(rows)  # pyright: ignore
        np.testing.assert_array_equal(origin.sum(1), 8 * share)


def test_without_weights_every_record_comes_once_an_epoch(mixed):
    experiment = Experiment.open(mixed())
    train = experiment.examples("train")
    [whole] = experiment.sampling.strata(train.label, train.label_mask, train.dataset_index)
    np.testing.assert_array_equal(whole.index, np.arange(len(train)))
    assert len(train) == sum(len(source.rows_by_split["train"]) for source in experiment.sources)


def test_each_data_set_has_its_own_policy_and_views(mixed):
    rules = ("data.mixture.own.labels.uncertain=ones", "data.mixture.own.labels.not_mentioned=unknown")
    one = Experiment.open(mixed("labels.uncertain=ignore", "labels.not_mentioned=negative"))
    other = Experiment.open(mixed("labels.uncertain=ignore", "labels.not_mentioned=negative", *rules))
    rows = one.examples("train").row
    np.testing.assert_array_equal(rows, other.examples("train").row)
    fracture = one.records.labels[rows, 2]
    ours = one.records.origin(rows) == 1  # pyright: ignore
    assert set(fracture[ours].tolist()) == {1, 0, -1, -2}
    np.testing.assert_array_equal(one.examples("train").label_mask[:, 2], ours & (fracture != -1))
    np.testing.assert_array_equal(other.examples("train").label_mask[:, 2], ours & (fracture != -2))
    np.testing.assert_array_equal(other.examples("train").label[:, 2], ours & (abs(fracture) == 1))
    excepted = Experiment.open(
        mixed("labels.per_finding={'Fracture': {'uncertain': 'smooth', 'smooth_range': (0.2, 0.4)}}")
    )
    smoothed = excepted.examples("train").label[ours & (fracture == -1), 2]
    assert ((smoothed >= 0.2) & (smoothed <= 0.4)).all()
    assert len(set(smoothed.tolist())) == len(smoothed) > 1
    validation = excepted.examples("validation")
    uncertain = excepted.records.labels[validation.row, 2] == -1
    assert not validation.label_mask[uncertain, 2].any()  # a drawn target is not scored


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mixture={'absent': {}}"], r"absent/32 is not prepared .* cxr_phantom/32, own/32"),
        (["data.mixture.own.data.data_dir=elsewhere"], "unknown config key data.mixture.own.data.data_dir"),
        (["data.mixture.own.labels.uncertain=one"], "uncertain is 'one', and must be one of .*did you mean ones"),
        (["data.mixture={'cxr_phantom': {}}"], "cxr_phantom is in the mixture twice"),
        (["data.weight=1"], "own has no weight to share"),
        (["data.mixture.own.weight=-1"], "must be at least 0"),
        (["data.mixture={}", "data.findings=('Mass',)", "data.weight=0.5"], "data.weight is for a mixture"),
        (["data.findings=('Effusions',)"], "unknown finding 'Effusions': did you mean"),
        (["data.mixture.own.data.views=PA"], "no image of own has view PA"),
        (["labels.per_finding.Fracture.uncertain=maybe"], "uncertain is 'maybe', and must be one of"),
        (["labels.per_finding.Fractur.uncertain=ones"], "unknown finding 'Fractur'"),
        (["labels.per_finding.Fracture.sometimes=ones"], "unknown config key labels.per_finding.Fracture.sometimes"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(mixed, overrides, message):
    with pytest.raises(CxrError, match=message) as caught:
        _ = Experiment.open(mixed(*overrides)).identity
    assert "\n" not in str(caught.value)


def test_a_part_of_a_data_set_that_is_not_there(mixed):
    experiment = Experiment.open(mixed())
    with pytest.raises(CxrError, match="this run has no data set nih; choose from cxr_phantom, own"):
        experiment.examples("test@nih")
    assert len(experiment.examples("test@cxr_phantom")) + len(experiment.examples("test@own")) == len(
        experiment.examples("test")
    )


def test_files_of_a_split_are_stored_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo:32", ["split.files=a,/b", "data.mixture.own.split.files=c"])
    RunDirectory(tmp_path / "run", config, {}).close()
    stored = read_config(tmp_path / "run" / "config.json")
    assert stored.split.files == (f"{tmp_path}/a", "/b")
    assert stored.data.mixture.own.split.files == (f"{tmp_path}/c",)
