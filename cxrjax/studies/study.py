"""The members of a study, and of a resolution study the ensembles they make."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cxrjax.config import Config
from cxrjax.evaluate.ensemble import combine, fit_weights
from cxrjax.evaluate.predict import open_run, predict
from cxrjax.evaluate.predictions import Predictions
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment

STACKED, VOTED = "stacked", "voted"


@dataclass(frozen=True)
class Member:
    """One trained run of the study, with what its best network says of the validation and test parts.

    `name` is what the report calls it.
    """

    name: str
    directory: Path
    experiment: Experiment
    network: Network
    validation: Predictions
    test: Predictions

    @classmethod
    def of(cls, name: str, directory: Path) -> "Member":
        """Open a trained run, predict validation and test, and write both tables beside it."""
        experiment, network, _ = open_run(directory)
        parts = {part: predict(experiment, network, part) for part in ("validation", "test")}
        for part, table in parts.items():
            table.write(directory / "predictions" / f"{part}.parquet")
        return cls(name, directory, experiment, network, **parts)


@dataclass(frozen=True)
class Study:
    """All members: `members[seed][i]` has the i-th size; `control` is trained on a few findings only."""

    config: Config
    members: dict[int, list[Member]]
    control: Member | None

    @property
    def sizes(self) -> list[str]:
        """The names of the sizes."""
        return [member.name for member in self.first]

    @property
    def first(self) -> list[Member]:
        """The members of the first seed: those that the figures show."""
        return next(iter(self.members.values()))

    @cached_property
    def weights(self) -> dict[int, np.ndarray]:
        """The stacked ensemble's f64[K, S] of each seed, learnt on the validation part (equations 2 and 3)."""
        learnt = {}
        for seed, members in self.members.items():
            logits = np.stack([member.validation.logit for member in members])
            learnt[seed] = fit_weights(logits, members[0].validation.label, members[0].validation.known).weights
        return learnt

    @cached_property
    def tables(self) -> dict[str, list[Predictions]]:
        """Test predictions of each model (a size or an ensemble), one table a seed."""
        tables: dict[str, list[Predictions]] = {name: [] for name in (*self.sizes, STACKED, VOTED)}
        for seed, members in self.members.items():
            tests = [member.test for member in members]
            for member in members:
                tables[member.name].append(member.test)
            tables[STACKED].append(combine(tests, self.weights[seed]))
            tables[VOTED].append(combine(tests))
        return tables
