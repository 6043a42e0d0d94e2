"""What is fitted on a run's validation split and stored in the run: temperatures, thresholds, uncertainty limits."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.console import progress_bar
from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.inference.mc_dropout import (
    Uncertainty,
    has_dropout,
    stochastic_logits,
    summarize_passes,
    uncertainty_threshold,
)
from cxrjax.metrics.calibration import Temperatures, fit_temperatures
from cxrjax.metrics.predictions import Predictions, probabilities
from cxrjax.metrics.thresholds import choose_thresholds
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment

FILE = "calibration.json"
FLAGGED_FRACTION = 0.1
"""Fraction of validation images that the uncertainty thresholds flag."""


@dataclass(frozen=True)
class Calibration:
    """Values fitted on the validation split, for one checkpoint and one image size.

    Attributes:
      checkpoint: notes of the checkpoint (step, val_loss, val_auroc).
      images: number of validation images.
      temperatures: one per finding.
      thresholds: probability from which each finding counts as present (Youden's index); None if the labels allow none.
      entropy: entropy, in nats and of calibrated probabilities, above which an image is flagged.
      passes: Monte Carlo dropout passes; 0 if the network has no dropout.
      deviation: standard deviation over the passes above which an image is flagged; 0 without passes.
    """

    checkpoint: dict[str, Any]
    images: int
    temperatures: Temperatures
    thresholds: tuple[float | None, ...]
    entropy: float
    passes: int = 0
    deviation: float = 0.0

    def write(self, directory: Path) -> None:
        """Write `calibration.json` into the run directory."""
        write_json(directory / FILE, asdict(self))

    @classmethod
    def read(cls, directory: Path, checkpoint: dict[str, Any], findings: tuple[str, ...]) -> "Calibration":
        """Read the calibration of a checkpoint from its run directory.

        Raises:
          CxrError: the file is missing, damaged, or of another checkpoint.
        """
        fix = f"run `cxrjax evaluate {directory}` to fit it on the validation split"
        try:
            values = json.loads((directory / FILE).read_text(encoding="utf-8"))
            stored, thresholds = values.pop("temperatures"), tuple(values.pop("thresholds"))
            names, scales, reasons = (tuple(stored[key]) for key in ("findings", "values", "reasons"))
            temperatures = Temperatures(names, scales, reasons, stored["exclusive"])
            calibration = cls(temperatures=temperatures, thresholds=thresholds, **values)
        except FileNotFoundError:
            raise CxrError(f"there is no {directory / FILE}: {fix}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CxrError(f"{directory / FILE} cannot be read ({error}): {fix}") from None
        if calibration.checkpoint != checkpoint or calibration.temperatures.findings != findings:
            raise CxrError(
                f"{directory / FILE} is of another checkpoint (step {calibration.checkpoint.get('step')}): {fix}"
            )
        return calibration


def fit_calibration(
    experiment: Experiment, network: Network, checkpoint: dict[str, Any], validation: Predictions
) -> Calibration:
    """Fit on the predictions of the validation split and, if the network has dropout, on stochastic passes over it."""
    config = experiment.config
    exclusive = config.loss.name == "cross_entropy"
    temperatures = fit_temperatures(validation, exclusive=exclusive)
    calibrated = temperatures.apply(validation).probability
    entropy = summarize_passes([calibrated], exclusive=exclusive).entropy.mean(1)
    points = choose_thresholds(validation, "youden")
    thresholds = [
        None if not np.isfinite(t) else float(p) for t, p in zip(points.threshold, points.probability, strict=True)
    ]
    passes, deviation = 0, 0.0
    if has_dropout(network, (config.data.image_size, config.data.image_size)):
        passes = max(config.study.passes, 2)
        deviation = uncertainty_threshold(_run_passes(experiment, network, passes).per_image, FLAGGED_FRACTION)
    entropy_limit = uncertainty_threshold(entropy, FLAGGED_FRACTION)
    return Calibration(
        checkpoint, len(validation), temperatures, tuple(thresholds), entropy_limit, passes, deviation
    )  # fmt: skip


def _run_passes(experiment: Experiment, network: Network, passes: int) -> Uncertainty:
    config, examples = experiment.config, experiment.examples("validation")
    with progress_bar(f"{passes} stochastic passes over validation", len(examples)) as advance:
        logits = stochastic_logits(
            network, examples, experiment.mesh, size=config.data.image_size, batch=config.evaluate.batch_size,
            passes=passes, seed=config.seed, threads=config.data.num_threads, advance=advance,
        )  # fmt: skip
    return summarize_passes(probabilities(pass_logits, config.loss.name) for pass_logits in logits)
