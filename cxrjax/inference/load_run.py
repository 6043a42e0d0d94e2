"""From a trained run to its predictions."""

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cxrjax.config import read
from cxrjax.console import progress_bar
from cxrjax.distributed.mesh import replicated
from cxrjax.distributed.runtime import devices, preemption_requested
from cxrjax.errors import CxrError, InterruptedRunError
from cxrjax.inference.calibration_file import Fitted
from cxrjax.metrics.predictions import Predictions, log_odds
from cxrjax.models.network import Network
from cxrjax.train.checkpoint import Checkpoints
from cxrjax.train.described import best_network
from cxrjax.train.experiment import Experiment
from cxrjax.train.forward import predict_logits
from cxrjax.train.run_directory import check_same_identity
from cxrjax.train.step import make_predict_step
from cxrjax.weights import load_converted, read_converted


def open_run(
    directory: Path, data_dir: Path | None = None, mesh: tuple[int, int] | None = None
) -> tuple[Experiment, Network, dict[str, Any]]:
    """A trained run: its experiment, its best network, and what was noted with it (step, val_loss, val_auroc).

    Args:
      directory: of the run.
      data_dir: where the prepared data lie now; default where they lay in training.
      mesh: devices of its axes data and space now; default as in training where there are so many, else as many on
        space as divide both, and the others on data.

    Raises:
      CxrError: not a run, data not found, no checkpoint, or a checkpoint of another model.
    """
    config = read(directory / "config.json")
    with config.unlocked():
        if data_dir is not None:
            config.data.dir = str(data_dir)
        if mesh is not None:
            config.mesh.data, config.mesh.space = mesh
        elif max(config.mesh.data, 1) * config.mesh.space > len(devices()):  # trained on a larger machine
            config.mesh.data, config.mesh.space = 0, math.gcd(config.mesh.space, len(devices()))
    experiment = Experiment.open(config)
    check_same_identity(directory, experiment.fingerprints)
    network = experiment.network
    like = jax.device_put({"params": network.params, "stats": network.stats}, replicated(experiment.mesh))
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        best, about = checkpoints.restore_best(like)
    return experiment, Network(best["params"], best["stats"], network.definition), about


def predict(experiment: Experiment, network: Network, part: str) -> Predictions:
    """Logits, labels and patients of every record of a part, in the records' order.

    Raises:
      InterruptedRunError: one of several processes was told to stop.
    """
    config, examples = experiment.config, experiment.examples(part)
    with progress_bar(f"predicting {part} at {config.data.size} px", len(examples.row)) as show:

        def advance(images: int) -> None:
            show(images)
            if received := preemption_requested():
                name = signal.Signals(received[0]).name
                raise InterruptedRunError(f"stopped by {name}: the same command goes on", received[0])

        logits = predict_logits(
            network, examples, make_predict_step(experiment.mesh), experiment.mesh, size=config.data.size,
            batch=config.evaluate.batch, threads=config.data.threads, advance=advance,
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
class Trained:
    """A network that can be used.

    Attributes:
      network: parameters and statistics.
      findings: names of its outputs.
      size: side of the images it was trained on, in px; 0 where that is unknown.
      loss: name of the loss it was trained with, which says what its probabilities are.
      fitted: what was fitted on the run's validation part.
      unfitted: why nothing is, else empty.
    """

    network: Network
    findings: tuple[str, ...]
    size: int = 0
    loss: str = "bce"
    fitted: Fitted | None = None
    unfitted: str = ""

    @property
    def exclusive(self) -> bool:
        """Whether the findings are classes of which an image has exactly one."""
        return self.loss == "cross_entropy"


def open_trained(directory: Path) -> Trained:
    """A run's best network, or converted weights with a head; the data it was trained on need not be here.

    Raises:
      CxrError: neither a run nor converted weights, no checkpoint yet, or weights without a head.
    """
    if (directory / "card.json").is_file():
        if (directory / "config.json").exists():
            raise CxrError(f"{directory} holds a run and converted weights: move one of them away")
        card, _ = read_converted(directory)
        names = card.labels or ("",) * card.classes
        findings = tuple(name or f"output_{k}" for k, name in enumerate(names))
        unfitted = f"{directory} holds converted weights, which say nothing of any validation images"
        return Trained(load_converted(directory), findings, unfitted=unfitted)
    config, findings, network, checkpoint = best_network(directory)
    fitted, unfitted = None, ""
    try:
        fitted = Fitted.read(directory, checkpoint, findings)
    except CxrError as error:
        unfitted = str(error)
    return Trained(network, findings, config.data.size, config.loss.name, fitted, unfitted)
