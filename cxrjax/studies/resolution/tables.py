"""Tables of a resolution study: fold by fold, mean and standard deviation, and ours beside the paper's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.scores import MEAN
from cxrjax.metrics.tables import normalize_name
from cxrjax.report.content import Section, Table
from cxrjax.runs.evaluate_run import describe_intervals, read_provenance
from cxrjax.studies.members import LOGISTIC, STACKED, VOTED, Study
from cxrjax.studies.papers import Paper
from cxrjax.studies.resolution.claims import gains_table
from cxrjax.studies.resolution.statements import listed

ENSEMBLE = "ensemble"
"""The paper's name of its ensemble, of which one place says stacking and another averaging."""
_PM = "\u00a0±\u00a0"  # a value and its deviation stay on one line


def aurocs(study: Study) -> dict[str, np.ndarray]:
    """Model -> f64[G, K + 1]: AUROC of each group and finding, and last the mean over that group's findings."""
    values = {name: sample.value[0] for name, sample in study.samples.items()}
    return {
        name: np.column_stack([of, [mean_defined(row) for row in of.tolist()]]) for name, of in values.items()
    }  # fmt: skip


def spread_table(study: Study) -> Table:
    """Mean and standard deviation over the groups, of every model."""
    values = aurocs(study)
    rows = [
        [finding, *(_mean_and_sd(of[:, k]) for of in values.values())]
        for k, finding in enumerate((*study.findings, "Mean"))
    ]
    return Table(f"AUROC over {study.several}, mean ± standard deviation", ["Finding", *values], rows)


def group_section(study: Study) -> Section:
    """Every group by itself."""
    names = [group.called(study.kind) for group in study.groups]
    columns = ("Finding", *(name[0].upper() + name[1:] for name in names), "Mean ± sd")
    tables = [
        Table(
            f"{model}: AUROC in each {study.kind}",
            columns,
            [
                [finding, *map(text_of, of[:, k].tolist()), _mean_and_sd(of[:, k])]
                for k, finding in enumerate((*study.findings, "Mean"))
            ],
        )
        for model, of in aurocs(study).items()
    ]
    weights = np.stack(list(study.weights.values()))
    learnt = Table(
        f"Weights in the stacked ensemble, mean ± standard deviation over {study.several}.",
        ("Finding", *study.sizes),
        [
            [finding, *(_mean_and_sd(weights[:, k, s]) for s in range(len(study.sizes)))]
            for k, finding in enumerate(study.findings)
        ],
    )
    text = (
        f"Each {study.kind} has its own networks and ensembles. Its AUROC is of its own test images; scores of two "
        "networks are never pooled. Standard deviations divide by n - 1.",
    )
    return Section(f"Each {study.kind}", text, tables=[learnt], details=tables)


def paper_section(study: Study) -> Section:
    """The paper's numbers beside ours, and whether they can be compared."""
    paper = Paper.of(study.config.study.paper)
    absent = [name for name in paper.auc if name != ENSEMBLE and name not in study.sizes]
    text = [
        _comparability(study, paper),
        f"The paper: {paper.source}. The caption of its table calls the ensemble averaging, its text stacking. Ours "
        "are means over findings and folds; "
        + ("± is the standard deviation over folds, " if study.several else "")
        + "in brackets the interval.",
    ]
    if absent:
        text.append(f"Sizes of the paper that are not run here: {listed(absent)}; its own numbers are folded away.")
    tables = [_beside(study, paper), gains_table(study), _training(study, paper)]
    if not set(study.sizes).isdisjoint(paper.auc):
        tables.insert(2, _weights_beside(study, paper))
    return Section("Beside the paper", text, tables=tables, details=[_printed(paper)] if absent else [])


def _comparability(study: Study, paper: Paper) -> str:
    scores = study.scores[STACKED]
    split = study.first[0].experiment.split.name
    spread = describe_intervals(scores)
    ours = (
        f"Ours are of {scores.images:,} test images of {scores.patients:,} patients ({study.dataset}, split {split!r}"
        f"{', ' + study.several if study.several else ''}){', with ' + spread if spread else ''}. The paper's are of "
        f"{paper.test}, mean ± standard deviation over its folds."
    )
    if study.dataset == "cxr_phantom":
        return f"Phantom data: not comparable. {ours}"
    if study.dataset != paper.dataset:
        return f"Other data ({study.dataset}; the paper: {paper.dataset}): not comparable. {ours}"
    return f"Comparable as far as folds that are not the same allow. {ours}"


