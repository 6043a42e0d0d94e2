"""Report of the resolution study: introduction, limitations, tables, and ours beside the paper's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.metrics.scores import MEAN, score
from cxrjax.metrics.tables import normalize_name
from cxrjax.report import page, style
from cxrjax.report.content import Cam, ErfMap, Section, StudyReport, Table
from cxrjax.runs.evaluate_run import describe_intervals, read_provenance, roc_curves
from cxrjax.runs.explain_run import compute_cams, make_cam
from cxrjax.studies.members import Member
from cxrjax.studies.resolution.claims import ensemble_gains, make_claims
from cxrjax.studies.resolution.study import ENSEMBLES, LOGISTIC, STACKED, VOTED, ResolutionStudy
from cxrjax.studies.sections import PAPER_SECTION, SINGLE_TRAINING_NOTE, format_score
from cxrjax.studies.study import Paper, comparability, join_names, shared_provenance, training_curves, write_study

ENSEMBLE = "ensemble"
"""Name of the paper's ensemble, which one passage calls stacking and another averaging."""
PHANTOM_NOTES = (
    "The radiographs of this study are drawn by a program. They show that the pipeline works from files to this "
    "report, and that a finding drawn finer needs more pixels. They show nothing about patients: real findings are not "
    "independent, their sizes overlap, and labels from reports contain errors that are not simulated here.",
    "The networks are small and trained for minutes. If a coarse finding is detected less well in larger images, the "
    "cause may be this small budget or learning all findings together, and not the image size. The control run tests "
    "this: the same network, at the largest size, on the same images, learns only the coarse findings.",
)
_PLUS_MINUS = "\u00a0±\u00a0"  # non-breaking: a value and its deviation stay on one line


def write_report(study: ResolutionStudy, erfs: Mapping[str, Sequence[ErfMap]], directory: Path) -> dict[str, Any]:
    """Write everything that the study found to `directory`, and return the content of `study.json`.

    Args:
      study: its members and ensembles.
      erfs: receptive fields of each size, one per group.
      directory: study directory.
    """
    intervals = describe_intervals(study.scores[STACKED])
    by_fold = ", stratified by fold" if study.group_count and study.group_kind != "training seed" else ""
    report = StudyReport(
        title=study.config.title or "Resolution study",
        findings=study.findings,
        sizes=study.arms,
        scores={name: scores.rows() for name, scores in study.scores.items()},
        ensembles=ENSEMBLES,
        lead=_introduction(study),
        claims=make_claims(study, erfs),
        notes=_limitations(study),
        interval=intervals and intervals + by_fold,
        weights=study.mean_weights,
        curves={name: roc_curves(tables[0]) for name, tables in study.tables.items()},
        training=training_curves(study),
        erfs={name: maps[0] for name, maps in erfs.items()},
        cams=_cams(study),
        image_sizes=_image_sizes(study.members[0]),
        control=_control_table(study),
        tables=[_spread_table(study)] if study.group_count else [],
        sections=([_group_section(study)] if study.group_count else [])
        + ([_paper_section(study)] if study.paper_name else []),
        provenance=_provenance(study),
    )
    for name in ENSEMBLES:
        for group, table in zip(study.groups, study.tables[name], strict=True):
            table.write(directory / "predictions" / f"{name}{group.suffix}.parquet")
    style.save(page.summary(report), directory / "figures" / "summary.png")
    return write_study(study, report, _numbers(study, erfs), directory)


def _introduction(study: ResolutionStudy) -> list[str]:
    means = {name: scores.mean.auroc for name, scores in study.scores.items()}
    best = max(study.arms, key=lambda name: means[name])
    model, examples = study.config.model.name, study.members[0].experiment.examples_by_split
    train, validation, tested = (len(examples[split].row) for split in ("train", "validation", "test"))
    if study.group_kind == "training seed":
        design = (
            f"{model} was trained at {join_names(study.arms)} on {train:,} images of {study.dataset}. Each run kept "
            f"its best epoch on {validation:,} validation images, on which the ensemble weights were fitted too. All "
            f"scores are from {tested:,} test images of other patients."
        )
    else:
        design = (
            f"{model} was trained at {join_names(study.arms)} in {study.group_count} of {study.dataset}; "
            f"{study.group_labels[0]} has {train:,} training images. Each run kept its best epoch on the "
            f"{validation:,} validation images of its fold, on which the ensembles were fitted too. All scores are "
            f"means over {study.group_count}, from {study.scores[STACKED].images:,} test images of "
            f"{study.scores[STACKED].patients:,} patients in total. No patient is in two splits of a fold or in the "
            "test split of two folds."
        )
    return [
        design,
        f"The best single size on average is {best} (mean AUROC {means[best]:.3f}). The stacked ensemble reaches "
        f"{means[STACKED]:.3f}, plain voting {means[VOTED]:.3f}, and logistic stacking {means[LOGISTIC]:.3f}.",
    ]


