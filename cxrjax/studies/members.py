"""Members of a study: trained runs and their predictions."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cxrjax.config import Config
from cxrjax.distributed.runtime import broadcast_from_main, is_distributed, on_main_process
from cxrjax.files import write_json
from cxrjax.inference.load_run import load_run, predict
from cxrjax.metrics.predictions import Predictions
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment
from cxrjax.train.stages import train_stages

_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Member:
    """A trained run with the predictions of its best checkpoint.

    Attributes:
      name: its name in the report.
      directory: run directory.
      experiment: its config, data and split.
      network: the best network.
      validation: predictions on the validation split.
      test: predictions on the test split.
    """

    name: str
    directory: Path
    experiment: Experiment
    network: Network
    validation: Predictions
    test: Predictions

    @classmethod
    def from_run(cls, name: str, directory: Path) -> "Member":
        """Load a trained run; predict validation and test unless the run directory holds current predictions."""
        experiment, network, checkpoint = load_run(directory)
        return cls.from_network(name, directory, experiment, network, checkpoint, directory / "predictions")

    @classmethod
    def from_network(
        cls,
        name: str,
        directory: Path,
        experiment: Experiment,
        network: Network,
        checkpoint: dict[str, Any],
        folder: Path,
    ) -> "Member":
        """Create a member from a loaded network, with its predictions in `folder`; see `write_predictions`."""
        write_predictions(experiment, network, checkpoint, folder)
        validation, test = (Predictions.read(_table_path(folder, split)) for split in _SPLITS)
        return cls(name, directory, experiment, network, validation, test)


def train_runs(
    configs: Mapping[str, Config],
    folder: Path,
    *,
    predict_run: Callable[[Path], None] | None = None,
    on_trained: Callable[[str], Any] | None = None,
) -> None:
    """Train runs one after another; completed runs are not trained again.

    Args:
      configs: name of a run -> its config.
      folder: holds a run directory for each name.
      predict_run: predicts a run in all processes; default: `predict_in_all_processes`.
      on_trained: called on the main process with the name of each run once it is trained and predicted.
    """
    for name, config in configs.items():
        train_stages(config, folder / name)
        (predict_run or predict_in_all_processes)(folder / name)
        if on_trained is not None:
            on_main_process(partial(on_trained, name))


def predict_in_all_processes(directory: Path) -> None:
    """Predict a trained run in all processes; a single process does nothing, as `Member.from_run` predicts there."""
    if is_distributed():
        write_predictions(*load_run(directory), directory / "predictions")


def write_predictions(experiment: Experiment, network: Network, checkpoint: dict[str, Any], folder: Path) -> None:
    """Predict validation and test, unless `folder` already holds the predictions of this checkpoint."""
    source_file, source = folder / "made-of.json", experiment.fingerprints | checkpoint

    def is_current() -> bool:
        return _read_json(source_file) == source and all(_table_path(folder, split).is_file() for split in _SPLITS)

    if broadcast_from_main(is_current):
        return
    tables = {split: predict(experiment, network, split) for split in _SPLITS}

    def write() -> None:
        source_file.unlink(missing_ok=True)
        for split, table in tables.items():
            table.write(_table_path(folder, split))
        write_json(source_file, source)

    on_main_process(write)


def _table_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.parquet"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
