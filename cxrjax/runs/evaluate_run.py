"""One run, evaluated: predictions, scores, figures and a page in its directory."""

import json
from pathlib import Path
from typing import Any

from cxrjax.config import validate
from cxrjax.console import print_text, stdout
from cxrjax.distributed.runtime import check_consistent, on_main_process
from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.inference.calibration_file import fit_run
from cxrjax.inference.load_run import open_run, predict
from cxrjax.metrics.auc import roc_curve
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import Scores, score
from cxrjax.report import figures, style
from cxrjax.report.content import Curve, RunReport
from cxrjax.report.page import write_page
from cxrjax.report.tables import terminal
from cxrjax.train.experiment import Experiment
from cxrjax.train.monitoring import read_metrics


def evaluate_run(
    directory: Path,
    *,
    part: str = "test",
    data_dir: Path | None = None,
    resamples: int | None = None,
    batch: int | None = None,
    mesh: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Predict one part with the best checkpoint, score it, and write everything into the run's directory.

    Writes `predictions/PART.parquet`, `predictions/PART.json` (the scores), `figures/PART-*.svg` and
    `report/index.html`; and `fitted.json`, by which `predict` calibrates, fitted on the validation part. Several
    processes share the predicting, and the first of them scores and writes.

    Args:
      directory: of the run.
      part: what to predict.
      data_dir: where the prepared data lie now; default where they lay in training.
      resamples: of the bootstrap; default the config's.
      batch: images at once; default the config's.
      mesh: see `open_run`.

    Returns:
      The scores as one dict, ready for JSON; None in all processes but the first.
    """
    experiment, network, about = open_run(directory, data_dir, mesh)
    if batch is not None:
        experiment.config.evaluate.batch = batch
        validate(experiment.config)
    shape, batch = dict(experiment.mesh.shape), experiment.config.evaluate.batch
    check_consistent("run, data, part, mesh and batch", [about, experiment.fingerprints, part, shape, batch])
    predictions = predict(experiment, network, part)
    validation = predictions if part == "validation" else predict(experiment, network, "validation")
    fitted = fit_run(experiment, network, about, validation)

    def written() -> dict[str, Any]:
        fitted.write(directory)
        return _written(experiment, about, part, predictions, resamples, directory)

    return on_main_process(written)


def _written(
    experiment: Experiment,
    about: dict[str, Any],
    part: str,
    predictions: Predictions,
    resamples: int | None,
    directory: Path,
) -> dict[str, Any]:
    """The scores of predictions, which are written with them, their figures and the page."""
    config = experiment.config
    predictions.write(directory / "predictions" / f"{part}.parquet")
    draws: int = config.evaluate.resamples if resamples is None else resamples
    scores = score(predictions, resamples=draws, seed=config.seed, confidence=config.evaluate.confidence)
    result = {"part": part, "checkpoint": about, **scores.as_dict()}
    write_json(directory / "predictions" / f"{part}.json", result)

    report = RunReport(
        title=f"{config.title or config.model.name}, {config.data.size} px, {part} part",
        findings=predictions.findings,
        scores=scores.rows(),
        interval=interval_text(scores),
        curves=curves(predictions),
        training=epochs(directory),
        provenance={**provenance(directory), "checkpoint": about},
    )
    for name, figure in figures.run_figures(report).items():
        style.save(figure, directory / "figures" / f"{part}-{name}.svg")
    page = write_page(report, directory / "report" / "index.html")
    stdout.print(terminal({part: scores.rows()}, predictions.findings))
    print_text(f"report: {page}")
    return result


def interval_text(scores: Scores) -> str:
    """How the intervals were made, in words."""
    if not scores.resamples:
        return ""
    people = f"{scores.patients:,} patients, {scores.resamples:,} resamples"
    return f"{scores.confidence:.0%} percentile bootstrap over {people}"


def curves(predictions: Predictions) -> dict[str, Curve]:
    """The ROC curve of every finding that has one."""
    drawn = {}
    for k, finding in enumerate(predictions.findings):
        curve = roc_curve(predictions.logit[:, k], predictions.label[:, k], predictions.label_mask[:, k])
        if curve is not None:
            drawn[finding] = Curve(curve.fpr, curve.tpr)
    return drawn


def epochs(directory: Path) -> list[dict[str, Any]]:
    """One line an epoch of a run's metrics, as the report wants them."""
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if "val_loss" in row]
    return [row | {"train_loss": row["train_mean_loss"]} for row in rows]


def provenance(directory: Path) -> dict[str, Any]:
    """What `run.json` says of how the numbers came about."""
    try:
        return json.loads((directory / "run.json").read_text())
    except FileNotFoundError:
        raise CxrError(
            f"{directory / 'run.json'} is missing: {directory} is not the directory of a trained run"
        ) from None
