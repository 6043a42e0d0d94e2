"""The members of a study, and of a resolution study the groups and ensembles they make."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxrjax.config import Config
from cxrjax.console import progress_bar
from cxrjax.distributed.runtime import broadcast_from_main, is_distributed, on_main_process
from cxrjax.files import write_json
from cxrjax.inference.load_run import open_run, predict
from cxrjax.metrics.bootstrap import BootstrapResult
from cxrjax.metrics.comparison import Difference, difference_from_bootstrap, mean_over_folds
from cxrjax.metrics.delong import Estimate
from cxrjax.metrics.ensemble import LogisticStacking, align, combine, fit_logistic, fit_weights
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import Scores, scores_from_bootstrap
from cxrjax.models.network import Network
from cxrjax.train.experiment import Experiment

STACKED, VOTED, LOGISTIC = "stacked", "voted", "logistic"
ENSEMBLES = (STACKED, VOTED, LOGISTIC)


_PARTS = ("validation", "test")


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
        """Open a trained run and predict validation and test, unless both tables lie beside it already."""
        experiment, network, about = open_run(directory)
        folder = directory / "predictions"
        keep_predictions(experiment, network, about, folder)
        return cls(name, directory, experiment, network, **kept_predictions(folder))


def predict_together(directory: Path) -> None:
    """Where there are several processes, they share the predicting of a trained run; else `Member.of` does it."""
    if is_distributed():
        keep_predictions(*open_run(directory), directory / "predictions")


def keep_predictions(experiment: Experiment, network: Network, about: dict[str, Any], folder: Path) -> None:
    """Predict validation and test, unless both tables of this checkpoint lie in the folder already."""
    made, mark = folder / "made-of.json", experiment.fingerprints | about
    if broadcast_from_main(lambda: _read(made) == mark and all(_table(folder, part).is_file() for part in _PARTS)):
        return
    tables = {part: predict(experiment, network, part) for part in _PARTS}

    def write() -> None:
        made.unlink(missing_ok=True)
        for part, table in tables.items():
            table.write(_table(folder, part))
        write_json(made, mark)

    on_main_process(write)


def kept_predictions(folder: Path) -> dict[str, Predictions]:
    """Validation and test as they were written: the same bits each time."""
    return {part: Predictions.read(_table(folder, part)) for part in _PARTS}


def _table(folder: Path, part: str) -> Path:
    return folder / f"{part}.parquet"


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class Group(NamedTuple):
    """What the runs of all sizes have in common: the training seed, and the fold that is tested on, if any."""

    seed: int
    fold: int | None = None

    @property
    def suffix(self) -> str:
        """Ends the names of its runs' directories."""
        return ("" if self.fold is None else f"-fold{self.fold}") + (f"-seed{self.seed}" if self.seed else "")

    def called(self, kind: str) -> str:
        """Its name among others of `kind`, which is `Study.kind`."""
        fold, seed = f"fold {self.fold}", f"training seed {self.seed}"
        return {"fold": fold, "training seed": seed}.get(kind, f"{fold}, {seed}")


