"""FHRNet: what fusing the branches gains, beside the paper and its peers, and whether the branches agree with it."""

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
from cxrjax.inference.load_run import open_run
from cxrjax.metrics import tables
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN, score
from cxrjax.models.fhrnet import ARCHITECTURES
from cxrjax.models.network import Network
from cxrjax.report.content import Section, Table
from cxrjax.studies.framework import ArmStudy, Extra
from cxrjax.studies.members import Member, keep_predictions, kept_predictions, predict_together
from cxrjax.studies.sections import interval_cell
from cxrjax.train.experiment import Experiment
from cxrjax.train.stages import stage_places, train_stages

HEADS = ("global", "local", "fusion")
"""Arms that are heads of one network where it is not trained in stages."""


def check(config: Config) -> None:
    """Refuse arms that are neither as many as stages nor heads of one FHRNet."""
    names, stages, options = config.study.arms, config.train.stages, config.model.options
    key = f"config key study.arms is {names}"
    if stages and len(stages) != len(names):
        raise CxrError(f"{key}, a name for each of train.stages, of which there are {len(stages)}")
    joint = config.model.name in ARCHITECTURES and options.get("stage", "joint") == "joint"
    if not stages and not (joint and set(names) <= set(HEADS)):
        raise CxrError(
            f"{key}, a name for each of train.stages, of which there are 0; without stages the network must be an "
            f"fhrnet with model.options.stage=joint, and the arms its heads {', '.join(HEADS)}"
        )


def run_of(config: Config) -> str:
    """The name of the one run."""
    return "stages" if config.train.stages else config.train.heads


def train(config: Config, folder: Path) -> None:
    """Train; several processes predict together then."""
    run = folder / run_of(config)
    train_stages(config, run)
    if config.train.stages:
        for place in stage_places(config, run):
            predict_together(place)
    elif is_distributed():
        for name in config.study.arms:
            keep_predictions(*_open_head(name, run), run / "predictions" / name)


def members(config: Config, folder: Path) -> list[Member]:
    """The arms of what was trained: the stages of the run, or the heads of its network."""
    run = folder / run_of(config)
    if config.train.stages:
        return [Member.of(*each) for each in zip(config.study.arms, stage_places(config, run), strict=True)]
    return [_head(name, run) for name in config.study.arms]


def _head(name: str, run: Path) -> Member:
    experiment, network, about = _open_head(name, run)
    folder = run / "predictions" / name
    keep_predictions(experiment, network, about, folder)
    return Member(name, run, experiment, network, **kept_predictions(folder))


def _open_head(name: str, run: Path) -> tuple[Experiment, Network, dict[str, Any]]:
    """One head of a network that was trained with all of them: the network in the stage of that head."""
    whole, network, about = open_run(run)
    changes = ["model.options.prediction=fusion", f"model.options.stage={name}"]
    experiment = replace(whole, config=with_overrides(whole.config, changes))
    return experiment, replace(network, definition=experiment.network.definition), about


def add(study: ArmStudy) -> Extra:
    """Relative gains, and the global-local consistency."""
    consistency, numbers = _consistency(study)
    claims = [
        study.better("fusion", "global", "The fusion is better than the global branch alone"),
        study.better("fusion", "local", "The fusion is better than the local branch alone"),
    ]
    notes = []
    if len({member.directory for member in study.members}) == 1:
        how = "one head's loss a step, in turn" if study.config.train.heads == "alternating" else "the sum of losses"
        notes = [
            f"The arms are heads of one network, trained together ({how}) and kept at the prediction's best epoch."
        ]
    return Extra([_gains(study), consistency], claims, notes, numbers={"consistency": numbers})


