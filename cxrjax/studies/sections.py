"""Sections of a report that any study can have, and how their tables show scores and differences.

Each section function returns a `Section` and the numbers behind it for `study.json`.
"""

import math
from typing import Any

from cxrjax.metrics.calibration import calibration_report, fit_temperatures, reliability_diagram
from cxrjax.metrics.comparison import compare_findings
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN
from cxrjax.metrics.subgroups import UNKNOWN, score_subgroups, subgroup_attributes
from cxrjax.metrics.tables import normalize_name
from cxrjax.metrics.thresholds import choose_thresholds
from cxrjax.report.content import Claim, Diagrams, Reliability, Section, Table
from cxrjax.studies.study import Study, claim_status, comparability, join_names

PAPER_SECTION = "Beside the paper"
"""Title of the section that compares with the paper."""
SINGLE_TRAINING_NOTE = (
    "Every model was trained once. The intervals and tests cover the test patients only; they do not show how much "
    "another training seed would change."
)
_MIN_BIN = 10  # smallest number of images in a bin of a reliability diagram


def compare_arms(study: Study) -> tuple[Section, Any]:
    """Compare each arm with the first, by finding and on average."""
    first, tables, numbers = study.members[0], [], {}
    for member in study.members[1:]:
        rows = compare_findings(member.test, first.test, confidence=study.config.evaluate.confidence_level)
        gain = study.member_difference(member, first)
        numbers[member.name] = {"mean": vars(gain), "findings": rows}
        means = [nan_to_none(study.scores[arm.name].mean.auroc) for arm in (member, first)]
        mean = ["Mean", *means, format_difference(gain.value), format_differences(gain.low, gain.high), None, None]
        tables.append(
            Table(
                f"AUC of {member.name} minus that of {first.name}.",
                ("Finding", member.name, first.name, "Difference", "Interval", "p", "p (Holm)"),
                [_difference_cells(row) for row in rows] + [mean],
            )
        )
    text = (
        f"Each arm is compared with {first.name} on the same {len(first.test):,} test images. By finding: DeLong's "
        "test with the patient as the unit; p (Holm) is adjusted for the number of findings, separately in each table. "
        "Mean: paired bootstrap over patients, on findings that have both labels.",
    )
    return Section("Arms compared", text, tables=tables), numbers


def _difference_cells(row: dict[str, Any]) -> list[Any]:
    if row["reason"]:
        return [row["finding"], None, None, f"n/a ({row['reason']})", None, None, None]
    interval = format_differences(row["low"], row["high"])
    p_values = (_format_p(row["p"]), _format_p(row["p_holm"]))
    return [row["finding"], row["first"], row["second"], format_difference(row["difference"]), interval, *p_values]


def operating_points(study: Study) -> tuple[Section, Any]:
    """Choose thresholds on validation and apply them to the test split."""
    columns = {
        "threshold": "Threshold", "sensitivity": "Sensitivity", "specificity": "Specificity", "ppv": "PPV",
        "npv": "NPV", "accuracy": "Accuracy", "f1": "F1",
    }  # fmt: skip
    tables, numbers = {}, {}
    for member in study.members:
        rows = choose_thresholds(member.validation, "youden").apply(member.test)
        numbers[member.name] = rows
        cells = [
            [f"{row['finding']} ({row['reason']})" if row["reason"] else row["finding"],
             *(nan_to_none(row[name]) for name in columns)]
            for row in rows
        ]  # fmt: skip
        tables[member.name] = Table(
            f"{member.name} at the thresholds with the highest sensitivity + specificity on validation.",
            ("Finding", *columns.values()), cells,
        )  # fmt: skip
    text = (
        "Thresholds are probabilities, chosen on the validation images (Youden's index) and applied unchanged to the "
        "test images. PPV and NPV hold for the prevalence in the test split.",
    )
    best = tables.pop(study.best.name)
    return Section("Operating points", text, tables=[best], details=list(tables.values())), numbers


