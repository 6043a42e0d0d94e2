"""Reproduce a published system: train its arms on the same images and compare them with each other and the paper.

An arm is a run of the system's recipe with the arm's name as argument. FHRNet trains all arms in one run; they are its
stages or its heads. `cxrjax.studies.sections` has the sections that all systems share.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import Config, load_config
from cxrjax.distributed.runtime import on_main_process
from cxrjax.errors import CxrError
from cxrjax.report.content import StudyReport
from cxrjax.runs.evaluate_run import describe_intervals, read_provenance, roc_curves
from cxrjax.studies import sections
from cxrjax.studies.members import train_runs
from cxrjax.studies.study import (
    Study,
    System,
    SystemResults,
    arm_name,
    shared_provenance,
    training_curves,
    write_study,
)  # fmt: skip
from cxrjax.studies.systems.attention_fusion import AttentionFusion
from cxrjax.studies.systems.fhrnet import FHRNet
from cxrjax.studies.systems.sequential_cnn import SequentialCNN
from cxrjax.studies.systems.transfer import Transfer
from cxrjax.train.experiment import Experiment
from cxrjax.train.stages import stage_directories

SYSTEMS: dict[str, System] = {
    "fhrnet": FHRNet(),
    "transfer": Transfer(),
    "attention_fusion": AttentionFusion(),
    "sequential_cnn": SequentialCNN(),
}


def run_system_study(system: str, spec: str, overrides: Sequence[str], directory: Path) -> dict[str, Any] | None:
    """Run the whole study of a system in `directory`; completed runs are not trained again.

    With several processes, all of them train and predict; the main process reports.

    Args:
      system: a key of `SYSTEMS`.
      spec: a recipe whose argument is an arm and whose `study.arms` lists the arms; an arm may be given.
      overrides: `--config.key=value`, applied to every arm.
      directory: receives `runs/`, `figures/` (SVG and PDF), `scores.csv`, `study.json` and `report/index.html`.

    Returns:
      Scores of every arm, comparisons, claims and the numbers of all sections, ready for JSON; None in all processes
      but the main one.

    Raises:
      CxrError: arms are missing, listed twice or tested on different images; or bad input of a run.
    """
    config = load_config(spec, overrides)
    _check_arms(system, config)
    configs = SYSTEMS[system].plan(spec, overrides, config)
    _check_runs(system, configs, directory)
    train_runs(configs, directory / "runs", predict_run=lambda run: SYSTEMS[system].predict(config, run))

    def report() -> dict[str, Any]:
        members = SYSTEMS[system].load_members(config, directory / "runs")
        study = Study(config, members, system, phantom_arms=spec.partition(":")[2].startswith("phantom"))
        return _write_report(study, SYSTEMS[system].summarize(study), directory)

    return on_main_process(report)


def _check_arms(system: str, config: Config) -> None:
    names, key = list(config.study.arms), f"config key study.arms is {config.study.arms}"
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise CxrError(f"{key}: give two arms or more, each once")
    missing = [name for name in SYSTEMS[system].required_arms if name not in map(arm_name, names)]
    if missing:
        raise CxrError(f"{key}: the study of {system} also needs {', '.join(missing)}")
    if len(config.study.seeds) > 1:
        raise CxrError(f"config key study.seeds is {config.study.seeds}, but arms are trained once: set seed instead")


def _check_runs(system: str, configs: Mapping[str, Config], directory: Path) -> None:
    """Find errors before hours of training that would otherwise stop the report after it."""
    experiments = {
        name: Experiment.open(config, stage_directories(config, directory / "runs" / name)[0])
        for name, config in configs.items()
    }
    first_name, first = next(iter(experiments.items()))
    SYSTEMS[system].check(first)
    for name, other in experiments.items():
        for split in ("validation", "test"):
            theirs, ours = other.examples(split), first.examples(split)
            same_images = np.array_equal(other.records.id[theirs.row], first.records.id[ours.row])
            if not same_images or other.findings != first.findings or not np.array_equal(theirs.label, ours.label):
                raise CxrError(
                    f"arms {first_name} and {name} differ in the images, findings or labels of the {split} split: give "
                    "both the same data and split"
                )
    for experiment in experiments.values():
        _ = experiment.identity  # loads pretrained weights and checks the loss and the trainable parameters


def _write_report(study: Study, results: SystemResults, directory: Path) -> dict[str, Any]:
    paper = sections.paper_scores(study)
    common = {
        "comparison": sections.compare_arms(study),
        "operating": sections.operating_points(study),
        "calibration": sections.calibration(study),
        "subgroups": sections.subgroups(study),
    }
    present = {name: pair for name, pair in common.items() if pair is not None}
    report = StudyReport(
        title=study.config.title or study.paper_name,
        kind="arm",
        findings=study.findings,
        sizes=study.arms,
        scores={name: scores.rows() for name, scores in study.scores.items()},
        lead=sections.introduction(study),
        claims=[*results.claims, *(paper[1] if paper else [])],
        notes=[*sections.limitations(study), *results.notes],
        interval=describe_intervals(study.scores[study.arms[0]]),
        curves={member.name: roc_curves(member.test) for member in study.members},
        training=training_curves(study),
        cams=results.cams,
        sections=[*([paper[0]] if paper else []), *results.sections, *(section for section, _ in present.values())],
        provenance=_provenance(study),
    )
    numbers = {
        "system": study.paper_name, "best on validation": study.best.name, "comparable": study.is_comparable,
        **{name: values for name, (_, values) in present.items()}, **results.numbers,
    }  # fmt: skip
    return write_study(study, report, numbers, directory)


def _provenance(study: Study) -> dict[str, Any]:
    keys = ("identity", "seed", "parameters", "trainable parameters", "steps", "train_seconds")
    arms = {}
    for member in study.runs:
        stored = read_provenance(member.directory)
        arms[member.name] = {"model": member.experiment.config.model.name} | {key: stored[key] for key in keys}
    return shared_provenance(study) | arms