def _gains(study: ArmStudy) -> Section:
    """The fusion's AUC over that of its branches, in percent; the paper's gains are computed from its table."""
    ours = {name: {row["finding"]: row["auroc"] for row in of.rows()} for name, of in study.scores.items()}
    paper, peers = study.paper, study.paper.numbers["others"]
    rows = []
    for finding in (*study.findings, MEAN):
        row: list[str | None] = ["Mean" if finding == MEAN else finding]
        for branch in ("global", "local"):
            row.append(gain(ours["fusion"][finding], ours[branch][finding]))
            row.append(gain(_printed(study, "fusion", finding), _printed(study, branch, finding)))
        for peer in peers.values():
            theirs = float(np.mean(list(peer.values()))) if finding == MEAN else peer.get(finding)
            row.append(gain(_printed(study, "fusion", finding), theirs))
            if study.comparable:
                row.append(gain(ours["fusion"][finding], theirs))
        rows.append(row)
    columns = ["Finding"]
    columns += [f"over {branch}, {whose}" for branch in ("global", "local") for whose in ("ours", "paper")]
    for peer in peers:
        columns += [f"over {peer}, paper", *([f"over {peer}, ours"] if study.comparable else [])]
    text = (
        "By how many percent the fusion's AUC exceeds that of each branch alone, and that of earlier systems as the "
        f"paper quotes them. Means are computed from the findings' AUCs, not copied. The paper: {paper.source}.",
    )
    return Section("What the fusion gains", text, tables=[Table("Relative gain in AUC, percent.", columns, rows)])


def _printed(study: ArmStudy, arm: str, finding: str) -> float | None:
    return study.paper.mean_auc(arm) if finding == MEAN else study.paper.auc_of(arm, finding)


def gain(value: float | None, base: float | None) -> str | None:
    """How many percent a value is above another; None where one is missing or undefined."""
    if value is None or base is None or np.isnan(value + base) or base == 0:
        return None
    return f"{100 * (value / base - 1):+.1f}"


def agreement(first: Float64[np.ndarray, "N K"], second: Float64[np.ndarray, "N K"]) -> Float64[np.ndarray, "N K"]:
    """Logits of the geometric mean of two probabilities, which rank as log p_first + log p_second does."""
    log_p = np.minimum((log_expit(first) + log_expit(second)) / 2, -1e-300)
    return log_p - np.log(-np.expm1(log_p))


def _write_sums(path: Path, branches: list[Predictions], fusion: Predictions) -> None:
    """Of each test image and finding F: `sum_F` = log p_global + log p_local, and the fusion's `prob_F`."""
    total = log_expit(branches[0].logit) + log_expit(branches[1].logit)
    columns = {"id": pa.array(fusion.id)}
    for prefix, values in (("sum", total), ("prob", fusion.probability)):
        columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(fusion.findings)}
    tables.write(path, pa.table(columns))


def _consistency(study: ArmStudy) -> tuple[Section, dict[str, float | None]]:
    branches, fusion = [study.arm(name).test for name in ("global", "local")], study.arm("fusion").test
    both: Predictions = replace(fusion, logit=agreement(branches[0].logit, branches[1].logit))
    _write_sums(study.arm("fusion").directory / "predictions" / "consistency.parquet", branches, fusion)
    table = score(both, **study.drawing)
    ours = {row["finding"]: row for row in study.scores["fusion"].rows()}
    rows, numbers = [], {}
    for k, row in enumerate(table.rows()):
        finding, rank = row["finding"], None
        if finding != MEAN and min(np.ptp(each.logit[:, k]) for each in (both, fusion)) > 0:
            rank = float(np.corrcoef([rankdata(each.logit[:, k]) for each in (both, fusion)])[0, 1])
        numbers[finding] = rank
        shown = None if rank is None else f"{rank:.2f}"
        rows.append(["Mean" if finding == MEAN else finding, interval_cell(row), interval_cell(ours[finding]), shown])
    text = (
        "The score log p_global + log p_local, which the paper wants to be consistent, beside the fusion's own "
        "probability, which is the prediction. The rank correlation (Spearman) is over the test images. Both scores of "
        "every image are in predictions/consistency.parquet of the fusion's run.",
    )
    columns = ("Finding", "AUC of the sum of logs", "AUC of the fusion", "Rank correlation")
    section = Section(
        "Global-local consistency", text, tables=[Table("The branches together beside the fusion.", columns, rows)]
    )
    return section, numbers