def calibration(study: Study) -> tuple[Section, Any]:
    """Report calibration on the test split, before and after temperature scaling fitted on validation."""
    exclusive, rows, details, numbers = study.config.loss.name == "cross_entropy", [], [], {}
    names = ("ece_width", "ece_mass", "brier")
    columns = [f"{name}{scaled}" for name in ("ECE (width)", "ECE (mass)", "Brier") for scaled in ("", ", scaled")]
    for member in study.members:
        temperatures = fit_temperatures(member.validation, exclusive=exclusive)
        before, after = calibration_report(member.test), calibration_report(temperatures.apply(member.test))
        numbers[member.name] = {
            "temperatures": dict(zip(temperatures.findings, temperatures.values, strict=True)),
            "before": before, "after": after,
        }  # fmt: skip
        rows.append([member.name, *(nan_to_none(report[-1][name]) for name in names for report in (before, after))])
        cells = [
            [
                b["finding"],
                nan_to_none(t),
                reason or None,
                *(nan_to_none(row[name]) for name in names for row in (b, a)),
            ]
            for b, a, t, reason in zip(before, after, temperatures.values, temperatures.reasons, strict=False)
        ]
        details.append(Table(f"{member.name} by finding.", ("Finding", "Temperature", "Note", *columns), cells))
    scaling = "the softmax at one temperature" if exclusive else "each finding's logits divided by its own temperature"
    text = (
        "Expected calibration errors (15 bins of equal width, and of equal mass) and Brier scores on the test images, "
        f"means over findings. Scaled: {scaling}, fitted on validation.",
    )
    curves = _reliability_diagrams(study.best.test)
    figure = Diagrams(
        f"{study.best.name}, unscaled: observed frequency against predicted probability. Larger dots stand for more "
        f"images; bins of fewer than {_MIN_BIN} images are left out.",
        curves,
    )
    table = Table("Calibration of each arm, means over findings.", ("Arm", *columns), rows)
    return Section("Calibration", text, {"reliability": figure} if curves else {}, [table], details), numbers


def _reliability_diagrams(test: Predictions) -> dict[str, Reliability]:
    diagrams = {}
    for k, finding in enumerate(test.findings):
        bins = reliability_diagram(test.probability[:, k], test.label[:, k], test.label_mask[:, k])
        shown = bins.count >= min(_MIN_BIN, bins.count.max())
        if bins.count.any():
            diagrams[finding] = Reliability(bins.predicted[shown], bins.observed[shown], bins.count[shown])
    return diagrams


def subgroups(study: Study) -> tuple[Section, Any] | None:
    """Score the best arm by sex, age and view; None if the records hold none of them."""
    member = study.best
    attributes = {
        name: values
        for name, values in subgroup_attributes(member.experiment.records, member.test).items()
        if not (values == UNKNOWN).all()
    }
    if not attributes:
        return None
    result = score_subgroups(member.test, attributes, seed=study.config.seed, **study.bootstrap_options)
    rows = [
        [row["attribute"], row["group"], row["images"], row["patients"], nan_to_none(row["auroc"]),
         format_interval(row["low"], row["high"]), row["reason"] or None]
        for row in result.groups if row["finding"] == MEAN
    ]  # fmt: skip
    gaps = [
        [row["attribute"], row["finding"].capitalize() if row["finding"] == MEAN else row["finding"],
         row["best"] or None, row["worst"] or None, nan_to_none(row["gap"]), format_interval(row["low"], row["high"]),
         row["reason"] or None]
        for row in result.gaps
    ]  # fmt: skip
    text = (
        f"{member.name}, the best arm on validation. Gaps are between the best and the worst group of at least 100 "
        "images. These groups are selected because they are far apart, which the intervals do not account for.",
    )
    group_columns = ("Attribute", "Group", "Images", "Patients", "Mean AUC", "Interval", "Note")
    gap_columns = ("Attribute", "Finding", "Best", "Worst", "Gap", "Interval", "Note")
    section = Section(
        "Subgroups", text, tables=[Table("Mean AUC by group.", group_columns, rows)],
        details=[Table("Gaps between groups, by finding.", gap_columns, gaps)],
    )  # fmt: skip
    return section, {"groups": list(result.groups), "gaps": list(result.gaps)}


def describe_comparability(study: Study) -> str:
    """Return `comparability` of the first arm with a paper that prints no intervals."""
    return comparability(
        study, study.scores[study.arms[0]], ", no patient in two splits", "the paper prints no intervals"
    )


