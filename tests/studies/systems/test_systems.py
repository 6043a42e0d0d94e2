"""Each system's study on tiny arms: its numbers are those of the tables it writes, and it is resumable as a whole."""

import re

import numpy as np
import pytest
from arm_samples import FEW, RECIPE, Run
from sklearn import metrics

from cxrjax.cli.main import main
from cxrjax.findings import SIX_CLASS
from cxrjax.metrics.comparison import compare_findings
from cxrjax.metrics.predictions import Predictions
from cxrjax.studies.study import to_json

FUSION = ("phantom-simple_cnn", "phantom-densenet121", "phantom-efficientnet_b0", "phantom-fusion")
TRANSFER = ("phantom-densenet", "phantom-densenet_augmented", "phantom-resnet_augmented")


@pytest.fixture(scope="module")
def transfer(make):
    return make("transfer", TRANSFER)


def table(run, name, split="test"):
    return Predictions.read(run.directory / "runs" / name / "predictions" / f"{split}.parquet")


def same(rows, others):
    """Rows of numbers, strings and None for NaN."""
    for row, other in zip(rows, to_json(others), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert value == pytest.approx(other[key], nan_ok=True), key


def test_a_study_says_what_its_tables_say(transfer):
    result = transfer.result
    assert transfer.stored == {name: value for name, value in result.items() if name != "report"}
    assert list(result["scores"]) == ["densenet", "densenet_augmented", "resnet_augmented"]
    for name, arm in zip(TRANSFER, result["scores"], strict=True):
        predictions = table(transfer, name)
        for k, row in enumerate(result["scores"][arm]["scores"][:-1]):
            label_mask = predictions.label_mask[:, k]
            expected = metrics.roc_auc_score(predictions.label[label_mask, k], predictions.logit[label_mask, k])
            assert row["auroc"] == pytest.approx(expected)
        right = (predictions.probability >= 0.5) == (predictions.label > 0)
        assert result["accuracy"][arm]["test"] == pytest.approx(right[predictions.label_mask].mean())
    same(
        result["comparison"]["resnet_augmented"]["findings"],
        compare_findings(table(transfer, TRANSFER[2]), table(transfer, TRANSFER[0])),
    )
    validation, test = table(transfer, TRANSFER[1], "validation"), table(transfer, TRANSFER[1])
    for k, row in enumerate(result["operating"]["densenet_augmented"]):
        label_mask = validation.label_mask[:, k]
        fpr, tpr, thresholds = metrics.roc_curve(validation.label[label_mask, k], validation.logit[label_mask, k])
        best = thresholds[np.argmax(tpr - fpr)]
        assert row["threshold"] == pytest.approx(1 / (1 + np.exp(-best)), rel=1e-6)
        called, there, label_mask = test.logit[:, k] >= best, test.label[:, k] > 0, test.label_mask[:, k]
        assert (row["tp"], row["fp"]) == ((called & there & label_mask).sum(), (called & ~there & label_mask).sum())


def test_the_page_has_every_chapter_and_says_what_it_cannot_prove(transfer):
    for heading in ("Accuracy", "Three estimators of the AUC", "Arms compared", "Operating points", "Calibration",
                    "Class activation maps", "Subgroups", "Beside the paper"):  # fmt: skip
        assert f">{heading}</h2>" in transfer.page
    text = re.sub(r"<[^>]+>|\s+", " ", transfer.page)
    assert "Phantom data: not comparable" in text
    assert "drawn by a program" in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "phantom-densenet" not in text
    folder = transfer.directory / "figures"
    for figure in ("auc", "roc", "training", "gradcam", "reliability"):
        assert (folder / f"{figure}.svg").read_bytes()[:5] == b"<?xml"
        assert (folder / f"{figure}.pdf").read_bytes()[:5] == b"%PDF-"
    assert set(transfer.claims()) == {
        "Augmentation makes the DenseNet more accurate", "With augmentation the DenseNet beats the ResNet",
        "With augmentation every AUC of the DenseNet is above one half",
    }  # fmt: skip


def test_a_study_is_not_trained_twice(transfer):
    def times():
        return {file: file.stat().st_mtime_ns for file in transfer.directory.rglob("metrics.jsonl")}

    before = times()
    assert len(before) == 3
    again = transfer.again()
    assert times() == before
    assert again["scores"] == transfer.result["scores"]
    assert again["claims"] == transfer.result["claims"]


def test_stages_of_one_training_are_arms(make):
    stages = [f"train.stages.stage{number}.seed={number}" for number in (1, 2, 3)]
    run = make("fhrnet", ("global", "local", "fusion"), *stages, "train.epochs=1")
    directories = {"global": "stages/stages/1", "local": "stages/stages/2", "fusion": "stages"}
    for name, directory in directories.items():
        predictions = table(run, directory)
        label_mask = predictions.label_mask[:, 0]
        expected = metrics.roc_auc_score(predictions.label[label_mask, 0], predictions.logit[label_mask, 0])
        assert run.result["scores"][name]["scores"][0]["auroc"] == pytest.approx(expected)
    branches = [table(run, directories[name]).probability for name in ("global", "local")]
    fusion = table(run, directories["fusion"]).logit
    both = np.log(branches[0]) + np.log(branches[1])
    ranks = [np.argsort(np.argsort(values[:, 0])) for values in (both, fusion)]
    assert run.result["consistency"]["Mass"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert {"What the fusion gains", "Global-local consistency"} <= set(re.findall(r">([^<>]+)</h2>", run.page))
    assert "+19.3" in run.page, "the paper's gain over Wang for Mass, which its text prints"
    assert len(run.claims()) == 2


def test_attention_fusion_counts_parameters_and_passes(make):
    run = make(
        "attention_fusion", [f"phantom-{arm}" for arm in ("simple_cnn", "densenet121", "efficientnet_b0", "fusion")]
    )
    uncertainty = run.result["uncertainty"]
    assert uncertainty["passes"] == 4
    assert uncertainty["images"] == len(table(run, "phantom-fusion"))
    assert 0 < uncertainty["mean image uncertainty"] < 0.5
    assert (run.directory / "figures" / "passes.svg").is_file()
    assert "another network" in run.page
    assert "10,638,528" in run.page
    assert len(run.claims()) == 3, "whether the counts agree is no question for other networks"


def test_six_classes_and_where_they_come_from(six_classes, tmp_path):
    overrides = [
        f"data.data_dir={six_classes}", "data.dataset=six_class", "data.stored_size=32", "data.num_threads=1",
        "split.name=official", "train.batch_size=4", "train.steps_per_epoch=2", "train.epochs=1", "mesh.data=1",
        "loss.name=cross_entropy", "model.name=sequential_cnn",
        "model.options.image_size=32", "model.options.widths=(4,4,4)",
    ]  # fmt: skip
    run = Run("sequential_cnn", ("phantom-version3", "phantom-version1"), tmp_path, overrides)
    predictions = table(run, "phantom-version3")
    np.testing.assert_allclose(predictions.probability.sum(1), 1, atol=1e-6)
    actual, predicted = predictions.label.argmax(1), predictions.logit.argmax(1)
    expected = metrics.confusion_matrix(actual, predicted, labels=range(6))
    assert run.result["confusion"] == {"classes": list(SIX_CLASS), "rows actual": expected.tolist()}
    of_test = run.result["accuracy"]["version3"]["test"]
    assert of_test["accuracy"] == pytest.approx((actual == predicted).mean())
    assert of_test["loss"] == pytest.approx(metrics.log_loss(actual, predictions.probability))
    source = run.result["source"]
    assert source["Border, outer 5 % of the pixels"] > 0.95
    # One class of each source: Covid-19 right, and of the five others the first.
    assert source["accuracy from source"] == pytest.approx((12 + 6) / 42)
    assert run.claims()["An image's source cannot be told from its border"]["supported"] == "no"
    assert "actual classes, columns predicted" in run.page
    assert "predicted classes, columns actual" in run.page
    assert "0.891" in run.page, "the paper's mean balanced accuracy, computed from its table"


@pytest.mark.parametrize(
    ("system", "names", "override", "message"),
    [
        ("transfer", TRANSFER[:2], "", "also needs resnet_augmented"),
        ("transfer", (TRANSFER[0],) * 2, "", "two arms or more, each once"),
        ("fhrnet", ("global", "local", "fusion"), "", "but train.stages is empty"),
        ("sequential_cnn", ("version3", "version1"), "", "cxr_phantom may show several findings"),
        ("transfer", TRANSFER, "study.seeds=(0, 1)", "set seed instead"),
        ("transfer", TRANSFER, "model.init_from=nowhere", "nowhere/card.json is missing"),
    ],
)
def test_mistakes_are_found_before_training(capsys, tmp_path, tiny_overrides, system, names, override, message):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(arms=names, more=""))
    arguments = ["study", system, "--config", str(recipe), "--workdir", str(tmp_path / "study")]
    overrides = [*tiny_overrides, *FEW, *([override] if override else [])]
    assert main([*arguments, *(f"--config.{override}" for override in overrides)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study").exists()


def test_arms_tested_on_other_images_are_refused(capsys, tmp_path, tiny_overrides):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(arms=TRANSFER, more="    config.split.seed = ARMS.index(arm)\n"))
    arguments = ["study", "transfer", "--config", str(recipe), "--workdir", str(tmp_path / "study")]
    assert main([*arguments, *(f"--config.{override}" for override in [*tiny_overrides, *FEW])]) == 1
    assert "differ in the images, findings or labels of the validation split" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "study").exists()
