"""Evaluate one trained run: predictions, scores, figures and a report page."""

import json
from pathlib import Path
from typing import Any

from cxrjax.config import validate
from cxrjax.console import print_text, stdout
from cxrjax.distributed.runtime import check_consistent, on_main_process
from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.inference.calibration_file import fit_calibration
from cxrjax.inference.load_run import load_run, predict
from cxrjax.metrics.auc import roc_curve
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import Scores, score
from cxrjax.report import style
from cxrjax.report.content import Curve, RunReport
from cxrjax.report.page import run_figures, write_page
from cxrjax.report.tables import terminal_scores
from cxrjax.train.experiment import Experiment
from cxrjax.train.monitoring import read_metrics


def evaluate_run(
    directory: Path,
    *,
    split: str = "test",
    data_dir: Path | None = None,
    resamples: int | None = None,
    batch_size: int | None = None,
    mesh: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Predict a split with the best checkpoint, score the predictions and write a report.

    Writes `predictions/SPLIT.parquet`, `predictions/SPLIT.json` (the scores), `figures/SPLIT-*.svg` and
    `report/index.html` in the run directory. Also fits the calibration that `predict` uses, on the validation split.
    Several processes predict together; the main process scores and writes.

    Args:
      directory: run directory.
      split: split to predict.
      data_dir: where the prepared data are now; default: where they were in training.
      resamples: bootstrap resamples; default: the config's.
      batch_size: images per batch; default: the config's.
      mesh: see `load_run`.

    Returns:
      The scores, ready for JSON; None in all processes but the main one.
    """
    experiment, network, checkpoint = load_run(directory, data_dir, mesh)
    if batch_size is not None:
        experiment.config.evaluate.batch_size = batch_size
        validate(experiment.config)
    mesh_shape, batch_size = dict(experiment.mesh.shape), experiment.config.evaluate.batch_size
    settings = [checkpoint, experiment.fingerprints, split, mesh_shape, batch_size]
    check_consistent("run, data, split, mesh and batch size", settings)
    predictions = predict(experiment, network, split)
    validation = predictions if split == "validation" else predict(experiment, network, "validation")
    calibration = fit_calibration(experiment, network, checkpoint, validation)

    def write() -> dict[str, Any]:
        calibration.write(directory)
        return _write_scores(directory, experiment, checkpoint, split, predictions, resamples)

    return on_main_process(write)


def _write_scores(
    directory: Path,
    experiment: Experiment,
    checkpoint: dict[str, Any],
    split: str,
    predictions: Predictions,
    resamples: int | None,
) -> dict[str, Any]:
    """Score predictions; write table, scores, figures and page; return the scores."""
    config = experiment.config
    predictions.write(directory / "predictions" / f"{split}.parquet")
    draws: int = config.evaluate.bootstrap_resamples if resamples is None else resamples
    scores = score(predictions, resamples=draws, seed=config.seed, confidence=config.evaluate.confidence_level)
    result = {"split": split, "checkpoint": checkpoint, **scores.as_dict()}
    write_json(directory / "predictions" / f"{split}.json", result)

    report = RunReport(
        title=f"{config.title or config.model.name}, {config.data.image_size} px, {split} split",
        findings=predictions.findings,
        scores=scores.rows(),
        interval=describe_intervals(scores),
        curves=roc_curves(predictions),
        training=read_epochs(directory),
        provenance={**read_provenance(directory), "checkpoint": checkpoint},
    )
    for name, figure in run_figures(report).items():
        style.save(figure, directory / "figures" / f"{split}-{name}.svg")
    page = write_page(report, directory / "report" / "index.html")
    stdout.print(terminal_scores({split: scores.rows()}, predictions.findings))
    print_text(f"report: {page}")
    return result


def describe_intervals(scores: Scores) -> str:
    """Say how the intervals of scores were computed; empty where there are none."""
    if not scores.resamples:
        return ""
    sampling = f"{scores.patients:,} patients, {scores.resamples:,} resamples"
    return f"{scores.confidence:.0%} percentile bootstrap over {sampling}"


def roc_curves(predictions: Predictions) -> dict[str, Curve]:
    """Return the ROC curve of each finding that has both classes."""
    curves = {}
    for k, finding in enumerate(predictions.findings):
        curve = roc_curve(predictions.logit[:, k], predictions.label[:, k], predictions.label_mask[:, k])
        if curve is not None:
            curves[finding] = Curve(curve.fpr, curve.tpr)
    return curves


def read_epochs(directory: Path) -> list[dict[str, Any]]:
    """Return one row per epoch of a run's metrics, with the keys that the report plots."""
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if "val_loss" in row]
    return [row | {"train_loss": row["train_mean_loss"]} for row in rows]


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return the content of a run's `run.json`: versions, devices, seed, fingerprints, timings.

    Raises:
      CxrError: the directory has no `run.json`.
    """
    try:
        return json.loads((directory / "run.json").read_text())
    except FileNotFoundError:
        raise CxrError(f"{directory / 'run.json'} is missing: {directory} is not a run directory") from None
