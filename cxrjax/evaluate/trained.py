"""A trained network that can be used without the data it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from cxrjax.errors import CxrError
from cxrjax.evaluate.fitted import Fitted
from cxrjax.models.network import Network
from cxrjax.train.described import best_network
from cxrjax.weights import load_converted, read_converted


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
