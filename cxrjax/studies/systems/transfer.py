"""Transfer learning: accuracy over labels, three estimators of the AUC, and Grad-CAM of one image."""

import numpy as np

from cxrjax.inference.load_run import predict
from cxrjax.metrics.auc import AUC_ESTIMATORS, auc_report
from cxrjax.metrics.bootstrap import bootstrap_mean
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.thresholds import accuracy_at_threshold
from cxrjax.report.content import Cam, Claim, Section, Table
from cxrjax.runs.explain_run import make_cam, compute_cams
from cxrjax.studies.framework import ArmStudy, Extra
from cxrjax.studies.members import Member
from cxrjax.studies.resolution.statements import listed, verdict
from cxrjax.studies.sections import between, number

SHOWN = 4  # findings of the Grad-CAM panels


def add(study: ArmStudy) -> Extra:
    """Accuracy, estimators and panels; whether augmentation and the DenseNet pay."""
    accuracies, accuracy_numbers = _accuracies(study)
    estimators, estimates = _estimators(study)
    cams, shown = _panels(study)
    claims = [
        _more_accurate(study, "densenet_augmented", "densenet", "Augmentation makes the DenseNet more accurate"),
        _more_accurate(
            study, "densenet_augmented", "resnet_augmented", "With augmentation the DenseNet beats the ResNet"
        ),
        _above_half(study),
    ]
    numbers = {"accuracy": accuracy_numbers, "estimators": estimates, "gradcam": shown["id"]}
    note = (
        f"The activation maps are of the test image {shown['id']}, which shows {shown['truth']}, and of the findings "
        f"that {study.best.name} gives the highest probabilities."
    )
    return Extra([accuracies, estimators], claims, [note], cams, numbers)


def _right(table: Predictions) -> np.ndarray:
    """Which labels a threshold of 0.5 on the probability gets right, f64[N, K]."""
    return ((table.logit >= 0) == (table.label > 0)).astype(np.float64)


def _accuracies(study: ArmStudy) -> tuple[Section, dict[str, dict[str, float | None]]]:
    rows, numbers = [], {}
    for member in study.members:
        train, test = predict(member.experiment, member.network, "train"), member.test
        value, spread = bootstrap_mean(_right(test), test.label_mask, test.patient, **study.drawing)
        never = float((test.label <= 0)[test.label_mask].mean())
        paper = study.paper.of_arm("accuracy", member.name) or {}
        numbers[member.name] = {"train": number(accuracy_at_threshold(train)), "test": value, "nothing called": never}
        rows.append(
            [member.name, number(accuracy_at_threshold(train)), paper.get("train"), value, between(spread.low, spread.high),
             paper.get("test"), never]
        )  # fmt: skip
    text = (
        "Accuracy over all labels at a probability of 0.5. Most labels are negative: the last column is what calling "
        "nothing at all would reach, and an accuracy says little beside it.",
    )
    columns = ("Arm", "Training", "Training, paper", "Test", "Interval", "Test, paper", "Nothing called")
    return Section("Accuracy", text, tables=[Table("Accuracy over labels.", columns, rows)]), numbers


def _more_accurate(study: ArmStudy, first: str, second: str, statement: str) -> Claim:
    tables = [study.arm(name).test for name in (first, second)]
    difference = _right(tables[0]) - _right(tables[1])
    value, spread = bootstrap_mean(difference, tables[0].label_mask, tables[0].patient, **study.drawing)
    return Claim(
        statement,
        verdict(spread.low > 0, spread.high < 0),
        f"accuracy over test labels of {first} less that of {second}: {value:+.3f} "
        f"({spread.low:+.3f} to {spread.high:+.3f})",
    )


def _above_half(study: ArmStudy) -> Claim:
    """The paper's: with augmentation every AUC of the DenseNet is above one half."""
    name = study.arm("densenet_augmented").name
    rows = [row for row in study.scores[name].rows()[:-1] if not np.isnan(row["auroc"])]
    undefined = len(study.findings) - len(rows)
    low, high = ([row["finding"] for row in rows if row[f"auroc_{end}"] > 0.5] for end in ("low", "high"))
    below = [row["finding"] for row in rows if row["finding"] not in high and not np.isnan(row["auroc_high"])]
    printed = {
        arm: study.paper.numbers["below_half"][arm] for arm in ("densenet", "resnet_augmented")
    }  # fmt: skip
    theirs = "; ".join(f"{arm} below it for {listed(findings)}" for arm, findings in printed.items())
    return Claim(
        "With augmentation every AUC of the DenseNet is above one half",
        verdict(bool(rows) and len(low) == len(rows), bool(below)),
        f"of {len(rows)} defined AUCs the whole interval of {len(low)} is above 0.5"
        + (f", and below it of {listed(below)}" if below else "")
        + f"; {undefined} are undefined. In the paper all are, and without augmentation, or with the ResNet: {theirs}",
    )


def _estimators(study: ArmStudy) -> tuple[Section, dict[str, list]]:
    tables, numbers, undefined = [], {}, []
    for member in study.members:
        rows = numbers[member.name] = auc_report(member.test)
        cells = [
            ["Mean" if row is rows[-1] else row["finding"], *(number(row[name]) for name in AUC_ESTIMATORS), row["reason"]]
            for row in rows
        ]
        columns = ("Finding", "Trapezoid", "Mann-Whitney", "Binormal", "Note")
        tables.append(Table(f"{member.name}: three estimators of the AUC.", columns, cells))
        undefined.append(f"{member.name}: {rows[-1]['reason'] or 'none undefined'}")
    text = (
        "The trapezoid under the empirical curve and the Mann-Whitney statistic are the same number; the binormal "
        "estimate takes the logits of both classes for normal. An AUC of a part with one class only is undefined: it "
        f"is counted, and left out of means. {'; '.join(undefined)}.",
    )
    return Section("Three estimators of the AUC", text, tables=tables), numbers


def _panels(study: ArmStudy) -> tuple[dict[str, dict[str, Cam]], dict[str, str]]:
    """Every arm's maps of one test image, the one with most findings, for what the best arm thinks likeliest."""
    best: Member = study.best
    table = best.test
    positives = ((table.label > 0) & table.label_mask).sum(1)
    index = int(positives.argmax())
    top = np.argsort(-table.logit[index], kind="stable")[:SHOWN]
    findings = [table.findings[k] for k in top]
    row = int(best.experiment.examples("test").row[index])
    grid: dict[str, dict[str, Cam]] = {finding: {} for finding in findings}
    for member in study.members:
        cams = compute_cams(member.experiment, member.network, np.array([row]), findings)
        for finding in findings:
            grid[finding][member.name] = make_cam(member.experiment, cams, finding, row)
    there = [f for f, label, label_mask in zip(table.findings, table.label[index], table.label_mask[index], strict=True)
             if label > 0 and label_mask]  # fmt: skip
    return grid, {"id": str(table.id[index]), "truth": listed(there) if there else "no finding"}
