"""The training loop in one process: its files, when it stops, what it refuses."""

import json
import re
import signal

import jax
import numpy as np
import pytest

from cxrjax.data.splits import save_split
from cxrjax.errors import CxrError
from cxrjax.inference.load_run import load_run
from cxrjax.train import loop
from cxrjax.train.checkpoint import Checkpoints
from cxrjax.train.experiment import Experiment
from cxrjax.train.losses import Loss
from cxrjax.train.monitoring import read_metrics
from cxrjax.train.optimizer import make_optimizer
from cxrjax.train.run_directory import RunDirectory
from cxrjax.train.state import TrainState
from tfds_builders.prepare import prepare


def last_state(config, directory):
    experiment = Experiment.open(config)
    like = TrainState.create(experiment.network, make_optimizer(config.optimizer), 0)
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_last(like)


def test_a_run_writes_metrics_description_split_and_checkpoint(tiny, tmp_path):
    config = tiny()
    progress = loop.train(config, tmp_path)
    assert (progress.step, progress.validated_epochs) == (12, 3)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train_loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["epoch"] for row in rows if "val_loss" in row] == [1, 2, 3]
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert run_json["steps"] == 12
    assert set(run_json["identity"]) == {"data", "split", "microbatch size"}
    assert run_json["images"]["train"] > 20
    assert (tmp_path / "split.csv").exists()
    assert any((tmp_path / "events").iterdir())
    state, saved = last_state(config, tmp_path)
    assert int(state.step) == saved["step"] == 12


def test_a_finished_run_is_unchanged_and_more_epochs_resume_it(tiny, tmp_path):
    config = tiny("optimizer.schedule=constant", "optimizer.warmup_fraction=0")
    loop.train(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert loop.train(config, tmp_path).step == 12
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    longer = tiny("optimizer.schedule=constant", "optimizer.warmup_fraction=0", "train.epochs=4")
    assert loop.train(longer, tmp_path).step == 16


@pytest.mark.parametrize("override", ["optimizer.learning_rate=0.5", "train.epochs=9", "model.options.growth_rate=8"])
def test_another_config_is_refused_with_the_key(tiny, tmp_path, override):
    loop.train(tiny("train.epochs=1", "train.steps_per_epoch=1"), tmp_path)
    with pytest.raises(CxrError, match=override.partition("=")[0]):
        loop.train(tiny("train.epochs=1", "train.steps_per_epoch=1", override), tmp_path)


def test_a_refused_config_does_not_claim_the_directory(tiny, tmp_path):
    with pytest.raises(CxrError, match="did you mean Nodule"):
        loop.train(tiny("data.findings=('Nodul',)"), tmp_path)
    assert not list(tmp_path.iterdir())
    with RunDirectory(tmp_path, tiny("optimizer.learning_rate=0.5"), {}):
        assert (tmp_path / "config.json").exists()  # as if killed before its first checkpoint
    assert loop.train(tiny("train.epochs=1"), tmp_path).step == 4


def test_other_data_are_refused(tiny, tmp_path, tmp_path_factory):
    config = tiny("train.epochs=1", "optimizer.schedule=constant", "optimizer.warmup_fraction=0")
    loop.train(config, tmp_path / "run")
    prepare("cxr_phantom", data_dir=tmp_path / "other", size=32, patients=40)
    with pytest.raises(CxrError, match="was trained with another data"):
        loop.train(tiny("train.epochs=1", "optimizer.schedule=constant", "optimizer.warmup_fraction=0",
                        f"data.data_dir={tmp_path / 'other'}"), tmp_path / "run")  # fmt: skip
    with pytest.raises(CxrError, match="was trained with another data"):
        load_run(tmp_path / "run", tmp_path / "other")


def test_a_run_on_many_devices_opens_on_fewer(tiny, tmp_path):
    config = tiny("train.epochs=1", "mesh.data=4")
    loop.train(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["mesh"]["data"] = 64
    (tmp_path / "config.json").write_text(json.dumps(stored))
    experiment, network, _ = load_run(tmp_path)
    assert experiment.mesh.shape["data"] == 8
    assert network.classes == 7


def test_a_completed_run_keeps_its_description(tiny, tmp_path, capsys):
    loop.train(tiny("train.epochs=1"), tmp_path)
    assert re.search(r"32 px, epoch 1/1, step 4: val_loss [\d.]+, val_auroc [\d.]+, \d+ s\n", capsys.readouterr().err)
    before = (tmp_path / "run.json").read_text()
    loop.train(tiny("train.epochs=1", "mesh.data=2"), tmp_path, profile=(1, 2))
    assert (tmp_path / "run.json").read_text() == before
    stderr = capsys.readouterr().err
    assert f"{tmp_path} has a checkpoint of step 4: nothing is left to train" in stderr
    assert "steps 1 to 2 are already done: nothing is traced" in stderr


def test_a_signal_during_the_last_validation_loses_nothing(tiny, tmp_path, monkeypatch):
    config, validations, original = tiny(), [], loop.predict_logits
    loop.train(config, tmp_path / "unbroken")

    def interrupted(*args, advance, **kwargs):
        validations.append(1)
        if len(validations) == 3:
            signal.raise_signal(signal.SIGTERM)
            advance(1)
        return original(*args, advance=advance, **kwargs)

    monkeypatch.setattr(loop, "predict_logits", interrupted)
    with pytest.raises(loop.InterruptedRunError, match="at step 12 of 12"):
        loop.train(config, tmp_path / "broken")
    assert last_state(config, tmp_path / "broken")[1]["validated_epochs"] == 2
    assert loop.train(config, tmp_path / "broken").validated_epochs == 3
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "broken")]
    for row in (*rows[0], *rows[1]):
        for clock in ("seconds", "data_wait_fraction"):
            row.pop(clock, None)
    assert rows[0] == rows[1]


