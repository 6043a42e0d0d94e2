"""What was fitted on a run's validation part, stored in the run: how `predict` reads the network's outputs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.console import progress_bar
from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.inference.mc_dropout import has_dropout, stochastic_logits
from cxrjax.metrics.calibration import Temperatures, fit_temperatures
from cxrjax.metrics.predictions import Predictions, probabilities
from cxrjax.metrics.thresholds import choose_thresholds
from cxrjax.metrics.uncertainty import Uncertainty, uncertainty_threshold, summarize_passes
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment

FILE = "fitted.json"
FLAGGED = 0.1
"""Share of validation images that the thresholds of uncertainty flag."""


@dataclass(frozen=True)
class Fitted:
    """Fitted on validation, for one network and images of one size.

    Attributes:
      checkpoint: what the run noted with the network (step, val_loss, val_auroc).
      images: how many validation images there were.
      temperatures: of each finding.
      thresholds: probabilities from which each finding is called (Youden's index); None where the labels allow none.
      entropy: uncertainty by entropy, in nats and of calibrated probabilities, above which an image is flagged.
      passes: of Monte Carlo dropout; 0 where the network has no dropout.
      deviation: uncertainty by passes above which an image is flagged; 0 without passes.
    """

    checkpoint: dict[str, Any]
    images: int
    temperatures: Temperatures
    thresholds: tuple[float | None, ...]
    entropy: float
    passes: int = 0
    deviation: float = 0.0

    def write(self, directory: Path) -> None:
        """Write `fitted.json` in the directory of the run."""
        write_json(directory / FILE, asdict(self))

    @classmethod
    def read(cls, directory: Path, checkpoint: dict[str, Any], findings: tuple[str, ...]) -> "Fitted":
        """What was fitted for this checkpoint.

        Raises:
          CxrError: there is nothing, it is damaged, or it is of another checkpoint; evaluating the run mends each.
        """
        mend = f"`cxrjax evaluate {directory}` fits it on the validation part"
        try:
            values = json.loads((directory / FILE).read_text(encoding="utf-8"))
            stored, thresholds = values.pop("temperatures"), tuple(values.pop("thresholds"))
            named, scaling, reasons = (tuple(stored[name]) for name in ("findings", "values", "reasons"))
            temperatures = Temperatures(named, scaling, reasons, stored["exclusive"])
            fitted = cls(temperatures=temperatures, thresholds=thresholds, **values)
        except FileNotFoundError:
            raise CxrError(f"there is no {directory / FILE}: {mend}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CxrError(f"{directory / FILE} cannot be read ({error}): {mend}") from None
        if fitted.checkpoint != checkpoint or fitted.temperatures.findings != findings:
            raise CxrError(
                f"{directory / FILE} is of another checkpoint (step {fitted.checkpoint.get('step')}): {mend}"
            )
        return fitted


def fit_run(experiment: Experiment, network: Network, checkpoint: dict[str, Any], validation: Predictions) -> Fitted:
    """Fit on the predictions of a run's validation part, and on stochastic passes where the network has dropout."""
    config = experiment.config
    exclusive = config.loss.name == "cross_entropy"
    temperatures = fit_temperatures(validation, exclusive=exclusive)
    calibrated = temperatures.apply(validation).probability
    entropy = uncertainty_threshold(summarize_passes([calibrated], exclusive=exclusive).entropy.mean(1), FLAGGED)
    points = choose_thresholds(validation, "youden")
    called = [
        None if not np.isfinite(t) else float(p) for t, p in zip(points.threshold, points.probability, strict=True)
    ]
    passes, deviation = 0, 0.0
    if has_dropout(network, (config.data.size, config.data.size)):
        passes = max(config.study.passes, 2)
        deviation = uncertainty_threshold(_passes(experiment, network, passes).per_image, FLAGGED)
    return Fitted(checkpoint, len(validation), temperatures, tuple(called), entropy, passes, deviation)


def _passes(experiment: Experiment, network: Network, passes: int) -> Uncertainty:
    config, examples = experiment.config, experiment.examples("validation")
    with progress_bar(f"{passes} stochastic passes over validation", len(examples)) as advance:
        logits = stochastic_logits(
            network, examples, experiment.mesh, size=config.data.size, batch=config.evaluate.batch, passes=passes,
            seed=config.seed, threads=config.data.threads, advance=advance,
        )  # fmt: skip
    return summarize_passes(probabilities(each, config.loss.name) for each in logits)
