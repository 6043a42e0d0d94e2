"""Several data sets in one run: from the command line, with its weights, masks, ids and refusals."""

import csv
import itertools
import json

import cv2
import numpy as np
import pytest

from cxrjax.cli.main import main
from cxrjax.config import flatten, load
from cxrjax.data.mixture import with_absolute_files
from cxrjax.data.pipeline import training_batches
from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions
from cxrjax.train.experiment import Experiment
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
        f"data.dir={data}", f"data.findings={FINDINGS}", "data.mix=own; split.fractions=(0.5, 0.2, 0.3)", *more
    )


def words(config):
    label_mask = flatten(load("demo:32"))
    return [f"--config.{key}={value}" for key, value in flatten(config).items() if value != label_mask.get(key)]


def test_train_and_evaluate_from_the_command_line(mixed, data, tmp_path):
    config = mixed(
        "data.weights=(0.75, 0.25)", "data.sampling=balanced", "train.epochs=1", "train.watch=val_loss",
        "evaluate.resamples=20",
    )  # fmt: skip
    run = tmp_path / "run"
    assert main(["train", "--config", "demo:32", "--workdir", str(run), *words(config)]) == 0
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert main(["evaluate", str(run), "--split", "test@own"]) == 0

    about = json.loads((run / "run.json").read_text())
    experiment = Experiment.open(config)
    assert about["identity"]["data"] == experiment.records.fingerprint
    assert about["images"] == {name: len(part) for name, part in experiment.examples_by_split.items()}
    listed = [line.split(",")[0] for line in (run / "split.csv").read_text().splitlines()[2:]]
    assert {name.split("/")[0] for name in listed} == {"cxr_phantom", "own"}

    test = Predictions.read(run / "predictions" / "test.parquet")
    ours = np.char.startswith(test.id, "own/")
    assert 0 < ours.sum() < len(test)
    assert not test.label_mask[ours, 0].any()  # nobody said anything of the heart there
    assert test.label_mask[~ours, 0].any()
    assert not test.label_mask[~ours, 2].any()
    alone = Predictions.read(run / "predictions" / "test@own.parquet")
    assert alone.id.tolist() == test.id[ours].tolist()
    np.testing.assert_allclose(alone.logit, test.logit[ours], atol=1e-5)
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
        experiment = Experiment.open(mixed(f"data.weights={weights}"))
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
    assert len(train) == sum(len(source.parts["train"]) for source in experiment.sources)


def test_each_data_set_has_its_own_policy_and_views(mixed):
    own = "data.mix=own; split.fractions=(0.5, 0.2, 0.3); data.uncertain=ones; data.not_mentioned=unknown"
    one = Experiment.open(mixed("data.uncertain=ignore", "data.not_mentioned=negative"))
    other = Experiment.open(mixed("data.uncertain=ignore", "data.not_mentioned=negative", own))
    rows = one.examples("train").row
    np.testing.assert_array_equal(rows, other.examples("train").row)
    fracture = one.records.labels[rows, 2]
    ours = one.records.origin(rows) == 1  # pyright: ignore
    assert set(fracture[ours].tolist()) == {1, 0, -1, -2}
    np.testing.assert_array_equal(one.examples("train").label_mask[:, 2], ours & (fracture != -1))
    np.testing.assert_array_equal(other.examples("train").label_mask[:, 2], ours & (fracture != -2))
    np.testing.assert_array_equal(other.examples("train").label[:, 2], ours & (abs(fracture) == 1))
    excepted = Experiment.open(mixed("data.exceptions=Fracture; uncertain=smooth; interval=(0.2, 0.4)"))
    smoothed = excepted.examples("train").label[ours & (fracture == -1), 2]
    assert ((smoothed >= 0.2) & (smoothed <= 0.4)).all()
    assert len(set(smoothed.tolist())) == len(smoothed) > 1
    validation = excepted.examples("validation")
    uncertain = excepted.records.labels[validation.row, 2] == -1
    assert not validation.label_mask[uncertain, 2].any()  # a drawn target is not scored


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mix=absent"], r"absent/32 is not prepared .* cxr_phantom/32, own/32"),
        (["data.mix=own; data.dir=elsewhere"], "'data.dir=elsewhere' of own is not understood; an entry may set"),
        (["data.mix=split.name=random; own"], "must begin with a name"),
        (["data.mix=own; data.uncertain=one"], "data.uncertain is 'one', and must be one of .*did you mean ones"),
        (["data.mix=cxr_phantom"], "cxr_phantom is named twice"),
        (["data.weights=(1, 1, 1)"], "3 numbers for 2 data sets"),
        (["data.weights=(1, 0)"], "must all be above 0"),
        (["data.mix=()", "data.findings=('Mass',)", "data.weights=(0.5, 0.5)"], "2 numbers for 1 data sets"),
        (["data.findings=('Effusions',)"], "unknown finding 'Effusions': did you mean"),
        (["data.mix=own; data.views=('PA',)"], "no image of own has view PA"),
        (["data.exceptions=Fracture; uncertain=maybe"], "uncertain='maybe' is not one of"),
        (["data.exceptions=Fractur; uncertain=ones"], "unknown finding 'Fractur'"),
        (["data.exceptions=Fracture; sometimes=ones"], "'sometimes=ones' of Fracture is not understood"),
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
    assert len(experiment.examples("test@cxr_phantom")) + len(experiment.examples("test@own")) == len(experiment.examples("test"))


def test_files_of_a_split_are_found_from_anywhere(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_absolute_files(("own; split.name=files; split.files=a.csv",)) == (
        f"own; split.name=files; split.files=('{tmp_path}/a.csv',)",
    )
    several = with_absolute_files(("own; split.files=('a', '/b', 'c')",))
    assert several == (f"own; split.files=('{tmp_path}/a', '/b', '{tmp_path}/c')",)
    assert with_absolute_files(several) == several