def test_images_are_never_upscaled(tiny):
    with pytest.raises(CxrError, match=r"data\.image_size = 64 is more than the 32 px"):
        Experiment.open(tiny("data.image_size=64"))


def test_a_saved_split_can_be_reloaded(tiny, tmp_path):
    first = Experiment.open(tiny())
    save_split(first.split, first.records, tmp_path / "split.csv")
    again = Experiment.open(tiny("split.name=files", f"split.files=('{tmp_path / 'split.csv'}',)"))
    for split, rows in first.split.rows.items():
        np.testing.assert_array_equal(again.split.rows[split], rows)


def test_the_best_network_is_saved_before_the_state(tiny, tmp_path, monkeypatch):
    seen = []
    original = Checkpoints.save

    def save(self, step, state, progress):
        original(self, step, state, progress)
        seen.append((tmp_path / "checkpoints" / "best" / str(progress["best_step"])).is_dir())

    monkeypatch.setattr(Checkpoints, "save", save)
    loop.train(tiny(), tmp_path)
    assert seen == [True] * 3


def test_two_runs_in_one_directory_are_refused(tiny, tmp_path):
    with RunDirectory(tmp_path, tiny(), {}), pytest.raises(CxrError, match="another process"):
        loop.train(tiny(), tmp_path)


def test_early_stopping_keeps_the_best_epoch(tiny, tmp_path, monkeypatch):
    values = iter([0.6, 0.8, 0.7, 0.75, 0.9])
    config = tiny("train.epochs=5", "train.early_stopping_patience=2")
    monkeypatch.setattr(loop, "mean_auroc", lambda *_: next(values))
    progress = loop.train(config, tmp_path)
    assert progress.stopped_early
    assert (progress.validated_epochs, progress.best, progress.best_step) == (4, 0.8, 8)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        network = Experiment.open(config).network
        _, about = checkpoints.restore_best({"params": network.params, "stats": network.stats})
    assert about["step"] == 8
    assert loop.train(config, tmp_path).validated_epochs == 4  # stopped early stays stopped


def test_plateau_halves_the_learning_rate_after_three_epochs(tiny, tmp_path, monkeypatch):
    losses = iter([1.0, 0.9, 0.95, 0.9, 0.92, 0.91, 0.91, 0.95])
    monkeypatch.setattr(Loss, "mean", lambda *_: next(losses))
    config = tiny(
        "optimizer.schedule=plateau", "optimizer.warmup_fraction=0", "train.epochs=8", "train.steps_per_epoch=1"
    )
    loop.train(config, tmp_path)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    np.testing.assert_allclose(np.array(rates) / config.optimizer.learning_rate, [1] * 5 + [0.5] * 3)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    config = tiny("optimizer.name=sgd", "optimizer.grad_clip_norm=0", "optimizer.schedule=constant",
                  "train.epochs=50", "optimizer.warmup_fraction=0", "optimizer.learning_rate=1e12",
                  "train.checkpoint_every_steps=1")  # fmt: skip
    named = r"at step \d+, for records p\d+_s\d+_\d+, .*(the last good checkpoint is|no checkpoint was saved)"
    with pytest.raises(CxrError, match=named):
        loop.train(config, tmp_path)
    restored = last_state(config, tmp_path)
    if restored is not None:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored[0].params))


def test_an_undefined_val_auroc_is_refused_before_training(tiny, tmp_path):
    config = tiny("split.name=small", "split.sizes=(20, 1, 5)")
    with pytest.raises(CxrError, match=r"train\.monitor=val_loss"):
        loop.train(config, tmp_path)


def test_an_indivisible_batch_is_refused(tiny):
    with pytest.raises(CxrError, match=r"train\.batch_size = 4"):
        _ = Experiment.open(tiny("train.per_device_batch_size=3")).accumulation_steps
