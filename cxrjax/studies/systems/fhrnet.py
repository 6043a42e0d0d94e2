"""FHRNet: what fusing the branches gains, beside the paper and its peers, and whether the branches agree with it."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float64
from scipy.special import log_expit
from scipy.stats import rankdata

from cxrjax.evaluate.predictions import Predictions
from cxrjax.evaluate.scores import MEAN, score
from cxrjax.report.content import Section, Table
from cxrjax.studies.armstudy import ArmStudy, Extra
from cxrjax.studies.chapters import interval_cell


def add(study: ArmStudy) -> Extra:
    """Relative gains, and the global-local consistency."""
    consistency, numbers = _consistency(study)
    claims = [
        study.better("fusion", "global", "The fusion is better than the global branch alone"),
        study.better("fusion", "local", "The fusion is better than the local branch alone"),
    ]
    return Extra([_gains(study), consistency], claims, numbers={"consistency": numbers})


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


def _consistency(study: ArmStudy) -> tuple[Section, dict[str, float | None]]:
    branches, fusion = [study.arm(name).test for name in ("global", "local")], study.arm("fusion").test
    both: Predictions = replace(fusion, logit=agreement(branches[0].logit, branches[1].logit))
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
        "probability, which is the prediction. The rank correlation (Spearman) is over the test images.",
    )
    columns = ("Finding", "AUC of the sum of logs", "AUC of the fusion", "Rank correlation")
    section = Section(
        "Global-local consistency", text, tables=[Table("The branches together beside the fusion.", columns, rows)]
    )
    return section, numbers
