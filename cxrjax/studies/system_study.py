"""The study of a published system: its arms trained on the same images, compared, explained and put beside the paper.

An arm is a run of the system's recipe with the arm's name as argument; of FHRNet, a stage of its one training, or a
head where all heads are trained together. What all systems have is in `chapters`, what one alone has in `systems`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import Config, load
from cxrjax.console import print_text, stdout
from cxrjax.distributed.runtime import on_main_process
from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.report import figures, style
from cxrjax.report.content import StudyReport
from cxrjax.report.page import write_page
from cxrjax.report.tables import csv, terminal
from cxrjax.runs.evaluate_run import roc_curves, read_epochs, describe_intervals, read_provenance
from cxrjax.studies import sections
from cxrjax.studies.framework import ArmStudy, Extra
from cxrjax.studies.members import Member, predict_together
from cxrjax.studies.systems import attention_fusion, fhrnet, sequential_cnn, transfer
from cxrjax.train.experiment import Experiment
from cxrjax.train.stages import stage_places, train_stages

SYSTEMS: dict[str, Callable[[ArmStudy], Extra]] = {
    "fhrnet": fhrnet.add,
    "transfer": transfer.add,
    "attention_fusion": attention_fusion.add,
    "sequential_cnn": sequential_cnn.add,
}
NEEDED = {
    "fhrnet": ("global", "local", "fusion"),
    "transfer": ("densenet", "densenet_augmented", "resnet_augmented"),
    "attention_fusion": ("simple_cnn", "densenet121", "efficientnet_b0", "fusion"),
    "sequential_cnn": (),
}
"""Arms without which a system's chapters could not be written."""
PHANTOM = "phantom-"
"""Begins the names of arms that are run on the phantom; reports leave it out."""


def arms(system: str, spec: str, overrides: Sequence[str], directory: Path) -> dict[str, Any] | None:
    """Run the whole study of a system in `directory`; what is trained already is not trained again.

    Several processes train and predict together; the first of them reports.

    Args:
      system: one of `SYSTEMS`.
      spec: a recipe whose argument is an arm and whose `study.arms` lists them; such an argument may follow.
      overrides: `--config.key=value`, applied to every arm.
      directory: gets `runs/`, `figures/` (SVG and PDF), `scores.csv`, `study.json` and `report/index.html`.

    Returns:
      Scores of every arm, comparisons, claims and what else the chapters say, ready for JSON; None in all processes but
      the first.

    Raises:
      CxrError: arms that are missing, come twice or are not tested on the same images; or bad input of any run.
    """
    config = load(spec, overrides)
    recipe, _, argument = spec.partition(":")
    staged = system == "fhrnet"
    configs = {name: config if staged else load(f"{recipe}:{name}", overrides) for name in config.study.arms}
    _check(system, config, configs, directory)
    if staged:
        fhrnet.train(config, directory / "runs")
    else:
        for name, each in configs.items():
            train_stages(each, directory / "runs" / name)
            predict_together(directory / "runs" / name)

    def report() -> dict[str, Any]:
        if staged:
            members = fhrnet.members(config, directory / "runs")
        else:
            members = [Member.of(_short(name), directory / "runs" / name) for name in configs]
        phantom = argument.startswith("phantom") or members[0].experiment.records.dataset == "cxr_phantom"
        study = ArmStudy(system, config, members, phantom)
        return _report(study, SYSTEMS[system](study), directory)

    return on_main_process(report)


