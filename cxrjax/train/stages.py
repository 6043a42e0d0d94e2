"""Training in stages: runs in a row, each starting from the best network of the one before."""

from pathlib import Path

from cxrjax.config import Config, with_overrides
from cxrjax.errors import CxrError
from cxrjax.train.experiment import Experiment
from cxrjax.train.loop import train
from cxrjax.train.run_directory import has_checkpoint
from cxrjax.train.state import Progress


def train_stages(config: Config, directory: Path, *, profile: tuple[int, int] | None = None) -> Progress:
    """Train what the config says, stage by stage where `train.stages` lists some.

    Each stage is a run of its own: with its optimiser, its early stopping and its best checkpoint. All but the last lie
    in `directory/stages/1`, `2`, ...; the last is the run in `directory`. A stage that is done is not done again, also
    where its directory is gone and a later one has begun.

    Args:
      config: `train.stages` holds what each stage changes, such as "train.freeze=backbone; optimizer.rate=1e-3".
      directory: of the run.
      profile: as in `train`, of each stage.

    Raises:
      CxrError: as in `train`, or an unknown key in a stage.
    """
    stages = [_stage(config, changes) for changes in config.train.stages] or [config]
    places, before = stage_places(config, directory), config.model.init_from
    for number, (stage, place) in enumerate(zip(stages, places, strict=True), start=1):
        if place.exists() or not any(map(has_checkpoint, places[number:])):
            with stage.unlocked():
                stage.model.init_from = before
            experiment = Experiment.open(stage, place)
            progress = train(experiment.config, place, experiment, profile=profile)
        before = str(place.resolve())
    return progress


def stage_places(config: Config, directory: Path) -> list[Path]:
    """The directories of the stages' runs, in order; of the one run where there are no stages."""
    before = range(1, len(config.train.stages))
    return [*(directory / "stages" / str(number) for number in before), directory]


def _stage(config: Config, changes: str) -> Config:
    entries = [entry.strip() for entry in changes.split(";") if entry.strip()]
    for entry in entries:
        if entry.startswith(("model.init_from", "train.stages")):
            raise CxrError(f"config key train.stages: a stage cannot set {entry}: it starts from the stage before it")
    return with_overrides(config, ["train.stages=()", *entries])