@dataclass(frozen=True)
class Study:
    """All members: `members[group][i]` has the i-th size; `control` is trained on a few findings only."""

    config: Config
    members: dict[Group, list[Member]]
    control: Member | None

    @property
    def groups(self) -> list[Group]:
        """Seeds and folds."""
        return list(self.members)

    @property
    def kind(self) -> str:
        """What the groups differ in: "fold", "training seed", or both."""
        if len({group.fold for group in self.members}) == 1:
            return "training seed"
        return "fold" if len({group.seed for group in self.members}) == 1 else "fold and seed"

    @property
    def several(self) -> str:
        """The groups in words, such as "5 folds"; empty where there is one only."""
        names = {"fold": "folds", "training seed": "training seeds"}
        return f"{len(self.members)} {names.get(self.kind, 'folds and seeds')}" if len(self.members) > 1 else ""

    @property
    def first_called(self) -> str:
        """The name of the first group, whose members pictures and curves show."""
        return self.groups[0].called(self.kind)

    @property
    def sizes(self) -> list[str]:
        """The names of the sizes."""
        return [member.name for member in self.first]

    @property
    def first(self) -> list[Member]:
        """The members of the first group: those that pictures and curves show."""
        return next(iter(self.members.values()))

    @property
    def findings(self) -> tuple[str, ...]:
        """What all members but the control learn."""
        return self.first[0].test.findings

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.first[0].experiment.records.dataset

    @cached_property
    def weights(self) -> dict[Group, np.ndarray]:
        """The stacked ensemble's f64[K, S] of each group, learnt on its validation part (equations 2 and 3)."""
        return {group: fit_weights(*_learnt_from(members)).weights for group, members in self.members.items()}

    @property
    def mean_weights(self) -> np.ndarray:
        """The weights' mean over the groups, f64[K, S]."""
        return np.mean(list(self.weights.values()), axis=0)

    @cached_property
    def regressions(self) -> dict[Group, LogisticStacking]:
        """The logistic ensemble of each group, learnt on its validation part."""
        return {group: fit_logistic(*_learnt_from(members)) for group, members in self.members.items()}

    @cached_property
    def tables(self) -> dict[str, list[Predictions]]:
        """Test predictions of each model (a size or an ensemble), one table a group."""
        tables: dict[str, list[Predictions]] = {name: [] for name in (*self.sizes, *ENSEMBLES)}
        for group, members in self.members.items():
            tests = [member.test for member in members]
            for member in members:
                tables[member.name].append(member.test)
            for name, learnt in ((STACKED, self.weights[group]), (VOTED, None), (LOGISTIC, self.regressions[group])):
                tables[name].append(combine(tests, learnt))
        return tables

    @cached_property
    def samples(self) -> dict[str, BootstrapResult]:
        """Each model measured on all its tables; there are always draws, for the intervals of differences."""
        resamples = self.config.evaluate.resamples or 1000
        with progress_bar("drawing patients", len(self.tables), unit="models") as advance:
            measured = {}
            for name, tables in self.tables.items():
                measured[name] = BootstrapResult.from_tables(tables, resamples=resamples)
                advance()
        return measured

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Of each model, means over the groups."""
        evaluate = self.config.evaluate
        samples = self.samples
        if not evaluate.resamples:
            samples = {name: BootstrapResult.from_tables(tables, resamples=0) for name, tables in self.tables.items()}
        return {name: scores_from_bootstrap(sample, confidence=evaluate.confidence) for name, sample in samples.items()}

    def gain(self, first: str, second: str, findings: Sequence[str]) -> Difference:
        """The mean AUROC of one model over some findings less that of another.

        Its interval comes of drawing test patients in pairs; over folds it is `widened`.
        """
        confidence = self.config.evaluate.confidence
        found = difference_from_bootstrap(self.samples[first], self.samples[second], findings, confidence=confidence)
        low, high = self.widened(found.low, found.high, found.per_table)
        return replace(found, low=low, high=high)

    def over_folds(self, each: Sequence[float]) -> Estimate | None:
        """What the folds say of the mean of one value a group; None where there are not several."""
        folds = [group.fold for group in self.groups]
        if len(set(folds)) < 2 or not len(each):
            return None
        values = [float(np.mean([v for v, of in zip(each, folds, strict=True) if of == fold])) for fold in set(folds)]
        train, validation, _ = self.config.split.fractions
        tested = 1 / self.config.split.folds
        return mean_over_folds(values, test_to_train=tested / ((1 - tested) * train / (train + validation)))

    def widened(self, low: float, high: float, each: Sequence[float]) -> tuple[float, float]:
        """An interval that comes of the test patients, widened to the one that comes of how folds differ.

        The former holds for these networks; the latter counts what another training would change, too.
        """
        found = self.over_folds(each)
        if found is None:
            return low, high
        bounds = found.interval(self.config.evaluate.confidence)
        return float(np.fmin(low, bounds[0])), float(np.fmax(high, bounds[1]))

    def agreeing(self, gain: Difference) -> str:
        """In how many groups a difference has the sign of its mean, as the end of a sentence."""
        if not self.several or np.isnan(gain.value):
            return ""
        same = sum(np.sign(each) == np.sign(gain.value) for each in gain.per_table)
        return f"; {'below' if gain.value < 0 else 'above'} 0 in {same} of {self.several}"


def _learnt_from(members: Sequence[Member]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validation logits of each size, labels, and which of them are known."""
    tables = align([member.validation for member in members])
    return np.stack([table.logit for table in tables]), tables[0].label, tables[0].label_mask