def _check(system: str, config: Config, configs: dict[str, Config], directory: Path) -> None:
    """Find before hours of training what would stop the report after them."""
    names, key = list(config.study.arms), f"config key study.arms is {config.study.arms}"
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise CxrError(f"{key}: a study compares two arms or more, each once")
    missing = [name for name in NEEDED[system] if name not in map(_short, names)]
    if missing:
        raise CxrError(f"{key}: the study of {system} needs {', '.join(missing)} too")
    if len(config.study.seeds) > 1:
        raise CxrError(f"config key study.seeds is {config.study.seeds}: arms are trained once; set seed instead")
    if system == "fhrnet":
        fhrnet.check(config)
        opened = {fhrnet.run_of(config): config}
    else:
        opened = configs
    first, *others = [
        Experiment.open(each, stage_places(each, directory / "runs" / name)[0]) for name, each in opened.items()
    ]
    if system == "sequential_cnn" and not first.records.exclusive:
        raise CxrError(
            f"the study of sequential_cnn is of exclusive classes, and an image of {first.records.dataset} may show "
            "several findings: set data.dataset to six_class, or to folders of your own"
        )
    for name, other in zip(names[1:], others, strict=False):
        for part in ("validation", "test"):
            theirs, ours = other.examples(part), first.examples(part)
            same = np.array_equal(other.records.id[theirs.row], first.records.id[ours.row])
            if not same or other.findings != first.findings or not np.array_equal(theirs.label, ours.label):
                raise CxrError(
                    f"arms {names[0]} and {name} differ in the images, findings or labels of the {part} part: give "
                    "both the same data and split"
                )
    for experiment in (first, *others):
        _ = experiment.identity  # pretrained weights are there, the loss and what is frozen make sense


def _short(name: str) -> str:
    return name.removeprefix(PHANTOM)


def _report(study: ArmStudy, extra: Extra, directory: Path) -> dict[str, Any]:
    """Everything the study found, as files and as one page."""
    paper = sections.beside_paper(study)
    common = {
        "comparison": sections.compared(study),
        "operating": sections.operating(study),
        "calibration": sections.calibrated(study),
        "subgroups": sections.grouped(study),
    }
    common = {name: chapter for name, chapter in common.items() if chapter is not None}
    first = [] if paper is None else [paper[0]]
    report = StudyReport(
        title=study.config.title or study.system,
        kind="arm",
        findings=study.findings,
        sizes=study.arms,
        scores={name: of.rows() for name, of in study.scores.items()},
        lead=sections.lead(study),
        claims=[*extra.claims, *([] if paper is None else paper[1])],
        notes=[*sections.notes(study), *extra.notes],
        interval=describe_intervals(study.scores[study.arms[0]]),
        curves={member.name: roc_curves(member.test) for member in study.members},
        training={member.name: read_epochs(member.directory) for member in _runs(study)},
        cams=extra.cams,
        sections=[*first, *extra.sections, *(section for section, _ in common.values())],
        provenance=_provenance(study),
    )
    numbers = {name: found for name, (_, found) in common.items()} | dict(extra.numbers)
    return _write(study, report, numbers, directory)


def _provenance(study: ArmStudy) -> dict[str, Any]:
    first = read_provenance(study.members[0].directory)
    shared = ("images", "versions", "device", "devices", "mesh", "host")
    names = ("identity", "seed", "parameters", "trainable parameters", "steps", "train_seconds")
    every = {member.name: read_provenance(member.directory) for member in _runs(study)}
    return {name: first[name] for name in shared} | {
        arm: {"model": member.experiment.config.model.name} | {name: about[name] for name in names}
        for (arm, about), member in zip(every.items(), _runs(study), strict=True)
    }


def _runs(study: ArmStudy) -> list[Member]:
    """One member of each run: the last, where several are heads of one network."""
    return list({member.directory: member for member in study.members}.values())


def _write(study: ArmStudy, report: StudyReport, numbers: dict[str, Any], directory: Path) -> dict[str, Any]:
    result = plain(
        {
            "system": study.system,
            "best on validation": study.best.name,
            "comparable": study.comparable,
            "scores": {name: of.as_dict() for name, of in study.scores.items()},
            "claims": [vars(claim) for claim in report.claims],
            **numbers,
            "provenance": report.provenance,
        }
    )
    write_json(directory / "study.json", result)
    style.write(directory / "scores.csv", csv(report.scores).encode())
    for name, figure in figures.study_figures(report).items():
        for kind in ("svg", "pdf"):
            style.save(figure, directory / "figures" / f"{name}.{kind}")
    page = write_page(report, directory / "report" / "index.html")
    stdout.print(terminal(report.scores, report.findings, report.sizes, title=report.title))
    for claim in report.claims:
        print_text(f"{claim.supported:>9}  {claim.statement}: {claim.evidence}")
    print_text(f"report: {page}")
    return result | {"report": str(page)}


def plain(value: Any) -> Any:
    """A value as JSON has it: NaN and infinities become None, tuples lists, NumPy numbers Python's."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
