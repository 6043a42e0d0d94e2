"""The framework of all studies: what a study compares, the paper it reproduces, and the files it writes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cxrjax.config import Config, load_config
from cxrjax.console import print_text, stdout
from cxrjax.files import write_json
from cxrjax.metrics.auc import mean_auroc, mean_defined
from cxrjax.metrics.comparison import Difference, difference
from cxrjax.metrics.scores import Scores, score
from cxrjax.metrics.tables import normalize_name
from cxrjax.report import style
from cxrjax.report.content import Cam, Claim, Section, StudyReport
from cxrjax.report.page import study_figures, write_page
from cxrjax.report.tables import scores_csv, terminal_scores
from cxrjax.runs.evaluate_run import describe_intervals, read_epochs, read_provenance
from cxrjax.studies.members import Member, predict_in_all_processes
from cxrjax.train.experiment import Experiment


@dataclass(frozen=True)
class Paper:
    """The numbers that a paper prints. They are shown next to ours and never enter a result.

    Attributes:
      source: the paper, and where in it the numbers are.
      dataset: name of the data set it used.
      test: description of its test images.
      numbers: everything else in `papers.json`.
    """

    source: str
    dataset: str
    test: str
    numbers: Mapping[str, Any]

    @classmethod
    def load(cls, name: str) -> "Paper":
        """Read a paper from `papers.json` by the name of its system."""
        entry = json.loads(files("cxrjax.studies").joinpath("papers.json").read_text("utf-8"))[name]
        return cls(entry.pop("source"), entry.pop("dataset"), entry.pop("test"), entry)

    @cached_property
    def auc(self) -> dict[str, dict[str, float]]:
        """Arm -> finding -> printed AUC."""
        return self.numbers.get("auc", {})

    def for_arm(self, key: str, arm: str) -> Any:
        """Return an arm's entry of `numbers[key]`; None if the paper prints none."""
        return self.numbers.get(key, {}).get(arm)

    def finding_auc(self, arm: str, finding: str) -> float | None:
        """Return one printed AUC (spaces and underscores in names are equal); None if the paper prints none."""
        printed = {normalize_name(name): value for name, value in self.auc.get(arm, {}).items()}
        return printed.get(normalize_name(finding))

    def mean_auc(self, arm: str) -> float | None:
        """Return the mean of an arm's printed AUCs; None if the paper prints fewer than two."""
        printed = list(self.auc.get(arm, {}).values())
        return mean_defined(printed) if len(printed) > 1 else None


@dataclass(frozen=True)
class Study:
    """Runs trained on the same images, compared with each other and with a paper.

    Attributes:
      config: config of the recipe; its keys `study` and `evaluate` apply to all members.
      members: the runs that tables and figures show; the others are compared with the first.
      paper_name: name of the paper in `papers.json`; empty for none.
      phantom_arms: whether the recipe's arms are named as runs on synthetic images.
    """

    config: Config
    members: Sequence[Member]
    paper_name: str
    phantom_arms: bool = False

    @cached_property
    def paper(self) -> Paper:
        """The paper that the study reproduces."""
        return Paper.load(self.paper_name)

    @property
    def arms(self) -> list[str]:
        """Names of the members."""
        return [member.name for member in self.members]

    @property
    def findings(self) -> tuple[str, ...]:
        """Findings that all members learn."""
        return self.members[0].test.findings

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.members[0].experiment.records.dataset

    @property
    def is_phantom(self) -> bool:
        """Whether the images are synthetic."""
        return self.phantom_arms or self.dataset == "cxr_phantom"

    @property
    def is_comparable(self) -> bool:
        """Whether scores can be compared with the paper's: real images of the same data set."""
        return not self.is_phantom and self.dataset == self.paper.dataset

    @property
    def runs(self) -> list[Member]:
        """One member per run: the last one, where several members are heads of one network."""
        return list({member.directory: member for member in self.members}.values())

    def arm(self, name: str) -> Member:
        """Return a member by name."""
        return self.members[self.arms.index(name)]

    @cached_property
    def best(self) -> Member:
        """The member with the highest mean AUROC on validation; the test split is not used."""

        def validation_auroc(member: Member) -> float:
            return mean_auroc(member.validation.logit, member.validation.label, member.validation.label_mask)

        return max(self.members, key=validation_auroc)

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Test scores of every model."""
        evaluate = self.config.evaluate
        options = {"resamples": evaluate.bootstrap_resamples, "confidence": evaluate.confidence_level}
        return {member.name: score(member.test, **options) for member in self.members}

    @property
    def bootstrap_options(self) -> dict[str, Any]:
        """Options of the intervals of differences, which are always computed."""
        evaluate = self.config.evaluate
        return {"resamples": evaluate.bootstrap_resamples or 1000, "confidence": evaluate.confidence_level}

    def member_difference(self, first: Member, second: Member) -> Difference:
        """Return the difference of two members' mean test AUROC, by paired bootstrap over patients."""
        return difference([first.test], [second.test], self.findings, **self.bootstrap_options)

    def better_claim(self, first: str, second: str, statement: str) -> Claim:
        """Return the claim that one arm has a higher mean AUROC than another."""
        gain = self.member_difference(self.arm(first), self.arm(second))
        evidence = f"mean AUROC of {first} minus {second}: {gain}"
        return Claim(statement, claim_status(gain.low > 0, gain.high < 0), evidence)