def _beside(study: Study, paper: Paper) -> Table:
    printed = {**{name: name for name in study.sizes if name in paper.auc}, STACKED: ENSEMBLE}
    columns, values = ["Finding", "Positive / images"], aurocs(study)
    for name in (*study.sizes, VOTED, LOGISTIC, STACKED):
        columns += [f"{name}, ours"] + ([f"{printed[name]}, paper"] if name in printed else [])
    rows: list[list[Any]] = []
    for k, finding in enumerate((*study.findings, MEAN)):
        score = study.scores[STACKED].rows()[k]
        shown = finding != MEAN
        count = f"{score['positives']:,}\u00a0/\u00a0{score['positives'] + score['negatives']:,}" if shown else None
        row: list[Any] = [finding if shown else "Mean", count]
        for name in (*study.sizes, VOTED, LOGISTIC, STACKED):
            row.append(_ours(study.scores[name].rows()[k], values[name][:, k]))
            if name in printed:
                row.append(_theirs(paper, printed[name], finding))
        rows.append(row)
    return Table("AUROC, ours and the paper's.", columns, rows)


def _ours(row: Mapping[str, Any], values: np.ndarray) -> str:
    if math.isnan(row["auroc"]):
        return f"n/a ({row['reason']})"
    text = _mean_and_sd(values) if len(values) > 1 else text_of(row["auroc"])
    interval = "" if math.isnan(row["auroc_low"]) else f" ({row['auroc_low']:.3f}–{row['auroc_high']:.3f})"
    return text + interval


def _theirs(paper: Paper, model: str, finding: str) -> str | None:
    if finding == MEAN:
        return f"{paper.numbers['average'][model]:.3f}"
    mean = paper.auc_of(model, finding)
    return None if mean is None else f"{mean:.3f}{_PM}{_of_finding(paper.numbers['sd'][model], finding):.3f}"


def _of_finding(printed: Mapping[str, float], finding: str) -> float:
    return next(value for name, value in printed.items() if normalize_name(name) == normalize_name(finding))


def _printed(paper: Paper) -> Table:
    findings = list(paper.auc[ENSEMBLE])
    rows = [[finding, *(_theirs(paper, model, finding) for model in paper.auc)] for finding in (*findings, MEAN)]
    rows[-1][0] = "Mean"
    return Table("What the paper prints: AUROC, mean ± standard deviation over folds.", ("Finding", *paper.auc), rows)


def _weights_beside(study: Study, paper: Paper) -> Table:
    printed, mean = paper.numbers["weights"], study.mean_weights
    columns: list[str] = ["Finding"]
    for size in study.sizes:
        columns += [f"{size}, ours"] + ([f"{size}, paper"] if size in printed else [])
    rows: list[list[Any]] = []
    for k, finding in enumerate(study.findings):
        row: list[Any] = [finding]
        label_mask = paper.auc_of(ENSEMBLE, finding) is not None
        for s, size in enumerate(study.sizes):
            row.append(float(mean[k, s]))
            if size in printed:
                row.append(_of_finding(printed[size], finding) if label_mask else None)
        rows.append(row)
    return Table("Weights in the stacked ensemble, ours and the paper's.", columns, rows)


def _training(study: Study, paper: Paper) -> Table:
    """The effective batch is the table's on any number of devices."""
    rows = []
    for member in study.first:
        config, about = member.experiment.config, read_provenance(member.directory)
        batch, at_once = config.train.batch, about["identity"]["microbatch size"]
        devices = about["mesh"]["data"]
        how = f"{batch} = {devices} × {at_once // devices} × {batch // at_once}"
        theirs = paper.of_arm("training", member.name) or {}
        rate = theirs.get("rate")
        rows.append([member.name, f"{config.optimizer.rate:.4g}", how, rate and f"{rate:.4g}", theirs.get("batch")])
    columns = ("Size", "Rate, ours", "Batch, ours: devices × images × parts", "Rate, paper", "Batch, paper")
    return Table("Learning rates and effective batches.", columns, rows)


def _mean_and_sd(values: np.ndarray) -> str:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return "n/a"
    return f"{defined.mean():.3f}" + (f"{_PM}{defined.std(ddof=1):.3f}" if len(defined) > 1 else "")


def text_of(value: float) -> str:
    """A score as text."""
    return "n/a" if math.isnan(value) else f"{value:.3f}"
