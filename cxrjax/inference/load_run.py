"""Load a trained run or converted weights, and predict a split of a run's data."""

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import read_config
from cxrjax.console import progress_bar
from cxrjax.distributed.mesh import replicated
from cxrjax.distributed.runtime import devices, preemption_requested
from cxrjax.errors import CxrError, InterruptedRunError
from cxrjax.inference.calibration_file import Calibration
from cxrjax.metrics.predictions import Predictions, log_odds
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment, predict_logits
from cxrjax.train.run_directory import check_same_identity, load_best_network
from cxrjax.train.step import make_predict_step
from cxrjax.weights import load_converted, read_converted


def load_run(
    directory: Path, data_dir: Path | None = None, mesh: tuple[int, int] | None = None
) -> tuple[Experiment, Network, dict[str, Any]]:
    """Load a trained run together with its data.

    Args:
      directory: run directory.
      data_dir: where the prepared data are now; default: where they were in training.
      mesh: devices on the mesh axes data and space. Default: as in training; if that needs more devices than there are
        here, as many on space as divide both, and the others on data.

    Returns:
      The run's experiment, its best network, and the notes of its checkpoint (step, val_loss, val_auroc).

    Raises:
      CxrError: not a run, data not found, no checkpoint, or a checkpoint of another model.
    """
    config = read_config(directory / "config.json")
    with config.unlocked():
        if data_dir is not None:
            config.data.data_dir = str(data_dir)
        if mesh is not None:
            config.mesh.data, config.mesh.space = mesh
        elif max(config.mesh.data, 1) * config.mesh.space > len(devices()):  # trained on a larger machine
            config.mesh.data, config.mesh.space = 0, math.gcd(config.mesh.space, len(devices()))
    experiment = Experiment.open(config)
    check_same_identity(directory, experiment.fingerprints)
    _, _, network, checkpoint = load_best_network(directory, replicated(experiment.mesh))
    return experiment, network, checkpoint


def predict(experiment: Experiment, network: Network, split: str) -> Predictions:
    """Return logits, labels and patients of every record of a split, in the records' order.

    Raises:
      InterruptedRunError: a process received a stop signal.
    """
    config, examples = experiment.config, experiment.examples(split)
    with progress_bar(f"predicting {split} at {config.data.image_size} px", len(examples.row)) as show:

        def advance(images: int) -> None:
            show(images)
            if received := preemption_requested():
                name = signal.Signals(received[0]).name
                raise InterruptedRunError(f"stopped by {name}: rerun the command to start over", received[0])

        logits = predict_logits(
            network, examples, make_predict_step(experiment.mesh), experiment.mesh, size=config.data.image_size,
            batch=config.evaluate.batch_size, threads=config.data.num_threads, advance=advance,
        )  # fmt: skip
    records = experiment.records
    return Predictions(
        id=records.id[examples.row],
        patient=records.patient[examples.row],
        findings=experiment.findings,
        logit=log_odds(logits, config.loss.name),
        label=examples.label.astype(np.float64),
        label_mask=examples.label_mask,
    )


@dataclass(frozen=True)
class LoadedModel:
    """A trained network that can classify images.

    Attributes:
      network: parameters and batch statistics.
      findings: names of its outputs.
      size: side of the images it was trained on, in px; 0 if unknown.
      loss: name of the training loss, which determines how logits become probabilities.
      calibration: what was fitted on the run's validation split, if anything.
      uncalibrated: why there is no calibration; "" if there is one.
    """

    network: Network
    findings: tuple[str, ...]
    size: int = 0
    loss: str = "bce"
    calibration: Calibration | None = None
    uncalibrated: str = ""

    @property
    def exclusive(self) -> bool:
        """Whether the findings are classes of which an image has exactly one."""
        return self.loss == "cross_entropy"


def load_model(directory: Path) -> LoadedModel:
    """Load the best network of a run, or converted weights with a head; no data set is needed.

    Raises:
      CxrError: neither a run nor converted weights, no checkpoint yet, or weights without a head.
    """
    if (directory / "card.json").is_file():
        if (directory / "config.json").exists():
            raise CxrError(f"{directory} holds a run and converted weights: move one of them away")
        card, _ = read_converted(directory)
        names = card.labels or ("",) * card.classes
        findings = tuple(name or f"output_{k}" for k, name in enumerate(names))
        uncalibrated = f"{directory} holds converted weights, which have no validation split"
        return LoadedModel(load_converted(directory), findings, uncalibrated=uncalibrated)
    config, findings, network, checkpoint = load_best_network(directory)
    calibration, uncalibrated = None, ""
    try:
        calibration = Calibration.read(directory, checkpoint, findings)
    except CxrError as error:
        uncalibrated = str(error)
    return LoadedModel(network, findings, config.data.image_size, config.loss.name, calibration, uncalibrated)