def paper_scores(study: Study) -> tuple[Section, list[Claim]] | None:
    """Show the paper's AUCs beside ours, and claim whether we reach them; None if the paper prints none."""
    paper = study.paper
    ours = {name: {row["finding"]: row for row in scores.rows()} for name, scores in study.scores.items()}
    printed = list(dict.fromkeys(finding for aucs in paper.auc.values() for finding in aucs))
    arms = [name for name in study.arms if any(paper.finding_auc(name, finding) for finding in printed)]
    if not arms:
        return None
    learnt = {normalize_name(finding) for finding in study.findings}
    rows = []
    for finding in (*study.findings, *(name for name in printed if normalize_name(name) not in learnt)):
        cells = [(format_score(ours[name].get(finding)), paper.finding_auc(name, finding)) for name in arms]
        rows.append([finding, *(cell for pair in cells for cell in pair)])
    means = [(format_score(ours[name][MEAN]), paper.mean_auc(name)) for name in arms]
    rows.append(["Mean", *(cell for pair in means for cell in pair)])
    columns = ("Finding", *(f"{name}, {source}" for name in arms for source in ("ours", "paper")))
    text = (
        describe_comparability(study),
        f"The paper: {paper.source}. Its means are computed here from the AUCs it prints.",
    )
    claims = [_reached_claim(study, name) for name in arms if study.is_comparable and paper.mean_auc(name)]
    return Section(PAPER_SECTION, text, tables=[Table("AUC, ours and the paper's.", columns, rows)]), claims


def _reached_claim(study: Study, name: str) -> Claim:
    printed, mean = study.paper.mean_auc(name), study.scores[name].mean
    assert printed is not None
    interval = mean.auroc_interval
    low, high = (math.nan, math.nan) if interval is None else (interval.low, interval.high)
    return Claim(
        f"{name} reaches the paper's mean AUC of {printed:.3f}",
        claim_status(low >= printed, high < printed),
        f"ours is {mean.auroc:.3f} ({low:.3f} to {high:.3f})" + (f"; {mean.reason}" if mean.reason else ""),
    )


def introduction(study: Study) -> list[str]:
    """Return the opening paragraphs: the design and the main result."""
    experiment, best = study.members[0].experiment, study.best.name
    images = {split: len(examples.row) for split, examples in experiment.examples_by_split.items()}
    mean = study.scores[best].mean
    interval = mean.auroc_interval
    return [
        f"{join_names(study.arms)} were trained on {images['train']:,} images of {study.dataset}. Each kept its best "
        f"epoch on {images['validation']:,} validation images. All scores are from {images['test']:,} test images of "
        "other patients.",
        f"{best} is the best arm on validation; its mean AUROC on the test images is {mean.auroc:.3f}"
        + ("" if interval is None else f" ({interval.low:.3f} to {interval.high:.3f})") + ".",
        describe_comparability(study),
    ]  # fmt: skip


def limitations(study: Study) -> list[str]:
    """Return what the study does not show."""
    phantom = (
        "The radiographs of this study are drawn by a program, and the networks are small. The study shows that the "
        "pipeline works from files to this report, and nothing about patients."
    )
    return [phantom, SINGLE_TRAINING_NOTE] if study.is_phantom else [SINGLE_TRAINING_NOTE]


def format_score(row: Any, value: str | None = None) -> str | None:
    """Return the AUROC of a score row with its interval; None without a row.

    Args:
      row: of `Scores.rows()`, or None.
      value: shown instead of the AUROC.
    """
    if row is None:
        return None
    if math.isnan(row["auroc"]):
        return f"n/a ({row['reason']})"
    interval = format_interval(row["auroc_low"], row["auroc_high"])
    return (value or f"{row['auroc']:.3f}") + (f" ({interval})" if interval else "")


def nan_to_none(value: float) -> float | None:
    """Return a number for a table, which shows None as a dash."""
    return None if math.isnan(value) else float(value)


def format_interval(low: float, high: float) -> str | None:
    """Return an interval as text; None if undefined."""
    return None if math.isnan(low + high) else f"{low:.3f}–{high:.3f}"


def format_difference(value: float) -> str:
    """Return a difference with its sign."""
    return "n/a" if math.isnan(value) else f"{value:+.3f}"


def format_differences(low: float, high: float) -> str | None:
    """Return an interval of differences as text; None if undefined."""
    return None if math.isnan(low + high) else f"{format_difference(low)} to {format_difference(high)}"


def _format_p(p: float) -> str | None:
    return None if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