def _limitations(study: ResolutionStudy) -> list[str]:
    """Say what the study does and does not show."""
    notes = [*PHANTOM_NOTES[: 2 if study.control else 1]] if study.is_phantom else []
    if not study.group_count:
        notes.append(SINGLE_TRAINING_NOTE)
    else:
        notes.append(
            f"Scores, intervals and claims are averages over {study.group_count}. ROC curves, loss curves, activation "
            f"maps and receptive field maps are from {study.group_labels[0]}."
        )
        notes.append(
            "Intervals come from resampling test patients. The standard deviations over "
            f"{study.group_count} show how much another training would change."
            if study.group_kind == "training seed"
            else "Intervals of scores come from resampling test patients within each fold; they hold for these trained "
            "networks. Intervals of differences, which decide the claims, are the wider of that interval and the "
            "corrected t-test over folds (Nadeau and Bengio 2003), which includes the variation between trainings."
        )
    if reasons := _voting_reasons(study):
        notes.append(
            "Logistic stacking falls back to voting where the validation labels define no regression: "
            f"{join_names(reasons)}."
        )
    if study.paper_name and study.members[0].experiment.records.original_sizes is None:
        notes.append(
            "The scatter plot of original image sizes is missing, because the records hold no sizes of original "
            "images: the images are synthetic, or were prepared by a version that did not store sizes."
        )
    return notes


def _voting_reasons(study: ResolutionStudy) -> list[str]:
    """Return the findings without a logistic regression, each with the reason."""
    pairs = (pair for fit in study.regressions.values() for pair in zip(study.findings, fit.voted, strict=True))
    return list(dict.fromkeys(f"{finding} ({reason})" for finding, reason in pairs if reason))


def _cams(study: ResolutionStudy) -> dict[str, dict[str, Cam]]:
    """Return, for each finding, every size's map of the positive test image with the highest ensemble logit."""
    stacked, experiment = study.tables[STACKED][0], study.members[0].experiment
    rows = {}
    for k, finding in enumerate(stacked.findings):
        positives = np.flatnonzero((stacked.label[:, k] > 0.5) & stacked.label_mask[:, k])
        if len(positives):
            rows[finding] = int(experiment.examples("test").row[positives[stacked.logit[positives, k].argmax()]])
    grid: dict[str, dict[str, Cam]] = {finding: {} for finding in rows}
    for member in study.members:
        cams = compute_cams(member.experiment, member.network, np.unique(list(rows.values())), stacked.findings)
        for finding, row in rows.items():
            [probability] = cams.probability[cams.row == row]
            likely = {name: float(p) for name, p in zip(cams.findings, probability, strict=True) if p > 0.5}
            grid[finding][member.name] = replace(make_cam(member.experiment, cams, finding, row), positives=likely)
    return grid


def _image_sizes(member: Member) -> np.ndarray | None:
    """Return width and height of the original images of all splits; None if the records do not hold them."""
    sizes = member.experiment.records.original_sizes
    rows = [examples.row for examples in member.experiment.examples_by_split.values()]
    return None if sizes is None else sizes[np.concatenate(rows)]


def _control_table(study: ResolutionStudy) -> Table | None:
    if study.control is None:
        return None
    name, test = study.control.name, study.control.test
    columns, predictions = ["Finding", f"{name}, alone"], [test]
    if name in study.arms:
        columns.append(f"{name}, all findings together")
        predictions.append(study.arm(name).test.select(test.findings))
    models = [{row["finding"]: row["auroc"] for row in score(table, resamples=0).rows()} for table in predictions]
    rows = [[finding, *(_mean_and_sd(np.array([model[finding]])) for model in models)] for finding in models[0]]
    return Table("AUROC of the same network trained on these findings only", columns, rows)


def _spread_table(study: ResolutionStudy) -> Table:
    aurocs = study.group_aurocs
    rows = [
        [finding, *(_mean_and_sd(values[:, k]) for values in aurocs.values())]
        for k, finding in enumerate((*study.findings, "Mean"))
    ]
    return Table(f"AUROC over {study.group_count}, mean ± standard deviation", ["Finding", *aurocs], rows)


