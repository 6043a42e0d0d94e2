"""FHRNet: what fusing the branches gains, and whether the branches agree with the fusion."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from scipy.special import log_expit
from scipy.stats import rankdata

from cxrjax.config import Config, with_overrides
from cxrjax.distributed.runtime import is_distributed
from cxrjax.errors import CxrError
from cxrjax.inference.load_run import load_run
from cxrjax.metrics import tables
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN, score
from cxrjax.models.fhrnet import ARCHITECTURES
from cxrjax.models.network import Network
from cxrjax.report.content import Section, Table
from cxrjax.studies.members import Member, predict_in_all_processes, write_predictions
from cxrjax.studies.sections import format_score
from cxrjax.studies.study import Study, System, SystemResults
from cxrjax.train.experiment import Experiment
from cxrjax.train.stages import stage_directories

HEADS = ("global", "local", "fusion")
"""Arms that are heads of one network, if it is not trained in stages."""


class FHRNet(System):
    """A global branch, a local branch and their fusion, trained in one run: in stages or together."""

    required_arms = HEADS

    def plan(self, spec: str, overrides: Sequence[str], config: Config) -> dict[str, Config]:
        """Return the single run; refuse arms that are neither its stages nor heads of a joint FHRNet."""
        names, stages, options = config.study.arms, config.train.stages, config.model.options
        key = f"config key study.arms is {names}"
        if stages and len(stages) != len(names):
            raise CxrError(f"{key}: give one name for each of the {len(stages)} train.stages")
        joint = config.model.name in ARCHITECTURES and options.get("stage", "joint") == "joint"
        if not stages and not (joint and set(names) <= set(HEADS)):
            raise CxrError(
                f"{key}, but train.stages is empty: give one stage for each arm, or use an fhrnet with "
                f"model.options.stage=joint and its heads {', '.join(HEADS)} as arms"
            )
        return {_run_name(config): config}

    def predict(self, config: Config, run: Path) -> None:
        """Predict each stage or each head in all processes."""
        if config.train.stages:
            for directory in stage_directories(config, run):
                predict_in_all_processes(directory)
        elif is_distributed():
            for name in config.study.arms:
                write_predictions(*_load_head(name, run), run / "predictions" / name)

    def load_members(self, config: Config, folder: Path) -> list[Member]:
        """Load the stages of the run, or the heads of its network."""
        run = folder / _run_name(config)
        if config.train.stages:
            pairs = zip(config.study.arms, stage_directories(config, run), strict=True)
            return [Member.from_run(name, directory) for name, directory in pairs]
        return [
            Member.from_network(name, run, *_load_head(name, run), run / "predictions" / name)
            for name in config.study.arms
        ]

    def summarize(self, study: Study) -> SystemResults:
        """Return relative gains and the global-local consistency, and test whether the fusion beats each branch."""
        consistency, numbers = _consistency(study)
        claims = [
            study.better_claim("fusion", "global", "The fusion is better than the global branch alone"),
            study.better_claim("fusion", "local", "The fusion is better than the local branch alone"),
        ]
        notes = []
        if len(study.runs) == 1:
            alternating = study.config.train.heads == "alternating"
            how = "the loss of one head per step, in turn" if alternating else "the sum of the losses"
            notes = [
                f"The arms are heads of one network, trained together on {how}. The checkpoint is from the best epoch "
                "of the prediction."
            ]
        return SystemResults([_gains(study), consistency], claims, notes, numbers={"consistency": numbers})


def _run_name(config: Config) -> str:
    return "stages" if config.train.stages else config.train.heads


def _load_head(name: str, run: Path) -> tuple[Experiment, Network, dict[str, Any]]:
    """Load one head of a network that was trained with all heads: the network in the stage of that head."""
    joint, network, checkpoint = load_run(run)
    overrides = ["model.options.prediction=fusion", f"model.options.stage={name}"]
    experiment = replace(joint, config=with_overrides(joint.config, overrides))
    return experiment, replace(network, definition=experiment.network.definition), checkpoint


def _gains(study: Study) -> Section:
    """Show the fusion's AUC relative to that of its branches; the paper's gains are computed from its table."""
    ours = {name: {row["finding"]: row["auroc"] for row in scores.rows()} for name, scores in study.scores.items()}
    paper, others = study.paper, study.paper.numbers["others"]
    rows = []
    for finding in (*study.findings, MEAN):
        row: list[str | None] = ["Mean" if finding == MEAN else finding]
        printed = {arm: paper.mean_auc(arm) if finding == MEAN else paper.finding_auc(arm, finding) for arm in HEADS}
        for branch in ("global", "local"):
            row.append(relative_gain(ours["fusion"][finding], ours[branch][finding]))
            row.append(relative_gain(printed["fusion"], printed[branch]))
        for aucs in others.values():
            other = float(np.mean(list(aucs.values()))) if finding == MEAN else aucs.get(finding)
            row.append(relative_gain(printed["fusion"], other))
            if study.is_comparable:
                row.append(relative_gain(ours["fusion"][finding], other))
        rows.append(row)
    columns = ["Finding"]
    columns += [f"over {branch}, {source}" for branch in ("global", "local") for source in ("ours", "paper")]
    for other in others:
        columns += [f"over {other}, paper", *([f"over {other}, ours"] if study.is_comparable else [])]
    text = (
        "The percentage by which the fusion's AUC exceeds that of each branch alone, and that of earlier systems as "
        f"the paper quotes them. Means are computed from the findings' AUCs, not copied. The paper: {paper.source}.",
    )
    return Section("What the fusion gains", text, tables=[Table("Relative gain in AUC, percent.", columns, rows)])


def relative_gain(value: float | None, base: float | None) -> str | None:
    """Return the gain of a value over another in percent; None if one is missing or undefined."""
    if value is None or base is None or np.isnan(value + base) or base == 0:
        return None
    return f"{100 * (value / base - 1):+.1f}"


def geometric_mean_logits(
    first: Float64[np.ndarray, "N K"], second: Float64[np.ndarray, "N K"]
) -> Float64[np.ndarray, "N K"]:
    """Return logits of the geometric mean of two probabilities; they rank as log p_first + log p_second does."""
    log_p = np.minimum((log_expit(first) + log_expit(second)) / 2, -1e-300)
    return log_p - np.log(-np.expm1(log_p))


def _consistency(study: Study) -> tuple[Section, dict[str, float | None]]:
    first, second, fusion = (study.arm(name).test for name in HEADS)
    both: Predictions = replace(fusion, logit=geometric_mean_logits(first.logit, second.logit))
    _write_sums(study.arm("fusion").directory / "predictions" / "consistency.parquet", (first, second), fusion)
    ours = {row["finding"]: row for row in study.scores["fusion"].rows()}
    rows, numbers = [], {}
    for k, row in enumerate(score(both, **study.bootstrap_options).rows()):
        finding, correlation = row["finding"], None
        if finding != MEAN and min(np.ptp(table.logit[:, k]) for table in (both, fusion)) > 0:
            ranks = [rankdata(table.logit[:, k]) for table in (both, fusion)]
            correlation = float(np.corrcoef(ranks)[0, 1])
        numbers[finding] = correlation
        shown = None if correlation is None else f"{correlation:.2f}"
        rows.append(["Mean" if finding == MEAN else finding, format_score(row), format_score(ours[finding]), shown])
    text = (
        "The score log p_global + log p_local, which should be consistent according to the paper, beside the fusion's "
        "own probability, which is the prediction. The rank correlation (Spearman) is over the test images. Both "
        "scores of every image are in predictions/consistency.parquet of the fusion's run.",
    )
    columns = ("Finding", "AUC of the sum of logs", "AUC of the fusion", "Rank correlation")
    table = Table("The branches together beside the fusion.", columns, rows)
    return Section("Global-local consistency", text, tables=[table]), numbers


def _write_sums(path: Path, branches: Sequence[Predictions], fusion: Predictions) -> None:
    """Write for each test image and finding F: `sum_F` = log p_global + log p_local, and `prob_F` of the fusion."""
    total = log_expit(branches[0].logit) + log_expit(branches[1].logit)
    columns = {"id": pa.array(fusion.id)}
    for prefix, values in (("sum", total), ("prob", fusion.probability)):
        columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(fusion.findings)}
    tables.write(path, pa.table(columns))
