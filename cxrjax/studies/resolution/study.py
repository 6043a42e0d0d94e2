"""Which resolution does each finding need? A run of each size (in each fold), their ensembles, and one report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import Config, load
from cxrjax.console import print_text
from cxrjax.data.records import Records
from cxrjax.distributed.runtime import on_main_process
from cxrjax.errors import CxrError
from cxrjax.files import atomic_path
from cxrjax.report.content import Field
from cxrjax.runs.erf_run import measure_erf
from cxrjax.studies.members import Group, Member, Study, predict_together
from cxrjax.studies.resolution.report import report
from cxrjax.train.experiment import Experiment
from cxrjax.train.run_directory import training_process
from cxrjax.train.stages import train_stages


@dataclass(frozen=True)
class Planned:
    """A run that the study consists of, before it is trained.

    Attributes:
      label: what the report calls it.
      group: its seed and fold.
      config: what is trained.
      control: whether it learns a few findings only, and is in no ensemble.
    """

    label: str
    group: Group
    config: Config
    control: bool = False


def resolution(spec: str, overrides: Sequence[str], directory: Path, only: str = "") -> dict[str, Any] | None:
    """Run the whole study in `directory`; what is done already is not done again.

    Several processes train and predict together; the first of them measures and reports.

    Args:
      spec: a recipe, perhaps with an argument of words separated by commas: a number is a size, which the study
        replaces by each of the recipe's `study.sizes`; other words are passed on.
      overrides: `--config.key=value`, applied to every run.
      directory: gets `runs/`, `predictions/`, `figures/`, `study.json`, `scores.csv` and `report/index.html`.
      only: the name of one run, which is its directory's in `runs/`, such as "1024px-fold3": only this one is trained,
        predicted and measured, and nothing outside its directory is written. Many such jobs may run at once.

    Returns:
      Scores of every model, ensemble weights, receptive fields and claims, ready for JSON; of `only`, how far it came.
      None in all processes but the first.

    Raises:
      CxrError: bad input, or another process trains one of the runs.
    """
    config = load(spec, overrides)
    _check_keys(config)
    planned = plan(spec, overrides, config)
    if only:
        if only not in planned:
            raise CxrError(f"--only {only} is no run of this study; its runs are {', '.join(planned)}")
        return _alone(planned[only], directory / "runs" / only, config)
    _check_data(config, planned)
    _refuse_busy(planned, directory)

    members: dict[Group, list[Member]] = {}
    measured: dict[str, list[Field]] = {}
    shared: dict[str, Records] = {}
    control = None

    def open_and_measure(name: str, each: Planned) -> None:
        nonlocal control
        member = _with_shared(Member.of(each.label, directory / "runs" / name), shared)
        if each.control:
            control = member
        else:
            members.setdefault(each.group, []).append(member)
            measured.setdefault(each.label, []).append(_field(member, config))

    for name, each in planned.items():
        train_stages(each.config, directory / "runs" / name)
        predict_together(directory / "runs" / name)
        on_main_process(partial(open_and_measure, name, each))
    return on_main_process(lambda: report(Study(config, members, control), measured, directory))


def plan(spec: str, overrides: Sequence[str], config: Config) -> dict[str, Planned]:
    """All runs by their names, in the order in which they are trained."""
    study = config.study
    of_size = {size: _load(spec, overrides, size) for size in study.sizes}
    groups = [Group(seed, fold) for seed, fold in product(study.seeds, study.folds or [None])]
    planned = {
        f"{size}px{group.suffix}": Planned(f"{size} px", group, _of_group(of_size[size], group))
        for group in groups
        for size in study.sizes
    }
    if study.control:
        size = study.control_size or study.sizes[-1]
        alone = _of_group(of_size[size] if size in of_size else _load(spec, overrides, size), groups[0])
        with alone.unlocked():
            alone.data.findings = tuple(study.control)
        planned[f"control-{size}px{groups[0].suffix}"] = Planned(f"{size} px", groups[0], alone, control=True)
    return planned


def _load(spec: str, overrides: Sequence[str], size: int) -> Config:
    recipe, _, argument = spec.partition(":")
    words = [word for word in argument.split(",") if word and not word.isdigit()]
    config = load(f"{recipe}:{','.join([str(size), *words])}", overrides)
    if config.data.size != size:
        raise CxrError(
            f"config key data.size is {config.data.size} in the run at {size} px: leave the size to study.sizes"
        )
    return config


def _of_group(config: Config, group: Group) -> Config:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.seed = group.seed
        if group.fold is not None:
            config.split.fold = group.fold
    return config


def _check_keys(config: Config) -> None:
    study, key = config.study, "config key study."
    sizes, folds, seeds = list(study.sizes), list(study.folds), list(study.seeds)
    if len(sizes) < 2:
        raise CxrError(f"{key}sizes is {study.sizes}: a study of resolution needs two sizes or more")
    if sizes != sorted(set(sizes)):
        raise CxrError(f"{key}sizes is {study.sizes}: sizes must rise")
    if not seeds or len(set(seeds)) < len(seeds):
        raise CxrError(f"{key}seeds is {study.seeds}: give one training seed or more, each once")
    if folds and config.split.name != "folds":
        raise CxrError(f"{key}folds is {study.folds}, and split.name is {config.split.name}: set split.name=folds")
    if len(set(folds)) < len(folds) or not set(folds) <= set(range(config.split.folds)):
        raise CxrError(f"{key}folds is {study.folds}: give folds from 0 to {config.split.folds - 1}, each once")
    if config.loss.name == "cross_entropy":
        raise CxrError(
            "config key loss.name is cross_entropy, and a study of resolution weighs sizes finding by finding, so that "
            "probabilities of exclusive classes would not add up: set loss.name=bce, which learns each class by itself"
        )


def _check_data(config: Config, planned: Mapping[str, Planned]) -> None:
    """Find before hours of training what would stop the report after them."""
    first, *_ = planned.values()
    opened = Experiment.open(first.config)
    for key in ("fine", "coarse", "control"):
        missing = [finding for finding in config.study[key] if finding not in opened.findings]
        if missing:
            raise CxrError(
                f"config key study.{key} names {', '.join(missing)}, which the runs do not learn; "
                f"they learn {', '.join(opened.findings)}"
            )
    for name, each in planned.items():
        if each.group == first.group or each.label == first.label:  # the others are of the same data and folds
            experiment = Experiment.open(each.config)
            experiment.check_size()
            for part in ("train", "validation", "test"):
                experiment.examples(part)
            if each.group == first.group:
                _refuse_other_images(opened, experiment, name)


def _refuse_other_images(first: Experiment, other: Experiment, name: str) -> None:
    for part in ("train", "validation", "test"):
        ours, theirs = first.examples(part).row, other.examples(part).row
        if not np.array_equal(first.records.id[ours], other.records.id[theirs]):
            raise CxrError(
                f"run {name} would have other images in its {part} part than the smallest size has: prepare all sizes "
                "from the same source"
            )


def _refuse_busy(planned: Mapping[str, Planned], directory: Path) -> None:
    """Before anything is trained: a study that waits for other jobs should not find out hours later."""
    busy = {name: training_process(directory / "runs" / name) for name in planned}
    named = [f"{name} (process {owner})" for name, owner in busy.items() if owner]
    if named:
        raise CxrError(
            f"other processes are training {', '.join(named)} in {directory / 'runs'}: give this command again when "
            "they are done; --only NAME trains a single run meanwhile"
        )


def _alone(planned: Planned, run: Path, config: Config) -> dict[str, Any] | None:
    """One run as a job of its own: everything that the study will ask of it."""
    progress = train_stages(planned.config, run)
    predict_together(run)

    def open_and_measure() -> dict[str, Any]:
        member = Member.of(planned.label, run)
        if not planned.control:
            _field(member, config)
        print_text(f"{run.name}: trained {progress.step} steps, predicted and measured: {run}")
        return {"run": run.name, "directory": str(run), **vars(progress)}

    return on_main_process(open_and_measure)


def _with_shared(member: Member, shared: dict[str, Records]) -> Member:
    """All folds of one size read the same records: their table is kept in memory once."""
    records = member.experiment.records
    kept = shared.setdefault(records.fingerprint, records)
    return replace(member, experiment=replace(member.experiment, records=kept))


def _field(member: Member, config: Config) -> Field:
    """The receptive field of a run on test images: the one beside it if it is of this checkpoint, else a new one."""
    options = (config.study.erf_estimator, config.study.erf_images)
    mark = json.dumps([*options, (member.directory / "predictions" / "made-of.json").read_text()])
    file = member.directory / "predictions" / "receptive-field.npz"
    if file.is_file():
        with np.load(file) as stored:
            if str(stored["mark"]) == mark:
                return Field(stored["map"], **json.loads(str(stored["numbers"])))
    field = measure_erf(member.experiment, member.network, "test", *options)
    numbers = {each.name: getattr(field, each.name) for each in fields(Field) if each.name != "map"}
    with atomic_path(file) as temporary:
        np.savez_compressed(temporary, map=field.map, numbers=json.dumps(numbers), mark=mark)
    return field