def _group_section(study: ResolutionStudy) -> Section:
    """Show every group separately."""
    columns = ("Finding", *(name[0].upper() + name[1:] for name in study.group_labels), "Mean ± sd")
    tables = [
        Table(
            f"{model}: AUROC in each {study.group_kind}",
            columns,
            [
                [finding, *(_mean_and_sd(value) for value in values[:, [k]]), _mean_and_sd(values[:, k])]
                for k, finding in enumerate((*study.findings, "Mean"))
            ],
        )
        for model, values in study.group_aurocs.items()
    ]
    weights = np.stack(list(study.weights.values()))
    weights_table = Table(
        f"Weights in the stacked ensemble, mean ± standard deviation over {study.group_count}.",
        ("Finding", *study.arms),
        [
            [finding, *(_mean_and_sd(weights[:, k, s]) for s in range(len(study.arms)))]
            for k, finding in enumerate(study.findings)
        ],
    )
    text = (
        f"Each {study.group_kind} has its own networks and ensembles, and its AUROC comes from its own test images. "
        "Scores of different networks are never pooled. Standard deviations divide by n - 1.",
    )
    return Section(f"Each {study.group_kind}", text, tables=[weights_table], details=tables)


def _paper_section(study: ResolutionStudy) -> Section:
    """Show the paper's numbers beside ours."""
    paper = study.paper
    missing = [name for name in paper.auc if name != ENSEMBLE and name not in study.arms]
    split_note = f", {study.group_count}" if study.group_count else ""
    paper_note = "it prints mean ± standard deviation over its folds"
    text = [
        comparability(study, study.scores[STACKED], split_note, paper_note),
        f"The paper: {paper.source}. The caption of its table calls the ensemble averaging, its text calls it "
        "stacking. Our scores are means over findings and folds, with the interval in brackets"
        + (" and the standard deviation over folds after ±." if study.group_count else "."),
    ]
    if missing:
        text.append(
            f"Sizes of the paper that were not run here: {join_names(missing)}. The table below has its numbers."
        )
    tables = [_paper_scores(study), _gains_table(study), _training_table(study)]
    if not set(study.arms).isdisjoint(paper.auc):
        tables.insert(2, _paper_weights(study))
    return Section(PAPER_SECTION, text, tables=tables, details=[_printed_table(paper)] if missing else [])


def _paper_scores(study: ResolutionStudy) -> Table:
    paper_names = {**{name: name for name in study.arms if name in study.paper.auc}, STACKED: ENSEMBLE}
    models, columns = (*study.arms, VOTED, LOGISTIC, STACKED), ["Finding", "Positive / images"]
    for name in models:
        columns += [f"{name}, ours"] + ([f"{paper_names[name]}, paper"] if name in paper_names else [])
    rows: list[list[Any]] = []
    for k, finding in enumerate((*study.findings, MEAN)):
        row: list[Any] = ["Mean", None] if finding == MEAN else [finding, _positives_of_images(study, k)]
        for name in models:
            values = study.group_aurocs[name][:, k]
            row.append(format_score(study.scores[name].rows()[k], _mean_and_sd(values) if len(values) > 1 else None))
            if name in paper_names:
                row.append(_printed_score(study.paper, paper_names[name], finding))
        rows.append(row)
    return Table("AUROC, ours and the paper's.", columns, rows)


def _positives_of_images(study: ResolutionStudy, k: int) -> str:
    counts = study.scores[STACKED].rows()[k]
    return f"{counts['positives']:,}\u00a0/\u00a0{counts['positives'] + counts['negatives']:,}"


def _gains_table(study: ResolutionStudy) -> Table:
    rows = [
        [row["finding"], row["first"], f"{row['second']:.3f} ({row['against']})", f"{row['difference']:+.3f}",
         f"{row['low']:+.3f} to {row['high']:+.3f}"] if not row["reason"] else
        [row["finding"], None, None, f"n/a ({row['reason']})", None]
        for row in ensemble_gains(study)
    ]  # fmt: skip
    widened = "" if study.group_kind == "training seed" else ", or over folds where that is wider"
    return Table(
        "The stacked ensemble minus the best single size of each finding, with "
        f"{study.config.evaluate.confidence_level:.0%} intervals (DeLong, patients as units{widened}). The best size "
        "is chosen on the same images, which favours it.",
        ("Finding", "Stacked", "Best single size", "Difference", "Interval"),
        rows,
    )


def _printed_score(paper: Paper, model: str, finding: str) -> str | None:
    if finding == MEAN:
        return f"{paper.numbers['average'][model]:.3f}"
    mean = paper.finding_auc(model, finding)
    return None if mean is None else f"{mean:.3f}{_PLUS_MINUS}{_lookup(paper.numbers['sd'][model], finding):.3f}"


def _lookup(printed: Mapping[str, float], finding: str) -> float:
    return next(value for name, value in printed.items() if normalize_name(name) == normalize_name(finding))


