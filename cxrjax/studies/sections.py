"""The chapters that every study of arms has: comparison, operating points, calibration, subgroups, the paper's numbers.

Each gives a `Section`, and its numbers for `study.json`.
"""

import math
from typing import Any

import numpy as np

from cxrjax.metrics.calibration import calibration_report, fit_temperatures, reliability_diagram
from cxrjax.metrics.comparison import compare_findings
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import MEAN
from cxrjax.metrics.subgroups import UNKNOWN, subgroup_attributes, score_subgroups
from cxrjax.metrics.tables import normalize_name
from cxrjax.metrics.thresholds import choose_thresholds
from cxrjax.report.content import Claim, Diagrams, Reliability, Section, Table
from cxrjax.runs.evaluate_run import describe_intervals
from cxrjax.studies.framework import ArmStudy
from cxrjax.studies.resolution.statements import listed, verdict

Chapter = tuple[Section, Any]

_FEWEST = 10  # images in a bin of a reliability diagram whose frequency is worth drawing


def compared(study: ArmStudy) -> Chapter:
    """Each arm less the first, finding by finding and on average."""
    first, tables, numbers = study.members[0], [], {}
    for member in study.members[1:]:
        rows = compare_findings(member.test, first.test, confidence=study.config.evaluate.confidence)
        gain = study.gain(member, first)
        numbers[member.name] = {"mean": vars(gain), "findings": rows}
        means = [number(study.scores[each.name].mean.auroc) for each in (member, first)]
        mean = ["Mean", *means, signed(gain.value), signed_between(gain.low, gain.high), None, None]
        tables.append(
            Table(
                f"AUC of {member.name} less that of {first.name}.",
                ("Finding", member.name, first.name, "Difference", "Interval", "p", "p (Holm)"),
                [_difference_row(row) for row in rows] + [mean],
            )
        )
    text = (
        f"Each arm is compared with {first.name} on the same {len(first.test):,} test images. Findings: DeLong's test "
        "with the patient as the unit; p (Holm) is adjusted for the number of findings, in each table by itself. Mean: "
        "paired bootstrap over patients, on findings that the labels define.",
    )
    return Section("Arms compared", text, tables=tables), numbers


def _difference_row(row: dict[str, Any]) -> list[Any]:
    if row["reason"]:
        return [row["finding"], None, None, f"n/a ({row['reason']})", None, None, None]
    probabilities = (p_value(row["p"]), p_value(row["p_holm"]))
    spread = signed_between(row["low"], row["high"])
    return [row["finding"], row["first"], row["second"], signed(row["difference"]), spread, *probabilities]


def operating(study: ArmStudy) -> Chapter:
    """Thresholds chosen on validation, and what they do on the test part."""
    columns = {
        "threshold": "Threshold", "sensitivity": "Sensitivity", "specificity": "Specificity", "ppv": "PPV",
        "npv": "NPV", "accuracy": "Accuracy", "f1": "F1",
    }  # fmt: skip
    tables, numbers = {}, {}
    for member in study.members:
        rows = choose_thresholds(member.validation, "youden").apply(member.test)
        numbers[member.name] = rows
        cells = [[_with_reason(row), *(number(row[name]) for name in columns)] for row in rows]
        tables[member.name] = Table(
            f"{member.name} at thresholds of highest sensitivity + specificity on validation.",
            ("Finding", *columns.values()), cells,
        )  # fmt: skip
    text = (
        "Thresholds are probabilities chosen on the validation images (Youden's index) and applied to the test images "
        "unchanged. PPV and NPV hold for the test part's prevalence.",
    )
    shown = tables.pop(study.best.name)
    return Section("Operating points", text, tables=[shown], details=list(tables.values())), numbers