@dataclass(frozen=True)
class SystemResults:
    """Results that only one system reports: sections, claims, notes, activation maps, and numbers of `study.json`."""

    sections: Sequence[Section] = ()
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    cams: Mapping[str, Mapping[str, Cam]] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


class System:
    """A published system: its runs, and what only its report shows. A subclass overrides what differs."""

    required_arms: tuple[str, ...] = ()
    """Arms that `summarize` needs."""

    def plan(self, spec: str, overrides: Sequence[str], config: Config) -> dict[str, Config]:
        """Return the config of each run by name: one run per arm, which is the argument of the recipe."""
        recipe = spec.partition(":")[0]
        return {name: load_config(f"{recipe}:{name}", overrides) for name in config.study.arms}

    def check(self, experiment: Experiment) -> None:
        """Refuse data that the system cannot be trained on; `experiment` is that of the first run."""

    def predict(self, config: Config, run: Path) -> None:
        """Predict a trained run in all processes."""
        predict_in_all_processes(run)

    def load_members(self, config: Config, folder: Path) -> list[Member]:
        """Load the trained arms from the directory of all runs."""
        return [Member.from_run(arm_name(name), folder / name) for name in config.study.arms]

    def summarize(self, study: Study) -> SystemResults:
        """Return what only this system's report shows."""
        raise NotImplementedError


def arm_name(argument: str) -> str:
    """Return an arm's name in the report: the argument of the recipe without the prefix of synthetic data."""
    return argument.removeprefix("phantom-")


def comparability(study: Study, scores: Scores, split_note: str, paper_note: str) -> str:
    """Return a paragraph that says whether our scores can be compared with the paper's."""
    split, intervals = study.members[0].experiment.split.name, describe_intervals(scores)
    ours = (
        f"Our scores are from {scores.images:,} test images of {scores.patients:,} patients ({study.dataset}, split "
        f"{split!r}{split_note}){', with ' + intervals if intervals else ''}. The paper's are from {study.paper.test}; "
        f"{paper_note}."
    )
    if study.is_phantom:
        return f"Phantom data: not comparable. {ours}"
    if not study.is_comparable:
        return f"Different data ({study.dataset}; the paper used {study.paper.dataset}): not comparable. {ours}"
    return f"Comparable, although the test images are not the same. {ours}"


def shared_provenance(study: Study) -> dict[str, Any]:
    """Return the provenance that all runs of a study share."""
    first = read_provenance(study.members[0].directory)
    return {name: first[name] for name in ("images", "versions", "device", "devices", "mesh", "host")}


def training_curves(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Return the epochs of every run: member -> rows of `metrics.jsonl`."""
    return {member.name: read_epochs(member.directory) for member in study.runs}


def write_study(study: Study, report: StudyReport, numbers: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Write `study.json`, `scores.csv`, `figures/` and `report/index.html`, and print the scores and claims.

    Args:
      study: its scores are written.
      report: content of the page and the figures.
      numbers: further entries of `study.json`.
      directory: study directory.

    Returns:
      The content of `study.json`, and the path of the page as `report`.
    """
    result = to_json(
        {
            "scores": {name: scores.as_dict() for name, scores in study.scores.items()},
            **numbers,
            "claims": [vars(claim) for claim in report.claims],
            "provenance": report.provenance,
        }
    )
    write_json(directory / "study.json", result)
    style.write(directory / "scores.csv", scores_csv(report.scores).encode())
    for name, figure in study_figures(report).items():
        for kind in ("svg", "pdf"):
            style.save(figure, directory / "figures" / f"{name}.{kind}")
    page = write_page(report, directory / "report" / "index.html")
    stdout.print(terminal_scores(report.scores, report.findings, report.sizes, title=report.title))
    for claim in report.claims:
        print_text(f"{claim.supported:>9}  {claim.statement}: {claim.evidence}")
    print_text(f"report: {page}")
    return result | {"report": str(page)}


def to_json(value: Any) -> Any:
    """Convert a value for JSON: NaN and infinities become None, tuples lists, and NumPy numbers Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def claim_status(supported: bool, refuted: bool) -> Literal["yes", "no", "undecided"]:
    """Return the status of a claim: supported, refuted or neither."""
    return "yes" if supported else "no" if refuted else "undecided"


def join_names(names: Sequence[str]) -> str:
    """Join names as in a sentence: A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