def _printed_table(paper: Paper) -> Table:
    rows = [
        [finding, *(_printed_score(paper, model, finding) for model in paper.auc)]
        for finding in (*paper.auc[ENSEMBLE], MEAN)
    ]
    rows[-1][0] = "Mean"
    return Table("The paper's AUROC, mean ± standard deviation over folds.", ("Finding", *paper.auc), rows)


def _paper_weights(study: ResolutionStudy) -> Table:
    printed, weights, columns = study.paper.numbers["weights"], study.mean_weights, ["Finding"]
    for size in study.arms:
        columns += [f"{size}, ours"] + ([f"{size}, paper"] if size in printed else [])
    rows: list[list[Any]] = []
    for k, finding in enumerate(study.findings):
        row: list[Any] = [finding]
        is_printed = study.paper.finding_auc(ENSEMBLE, finding) is not None
        for s, size in enumerate(study.arms):
            row.append(float(weights[k, s]))
            if size in printed:
                row.append(_lookup(printed[size], finding) if is_printed else None)
        rows.append(row)
    return Table("Weights in the stacked ensemble, ours and the paper's.", columns, rows)


def _training_table(study: ResolutionStudy) -> Table:
    """Compare learning rates and effective batch sizes, which do not depend on the number of devices."""
    rows = []
    for member in study.members:
        config, provenance = member.experiment.config, read_provenance(member.directory)
        batch, microbatch = config.train.batch_size, provenance["identity"]["microbatch size"]
        devices = provenance["mesh"]["data"]
        product = f"{batch} = {devices} × {microbatch // devices} × {batch // microbatch}"
        printed = study.paper.for_arm("training", member.name) or {}
        rate = printed.get("rate")
        ours = f"{config.optimizer.learning_rate:.4g}"
        rows.append([member.name, ours, product, rate and f"{rate:.4g}", printed.get("batch")])
    columns = (
        "Size", "Learning rate, ours", "Batch, ours: devices × images × accumulation steps", "Learning rate, paper",
        "Batch, paper",
    )  # fmt: skip
    return Table("Learning rates and effective batch sizes.", columns, rows)


def _mean_and_sd(values: np.ndarray) -> str:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return "n/a"
    return f"{defined.mean():.3f}" + (f"{_PLUS_MINUS}{defined.std(ddof=1):.3f}" if len(defined) > 1 else "")


def _provenance(study: ResolutionStudy) -> dict[str, Any]:
    first = read_provenance(study.members[0].directory)
    members = [member for group in study.groups.values() for member in group]
    members += [study.control] if study.control else []
    seconds = {member.directory.name: read_provenance(member.directory)["train_seconds"] for member in members}
    folds = [group.fold for group in study.groups if group.fold is not None]
    return {"identity": first["identity"]} | shared_provenance(study) | {
        "seeds": list(dict.fromkeys(group.seed for group in study.groups)),
        **({"folds": list(dict.fromkeys(folds))} if folds else {}),
        "model": study.config.model.name,
        "steps": first["steps"],
        "training, seconds": seconds,
    }  # fmt: skip


def _numbers(study: ResolutionStudy, erfs: Mapping[str, Sequence[ErfMap]]) -> dict[str, Any]:
    """Return the entries of `study.json` that only this study has: weights, regressions, groups, receptive fields."""
    keys = ("area_fraction", "diameter_px", "diameter_fraction", "theoretical_px", "mass")
    erf_numbers = {name: [{key: getattr(erf, key) for key in keys} for erf in maps] for name, maps in erfs.items()}
    return {
        "weights": _weights_by_finding(study, study.mean_weights),
        "logistic": {
            label: {
                finding: dict(zip(study.arms, row, strict=True)) | {"intercept": intercept, "voted": voted}
                for finding, row, intercept, voted in zip(study.findings, *fit, strict=True)
            }
            for label, fit in zip(study.group_labels, study.regressions.values(), strict=True)
        },
        "groups": [
            {
                "seed": group.seed,
                "fold": group.fold,
                "auroc": {
                    name: dict(zip((*study.findings, "mean"), values[g].tolist(), strict=True))
                    for name, values in study.group_aurocs.items()
                },
                "weights": _weights_by_finding(study, study.weights[group]),
                "erf": {name: numbers[g] for name, numbers in erf_numbers.items()},
            }
            for g, group in enumerate(study.groups)
        ],
        "erf": {
            name: {key: float(np.mean([row[key] for row in numbers])) for key in keys}
            for name, numbers in erf_numbers.items()
        },
    }  # fmt: skip


def _weights_by_finding(study: ResolutionStudy, weights: np.ndarray) -> dict[str, dict[str, float]]:
    rows = zip(study.findings, weights, strict=True)
    return {finding: dict(zip(study.arms, map(float, row), strict=True)) for finding, row in rows}