def calibrated(study: ArmStudy) -> Chapter:
    """Calibration on the test part, before and after temperatures fitted on validation."""
    rows, details, numbers = [], [], {}
    for member in study.members:
        temperatures = fit_temperatures(member.validation, exclusive=_exclusive(study))
        before, after = calibration_report(member.test), calibration_report(temperatures.apply(member.test))
        numbers[member.name] = {
            "temperatures": dict(zip(temperatures.findings, temperatures.values, strict=True)),
            "before": before, "after": after,
        }  # fmt: skip
        names = ("ece_width", "ece_mass", "brier")
        rows.append([member.name, *(number(each[-1][name]) for name in names for each in (before, after))])
        cells = [
            [b["finding"], number(t), reason or None, *(number(each[name]) for name in names for each in (b, a))]
            for b, a, t, reason in zip(before, after, temperatures.values, temperatures.reasons, strict=False)
        ]
        columns = [f"{name}{scaled}" for name in ("ECE (width)", "ECE (mass)", "Brier") for scaled in ("", ", scaled")]
        details.append(Table(f"{member.name} by finding.", ("Finding", "Temperature", "Note", *columns), cells))
    curves = _diagrams(study.best.test)
    text = (
        "Expected calibration errors (15 bins of equal width, and of equal mass) and Brier scores on the test images, "
        "means over findings; scaled: "
        + (
            "the softmax at one temperature"
            if _exclusive(study)
            else "each finding's logits divided by its own temperature"
        )
        + ", fitted on validation.",
    )
    figure = Diagrams(
        f"{study.best.name}, unscaled: observed frequency against predicted probability; larger dots stand for more "
        f"images, and bins of fewer than {_FEWEST} are left out.",
        curves,
    )
    table = Table("Calibration of each arm, means over findings.", ("Arm", *columns), rows)
    return Section("Calibration", text, {"reliability": figure} if curves else {}, [table], details), numbers


def _diagrams(test: Predictions) -> dict[str, Reliability]:
    drawn = {}
    for k, finding in enumerate(test.findings):
        bins = reliability_diagram(test.probability[:, k], test.label[:, k], test.label_mask[:, k])
        filled = bins.count >= min(_FEWEST, bins.count.max())
        if bins.count.any():
            drawn[finding] = Reliability(bins.predicted[filled], bins.observed[filled], bins.count[filled])
    return drawn


def _exclusive(study: ArmStudy) -> bool:
    return study.config.loss.name == "cross_entropy"


def grouped(study: ArmStudy) -> Chapter | None:
    """The best arm by sex, age and view, as far as the records say them; None if they say nothing."""
    member = study.best
    label_mask = {
        name: values
        for name, values in subgroup_attributes(member.experiment.records, member.test).items()
        if not (values == UNKNOWN).all()
    }
    if not label_mask:
        return None
    found = score_subgroups(member.test, label_mask, seed=study.config.seed, **study.drawing)
    rows = [
        [row["attribute"], row["group"], row["images"], row["patients"], number(row["auroc"]),
         between(row["low"], row["high"]), row["reason"] or None]
        for row in found.groups if row["finding"] == MEAN
    ]  # fmt: skip
    gaps = [
        [row["attribute"], row["finding"].capitalize() if row["finding"] == MEAN else row["finding"],
         row["best"] or None, row["worst"] or None, number(row["gap"]), between(row["low"], row["high"]),
         row["reason"] or None]
        for row in found.gaps
    ]  # fmt: skip
    text = (
        f"{member.name}, the best arm on validation. Gaps are between the best and the worst group of at least 100 "
        "images; they are picked for being far apart, which their intervals do not allow for.",
    )
    groups = ("Attribute", "Group", "Images", "Patients", "Mean AUC", "Interval", "Note")
    between_groups = ("Attribute", "Finding", "Best", "Worst", "Gap", "Interval", "Note")
    section = Section(
        "Subgroups", text, tables=[Table("Mean AUC by group.", groups, rows)],
        details=[Table("Gaps between groups, by finding.", between_groups, gaps)],
    )  # fmt: skip
    return section, {"groups": list(found.groups), "gaps": list(found.gaps)}


def comparability(study: ArmStudy) -> str:
    """Whether our numbers can be held against the paper's, with n, split and interval of both."""
    experiment, test = study.members[0].experiment, study.members[0].test
    ours = (
        f"Ours are of {len(test):,} test images of {len(np.unique(test.patient)):,} patients ({study.dataset}, split "
        f"{experiment.split.name!r}, no patient in two parts), with {describe_intervals(study.scores[study.arms[0]])}. The "
        f"paper's are of {study.paper.test}; it prints no intervals."
    )
    if study.phantom:
        return f"Phantom data: not comparable. {ours}"
    if not study.comparable:
        return f"Other data ({study.dataset}; the paper: {study.paper.dataset}): not comparable. {ours}"
    return f"Comparable as far as test parts that are not the same images allow. {ours}"


