"""Run the resolution study: which resolution does each finding need?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import Config, load_config
from cxrjax.console import print_text
from cxrjax.data.records import Records
from cxrjax.distributed.runtime import on_main_process
from cxrjax.errors import CxrError
from cxrjax.files import atomic_path
from cxrjax.report.content import ErfMap
from cxrjax.runs.erf_run import measure_erf
from cxrjax.studies.members import Member, predict_in_all_processes, train_runs
from cxrjax.studies.resolution.report import write_report
from cxrjax.studies.resolution.study import Group, ResolutionStudy
from cxrjax.train.experiment import Experiment
from cxrjax.train.run_directory import training_process
from cxrjax.train.stages import train_stages


@dataclass(frozen=True)
class PlannedRun:
    """A run of the study before it is trained.

    Attributes:
      label: its name in the report.
      group: its seed and fold.
      config: its config.
      control: whether it learns a few findings only and is part of no ensemble.
    """

    label: str
    group: Group
    config: Config
    control: bool = False


def run_resolution_study(spec: str, overrides: Sequence[str], directory: Path, only: str = "") -> dict[str, Any] | None:
    """Run the whole study in `directory`; completed runs are not trained again.

    With several processes, all of them train and predict; the main process measures and reports.

    Args:
      spec: a recipe, with optional arguments separated by commas. A number is an image size, which the study replaces
        by each of `study.sizes`; other arguments are passed on.
      overrides: `--config.key=value`, applied to every run.
      directory: receives `runs/`, `predictions/`, `figures/`, `study.json`, `scores.csv` and `report/index.html`.
      only: name of one run (of its directory in `runs/`), such as "1024px-fold3". Only this run is trained, predicted
        and measured, and only its directory is written, so that many such jobs can run at the same time.

    Returns:
      Scores of every model, ensemble weights, receptive fields and claims, ready for JSON; with `only`, the run's
      progress. None in all processes but the main one.

    Raises:
      CxrError: bad input, or another process trains one of the runs.
    """
    config = load_config(spec, overrides)
    _check_keys(config)
    runs = plan(spec, overrides, config)
    if only:
        if only not in runs:
            raise CxrError(f"this study has no run {only}; its runs are {', '.join(runs)}")
        return _run_one(runs[only], directory / "runs" / only, config)
    _check_data(config, runs)
    _check_not_training(runs, directory)

    groups: dict[Group, list[Member]] = {}
    erfs: dict[str, list[ErfMap]] = {}
    records: dict[str, Records] = {}
    control = None

    def load_and_measure(name: str) -> None:
        nonlocal control
        run = runs[name]
        member = _share_records(Member.from_run(run.label, directory / "runs" / name), records)
        if run.control:
            control = member
        else:
            groups.setdefault(run.group, []).append(member)
            erfs.setdefault(run.label, []).append(_load_or_measure_erf(member, config))

    configs = {name: run.config for name, run in runs.items()}
    train_runs(configs, directory / "runs", on_trained=load_and_measure)
    return on_main_process(lambda: write_report(ResolutionStudy.from_groups(config, groups, control), erfs, directory))


def plan(spec: str, overrides: Sequence[str], config: Config) -> dict[str, PlannedRun]:
    """Return all runs by name, in the order of training."""
    study = config.study
    configs = {size: _config_for_size(spec, overrides, size) for size in study.sizes}
    groups = [Group(seed, fold) for seed, fold in product(study.seeds, study.folds or [None])]
    runs = {
        f"{size}px{group.suffix}": PlannedRun(f"{size} px", group, _config_for_group(configs[size], group))
        for group in groups
        for size in study.sizes
    }
    if study.control:
        size = study.control_size or study.sizes[-1]
        base = configs[size] if size in configs else _config_for_size(spec, overrides, size)
        control = _config_for_group(base, groups[0])
        with control.unlocked():
            control.data.findings = tuple(study.control)
        runs[f"control-{size}px{groups[0].suffix}"] = PlannedRun(f"{size} px", groups[0], control, control=True)
    return runs


def _config_for_size(spec: str, overrides: Sequence[str], size: int) -> Config:
    recipe, _, argument = spec.partition(":")
    others = [option for option in argument.split(",") if option and not option.isdigit()]
    config = load_config(f"{recipe}:{','.join([str(size), *others])}", overrides)
    if config.data.image_size != size:
        raise CxrError(
            f"config key data.image_size is {config.data.image_size} in the run at {size} px: set study.sizes instead"
        )
    return config


def _config_for_group(config: Config, group: Group) -> Config:
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
        raise CxrError(f"{key}sizes is {study.sizes}: the resolution study needs two sizes or more")
    if sizes != sorted(set(sizes)):
        raise CxrError(f"{key}sizes is {study.sizes}: list the sizes in increasing order, each once")
    if not seeds or len(set(seeds)) < len(seeds):
        raise CxrError(f"{key}seeds is {study.seeds}: give one training seed or more, each once")
    if folds and config.split.name != "folds":
        raise CxrError(f"{key}folds is {study.folds}, but split.name is {config.split.name}: set split.name=folds")
    if len(set(folds)) < len(folds) or not set(folds) <= set(range(config.split.folds)):
        raise CxrError(f"{key}folds is {study.folds}: give folds from 0 to {config.split.folds - 1}, each once")
    if config.loss.name == "cross_entropy":
        raise CxrError(
            "config key loss.name is cross_entropy, but the resolution study weights sizes separately for each "
            "finding, so probabilities of exclusive classes would not sum to 1: set loss.name=bce"
        )


def _check_data(config: Config, runs: Mapping[str, PlannedRun]) -> None:
    """Find errors before hours of training that would otherwise stop the report after it."""
    first, *_ = runs.values()
    reference = Experiment.open(first.config)
    for key in ("fine", "coarse", "control"):
        missing = [finding for finding in config.study[key] if finding not in reference.findings]
        if missing:
            raise CxrError(
                f"config key study.{key} has {', '.join(missing)}, which the runs do not learn; "
                f"they learn {', '.join(reference.findings)}"
            )
    for name, run in runs.items():
        if run.group == first.group or run.label == first.label:  # all others have the same data and folds
            experiment = Experiment.open(run.config)
            experiment.check_size()
            for split in ("train", "validation", "test"):
                experiment.examples(split)
            if run.group == first.group:
                _check_same_images(reference, experiment, name)


def _check_same_images(first: Experiment, other: Experiment, name: str) -> None:
    for split in ("train", "validation", "test"):
        rows, other_rows = first.examples(split).row, other.examples(split).row
        if not np.array_equal(first.records.id[rows], other.records.id[other_rows]):
            raise CxrError(
                f"the {split} split of run {name} has other images than that of the smallest size: prepare all sizes "
                "from the same source"
            )


def _check_not_training(runs: Mapping[str, PlannedRun], directory: Path) -> None:
    """Refuse to start while other processes train runs of the study, instead of hours later."""
    processes = {name: training_process(directory / "runs" / name) for name in runs}
    busy = [f"{name} (process {process})" for name, process in processes.items() if process]
    if busy:
        raise CxrError(
            f"other processes are training {', '.join(busy)} in {directory / 'runs'}: rerun this command when they "
            "have finished; meanwhile, --only NAME trains a single run"
        )


def _run_one(planned: PlannedRun, directory: Path, config: Config) -> dict[str, Any] | None:
    """Train, predict and measure one run as a separate job."""
    progress = train_stages(planned.config, directory)
    predict_in_all_processes(directory)

    def load_and_measure() -> dict[str, Any]:
        member = Member.from_run(planned.label, directory)
        if not planned.control:
            _load_or_measure_erf(member, config)
        print_text(f"{directory.name}: trained for {progress.step} steps, predicted and measured: {directory}")
        return {"run": directory.name, "directory": str(directory), **vars(progress)}

    return on_main_process(load_and_measure)


def _share_records(member: Member, cache: dict[str, Records]) -> Member:
    """Let all folds of one size share one table of records in memory."""
    experiment = member.experiment
    records = cache.setdefault(experiment.records.fingerprint, experiment.records)
    return replace(member, experiment=replace(experiment, records=records))


def _load_or_measure_erf(member: Member, config: Config) -> ErfMap:
    """Return a run's receptive field on test images; it is measured only if none of this checkpoint is stored."""
    options = (config.study.erf_estimator, config.study.erf_images)
    mark = json.dumps([*options, (member.directory / "predictions" / "made-of.json").read_text()])
    path = member.directory / "predictions" / "receptive-field.npz"
    if path.is_file():
        with np.load(path) as stored:
            if str(stored["mark"]) == mark:
                return ErfMap(stored["map"], **json.loads(str(stored["numbers"])))
    erf = measure_erf(member.experiment, member.network, "test", *options)
    numbers = {item.name: getattr(erf, item.name) for item in fields(ErfMap) if item.name != "map"}
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, map=erf.map, numbers=json.dumps(numbers), mark=mark)
    return erf
