"""The resolution study: runs of several image sizes in groups (folds, training seeds), and their ensembles."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cxrjax.config import Config
from cxrjax.console import progress_bar
from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import BootstrapResult
from cxrjax.metrics.comparison import Difference, Estimate, difference_from_bootstrap, mean_over_folds
from cxrjax.metrics.ensemble import LogisticStacking, align, combine, fit_logistic, fit_weights
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import Scores, scores_from_bootstrap
from cxrjax.studies.members import Member
from cxrjax.studies.study import Study

STACKED, VOTED, LOGISTIC = "stacked", "voted", "logistic"
ENSEMBLES = (STACKED, VOTED, LOGISTIC)


class Group(NamedTuple):
    """One run of each size: they share the training seed and the test fold (None without folds)."""

    seed: int
    fold: int | None = None

    @property
    def suffix(self) -> str:
        """End of the names of the group's run directories."""
        return ("" if self.fold is None else f"-fold{self.fold}") + (f"-seed{self.seed}" if self.seed else "")

    def label(self, group_kind: str) -> str:
        """Return its name in the report; `group_kind` is that of `ResolutionStudy`."""
        fold, seed = f"fold {self.fold}", f"training seed {self.seed}"
        return {"fold": fold, "training seed": seed}.get(group_kind, f"{fold}, {seed}")


@dataclass(frozen=True)
class ResolutionStudy(Study):
    """Runs of all sizes in all groups.

    Attributes:
      groups: one member per size in each group; `members` are those of the first group.
      control: the run trained on a few findings only; it is part of no ensemble.
    """

    groups: dict[Group, list[Member]] = field(default_factory=dict)
    control: Member | None = None

    @classmethod
    def from_groups(
        cls, config: Config, groups: dict[Group, list[Member]], control: Member | None = None
    ) -> "ResolutionStudy":
        """Create a study whose figures show the first group."""
        return cls(config, next(iter(groups.values())), config.study.paper, groups=groups, control=control)

    @property
    def group_kind(self) -> str:
        """How the groups differ: "fold", "training seed" or "fold and seed"."""
        if len({group.fold for group in self.groups}) == 1:
            return "training seed"
        return "fold" if len({group.seed for group in self.groups}) == 1 else "fold and seed"

    @property
    def group_count(self) -> str:
        """Number of groups as text, such as "5 folds"; empty for a single group."""
        plurals = {"fold": "folds", "training seed": "training seeds"}
        return f"{len(self.groups)} {plurals.get(self.group_kind, 'folds and seeds')}" if len(self.groups) > 1 else ""

    @property
    def group_labels(self) -> list[str]:
        """Names of the groups in the report."""
        return [group.label(self.group_kind) for group in self.groups]

    @cached_property
    def weights(self) -> dict[Group, np.ndarray]:
        """Weights f64[K, S] of each group's stacked ensemble, fitted on validation (equations 2 and 3)."""
        return {group: fit_weights(*_validation_data(members)).weights for group, members in self.groups.items()}

    @property
    def mean_weights(self) -> np.ndarray:
        """Mean of the weights over the groups, f64[K, S]."""
        return np.mean(list(self.weights.values()), axis=0)

    @cached_property
    def regressions(self) -> dict[Group, LogisticStacking]:
        """Each group's logistic ensemble, fitted on validation."""
        return {group: fit_logistic(*_validation_data(members)) for group, members in self.groups.items()}

    @cached_property
    def tables(self) -> dict[str, list[Predictions]]:
        """Test predictions of each model (a size or an ensemble), one table per group."""
        tables: dict[str, list[Predictions]] = {name: [] for name in (*self.arms, *ENSEMBLES)}
        for group, members in self.groups.items():
            tests = [member.test for member in members]
            for member in members:
                tables[member.name].append(member.test)
            for name, fit in ((STACKED, self.weights[group]), (VOTED, None), (LOGISTIC, self.regressions[group])):
                tables[name].append(combine(tests, fit))
        return tables

    @cached_property
    def bootstraps(self) -> dict[str, BootstrapResult]:
        """Bootstrap of each model over all its tables; always with resamples, for the intervals of differences."""
        resamples, results = self.bootstrap_options["resamples"], {}
        with progress_bar("bootstrap over patients", len(self.tables), unit="models") as advance:
            for name, tables in self.tables.items():
                results[name] = BootstrapResult.from_tables(tables, resamples=resamples)
                advance()
        return results

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Test scores of each model, means over the groups."""
        evaluate, bootstraps = self.config.evaluate, self.bootstraps
        if not evaluate.bootstrap_resamples:
            bootstraps = {
                name: BootstrapResult.from_tables(tables, resamples=0) for name, tables in self.tables.items()
            }
        return {
            name: scores_from_bootstrap(result, confidence=evaluate.confidence_level)
            for name, result in bootstraps.items()
        }

    @cached_property
    def group_aurocs(self) -> dict[str, np.ndarray]:
        """AUROCs f64[G, K + 1] of each model: groups by findings, and last the mean over findings."""
        values = {name: result.value[0] for name, result in self.bootstraps.items()}
        return {
            name: np.column_stack([rows, [mean_defined(row) for row in rows.tolist()]]) for name, rows in values.items()
        }

    def difference(self, first: str, second: str, findings: Sequence[str]) -> Difference:
        """Return the difference of two models' mean AUROC over some findings.

        The interval comes from paired bootstrap over test patients; with several folds, see `widen_interval`.
        """
        confidence = self.config.evaluate.confidence_level
        result = difference_from_bootstrap(
            self.bootstraps[first], self.bootstraps[second], findings, confidence=confidence
        )
        low, high = self.widen_interval(result.low, result.high, result.per_table)
        return replace(result, low=low, high=high)

    def estimate_over_folds(self, group_values: Sequence[float]) -> Estimate | None:
        """Return the estimate of a mean from its values per group; None without several folds."""
        folds = [group.fold for group in self.groups]
        if len(set(folds)) < 2 or not len(group_values):
            return None
        pairs = list(zip(group_values, folds, strict=True))
        means = [float(np.mean([value for value, fold in pairs if fold == wanted])) for wanted in set(folds)]
        train, validation, _ = self.config.split.fractions
        test = 1 / self.config.split.folds
        return mean_over_folds(means, test_to_train=test / ((1 - test) * train / (train + validation)))

    def widen_interval(self, low: float, high: float, group_values: Sequence[float]) -> tuple[float, float]:
        """Widen an interval over test patients so that it covers the interval over folds.

        The former holds for these trained networks; the latter includes the variation between trainings.
        """
        estimate = self.estimate_over_folds(group_values)
        if estimate is None:
            return low, high
        bounds = estimate.interval(self.config.evaluate.confidence_level)
        return float(np.fmin(low, bounds[0])), float(np.fmax(high, bounds[1]))

    def describe_agreement(self, difference: Difference) -> str:
        """Return in how many groups a difference has the sign of its mean, as the end of a sentence."""
        if not self.group_count or np.isnan(difference.value):
            return ""
        same = sum(np.sign(value) == np.sign(difference.value) for value in difference.per_table)
        return f"; {'below' if difference.value < 0 else 'above'} 0 in {same} of {self.group_count}"


def _validation_data(members: Sequence[Member]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return validation logits of each size, labels and label mask."""
    tables = align([member.validation for member in members])
    return np.stack([table.logit for table in tables]), tables[0].label, tables[0].label_mask