def beside_paper(study: ArmStudy) -> tuple[Section, list[Claim]] | None:
    """The paper's AUCs beside ours, and whether they are reached; None where the paper prints none."""
    paper, ours = study.paper, {name: {row["finding"]: row for row in of.rows()} for name, of in study.scores.items()}
    arms = [name for name in study.arms if any(paper.auc_of(name, finding) for finding in _printed(study))]
    if not arms:
        return None
    same = {normalize_name(finding) for finding in study.findings}
    rows = []
    for finding in (*study.findings, *(name for name in _printed(study) if normalize_name(name) not in same)):
        cells = [(interval_cell(ours[name].get(finding)), paper.auc_of(name, finding)) for name in arms]
        rows.append([finding, *(cell for pair in cells for cell in pair)])
    means = [(interval_cell(ours[name][MEAN]), paper.mean_auc(name)) for name in arms]
    rows.append(["Mean", *(cell for pair in means for cell in pair)])
    columns = ("Finding", *(f"{name}, {whose}" for name in arms for whose in ("ours", "paper")))
    text = (comparability(study), f"The paper: {study.paper.source}. Its means are computed here from what it prints.")
    claims = [_reached(study, name) for name in arms if study.comparable and paper.mean_auc(name)]
    return Section("Beside the paper", text, tables=[Table("AUC, ours and the paper's.", columns, rows)]), claims


def _printed(study: ArmStudy) -> list[str]:
    """Findings in the paper's order."""
    return list(dict.fromkeys(finding for of_arm in study.paper.auc.values() for finding in of_arm))


def _reached(study: ArmStudy, name: str) -> Claim:
    printed, mean = study.paper.mean_auc(name), study.scores[name].mean
    assert printed is not None
    spread = mean.auroc_interval
    low, high = (math.nan, math.nan) if spread is None else (spread.low, spread.high)
    return Claim(
        f"{name} reaches the paper's mean AUC of {printed:.3f}",
        verdict(low >= printed, high < printed),
        f"ours is {mean.auroc:.3f} ({low:.3f} to {high:.3f})" + (f"; {mean.reason}" if mean.reason else ""),
    )


def lead(study: ArmStudy) -> list[str]:
    """The opening: what was done, and the numbers that matter most."""
    experiment, best = study.members[0].experiment, study.best.name
    images = {name: len(part.row) for name, part in experiment.examples_by_split.items()}
    spread = study.scores[best].mean.auroc_interval
    return [
        f"{listed(study.arms)} were trained on {images['train']:,} images of {study.dataset}; each kept its best epoch "
        f"of {images['validation']:,} validation images. All scores are of {images['test']:,} test images of other "
        "patients.",
        f"On validation {best} is the best; on the test images its mean AUROC is {study.scores[best].mean.auroc:.3f}"
        + ("" if spread is None else f" ({spread.low:.3f} to {spread.high:.3f})") + ".",
        comparability(study),
    ]  # fmt: skip


def notes(study: ArmStudy) -> list[str]:
    """What a study of arms does not prove."""
    drawn = (
        "The radiographs of this study are drawn by a program, and the networks are small. It proves that the whole "
        "path works, from files to this report, and nothing about patients."
    )
    seeds = (
        "Every arm was trained once: intervals and tests are of the test patients, and say nothing of how much another "
        "training seed would change."
    )
    return [drawn, seeds] if study.phantom else [seeds]


def interval_cell(row: Any) -> str | None:
    """A score row's AUROC as text, with its interval; None without a row."""
    if row is None:
        return None
    if math.isnan(row["auroc"]):
        return f"n/a ({row['reason']})"
    spread = between(row["auroc_low"], row["auroc_high"])
    return f"{row['auroc']:.3f}" + (f" ({spread})" if spread else "")


def number(value: float) -> float | None:
    """A number for a table; None, which is shown as a dash, where it is undefined."""
    return None if math.isnan(value) else float(value)


def signed(value: float) -> str:
    """A difference, with its sign."""
    return "n/a" if math.isnan(value) else f"{value:+.3f}"


def between(low: float, high: float) -> str | None:
    """An interval as text; None where it is undefined."""
    return None if math.isnan(low + high) else f"{low:.3f}–{high:.3f}"


def signed_between(low: float, high: float) -> str | None:
    """An interval of differences as text; None where it is undefined."""
    return None if math.isnan(low + high) else f"{signed(low)} to {signed(high)}"


def p_value(p: float) -> str | None:
    """A p value as text."""
    return None if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _with_reason(row: dict[str, Any]) -> str:
    return f"{row['finding']} ({row['reason']})" if row["reason"] else row["finding"]
