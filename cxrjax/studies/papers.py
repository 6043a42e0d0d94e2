"""What the papers of the reproduced systems print: to be compared with, and never in a result."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.tables import normalize_name


@dataclass(frozen=True)
class Paper:
    """One system's paper.

    Attributes:
      source: which paper, and where in it.
      dataset: what it used, by our name.
      test: what its numbers were measured on, in words.
      numbers: what else it prints, as in `papers.json`.
    """

    source: str
    dataset: str
    test: str
    numbers: Mapping[str, Any]

    @classmethod
    def of(cls, system: str) -> "Paper":
        """The paper of a system, by its name."""
        stored = json.loads(files("cxrjax.studies").joinpath("papers.json").read_text("utf-8"))[system]
        return cls(stored.pop("source"), stored.pop("dataset"), stored.pop("test"), stored)

    @cached_property
    def auc(self) -> dict[str, dict[str, float]]:
        """Arm -> finding -> AUC, as far as it is printed."""
        return self.numbers.get("auc", {})

    def of_arm(self, name: str, arm: str) -> Any:
        """What is printed under this name of an arm; None where nothing is."""
        return self.numbers.get(name, {}).get(arm)

    def auc_of(self, arm: str, finding: str) -> float | None:
        """One AUC, whether the finding is written with spaces or underscores; None where it is not printed."""
        printed = {normalize_name(name): value for name, value in self.auc.get(arm, {}).items()}
        return printed.get(normalize_name(finding))

    def mean_auc(self, arm: str) -> float | None:
        """The mean of the printed AUCs of an arm, computed here; None where fewer than two are printed."""
        printed = list(self.auc.get(arm, {}).values())
        return mean_defined(printed) if len(printed) > 1 else None
