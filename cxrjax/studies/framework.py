"""The members of a study of arms, and what a system adds to its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cxrjax.config import Config
from cxrjax.metrics.auc import mean_auroc
from cxrjax.metrics.comparison import Difference, difference
from cxrjax.metrics.scores import Scores, score
from cxrjax.report.content import Cam, Claim, Section
from cxrjax.studies.members import Member
from cxrjax.studies.papers import Paper
from cxrjax.studies.resolution.statements import verdict


@dataclass(frozen=True)
class ArmStudy:
    """Models trained on the same images, to be compared with each other and with a paper.

    Attributes:
      system: its name, such as "transfer".
      config: of the recipe as it was named; its keys `study` and `evaluate` hold for all arms.
      members: the arms; the others are compared with the first.
      phantom: whether the images are drawn.
    """

    system: str
    config: Config
    members: Sequence[Member]
    phantom: bool

    @cached_property
    def paper(self) -> Paper:
        """What the system's paper prints."""
        return Paper.of(self.system)

    @property
    def arms(self) -> list[str]:
        """Names of the members."""
        return [member.name for member in self.members]

    @property
    def findings(self) -> tuple[str, ...]:
        """What all members learn."""
        return self.members[0].experiment.findings

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.members[0].experiment.records.dataset

    @property
    def comparable(self) -> bool:
        """Whether numbers can be held against the paper's: the same data set, of genuine images."""
        return not self.phantom and self.dataset == self.paper.dataset

    def arm(self, name: str) -> Member:
        """The member of this name, which the study must have."""
        return self.members[self.arms.index(name)]

    @cached_property
    def best(self) -> Member:
        """The member with the highest mean AUROC on validation: chosen without a look at the test part."""
        tables = {member.name: member.validation for member in self.members}
        means = {name: mean_auroc(table.logit, table.label, table.label_mask) for name, table in tables.items()}
        return max(self.members, key=lambda member: means[member.name])

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Of every arm on the test part."""
        evaluate = self.config.evaluate
        options = {"resamples": evaluate.resamples, "confidence": evaluate.confidence}
        return {member.name: score(member.test, **options) for member in self.members}

    @property
    def drawing(self) -> dict[str, Any]:
        """How intervals of differences are made; there are always some."""
        return {"resamples": self.config.evaluate.resamples or 1000, "confidence": self.config.evaluate.confidence}

    def gain(self, first: Member, second: Member) -> Difference:
        """The mean AUROC of one member less that of another, patients drawn in pairs."""
        return difference([first.test], [second.test], self.findings, **self.drawing)

    def better(self, first: str, second: str, statement: str) -> Claim:
        """The claim that one arm has a higher mean AUROC than another."""
        gain = self.gain(self.arm(first), self.arm(second))
        evidence = f"mean AUROC of {first} less that of {second}: {gain}"
        return Claim(statement, verdict(gain.low > 0, gain.high < 0), evidence)


@dataclass(frozen=True)
class Extra:
    """What one system adds: chapters, claims, notes, activation maps, and numbers for `study.json`."""

    sections: Sequence[Section] = ()
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    cams: Mapping[str, Mapping[str, Cam]] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
