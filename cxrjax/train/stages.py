"""Training in stages: a chain of runs, each starting from the best network of the one before."""

from pathlib import Path

from cxrjax.config import Config, with_changes, with_overrides
from cxrjax.train.experiment import Experiment
from cxrjax.train.loop import train
from cxrjax.train.run_directory import has_checkpoint
from cxrjax.train.state import Progress


def train_stages(config: Config, directory: Path, *, profile: tuple[int, int] | None = None) -> Progress:
    """Train a config, stage by stage if `train.stages` has any.

    Each stage is a separate run with its own optimizer, early stopping and best checkpoint. The last stage is the
    run in `directory`; the others are in `directory/stages/1`, `2`, and so on. A finished stage is not trained again,
    even if its directory was deleted after a later stage had begun.

    Args:
      config: `train.stages` holds the changes of each stage; stages run in alphabetical order of their names.
      directory: run directory.
      profile: see `train`; applies to each stage.

    Raises:
      CxrError: see `train`.
    """
    unstaged = with_overrides(config, ["train.stages={}"])
    stages = [with_changes(unstaged, changes) for changes in config.train.stages.values()] or [config]
    directories = stage_directories(config, directory)
    for number, (stage, stage_directory) in enumerate(zip(stages, directories, strict=True)):
        if not stage_directory.exists() and any(map(has_checkpoint, directories[number + 1 :])):
            continue
        if number:
            stage = with_overrides(
                stage, ["model.init_members={}", f"model.init_from={directories[number - 1].resolve()}"]
            )
        experiment = Experiment.open(stage, stage_directory)
        progress = train(experiment.config, stage_directory, experiment, profile=profile)
    return progress


def stage_directories(config: Config, directory: Path) -> list[Path]:
    """Return the run directory of each stage in order; only `directory` if there are no stages."""
    numbers = range(1, len(config.train.stages))
    return [*(directory / "stages" / str(number) for number in numbers), directory]
