"""Transfer learning: accuracy over labels, three estimators of the AUC, and Grad-CAM of one image."""

import numpy as np

from cxrjax.inference.load_run import predict
from cxrjax.metrics.auc import AUC_ESTIMATORS, auc_report
from cxrjax.metrics.bootstrap import bootstrap_mean
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.thresholds import accuracy_at_half
from cxrjax.report.content import Cam, Claim, Section, Table
from cxrjax.runs.explain_run import compute_cams, make_cam
from cxrjax.studies.sections import format_interval, nan_to_none
from cxrjax.studies.study import Study, System, SystemResults, claim_status, join_names

_CAM_FINDINGS = 4


class Transfer(System):
    """Fine-tuned DenseNet and ResNet, with and without augmentation."""

    required_arms = ("densenet", "densenet_augmented", "resnet_augmented")

    def summarize(self, study: Study) -> SystemResults:
        """Return accuracy, estimators and activation maps, and test whether augmentation and the DenseNet help."""
        accuracies, accuracy_numbers = _accuracies(study)
        estimators, estimator_numbers = _estimators(study)
        cams, cam_image, cam_findings = _cams(study)
        claims = [
            _accuracy_claim(study, "densenet_augmented", "densenet", "Augmentation makes the DenseNet more accurate"),
            _accuracy_claim(
                study, "densenet_augmented", "resnet_augmented", "With augmentation the DenseNet beats the ResNet"
            ),
            _above_half_claim(study),
        ]
        numbers = {"accuracy": accuracy_numbers, "estimators": estimator_numbers, "gradcam": cam_image}
        note = (
            f"The activation maps show the test image {cam_image} ({cam_findings}) for the findings to which "
            f"{study.best.name} gives the highest probabilities."
        )
        return SystemResults([accuracies, estimators], claims, [note], cams, numbers)


def _is_correct(table: Predictions) -> np.ndarray:
    """Return whether each label is predicted correctly at a probability of 0.5, f64[N, K]."""
    return ((table.logit >= 0) == (table.label > 0)).astype(np.float64)


def _accuracies(study: Study) -> tuple[Section, dict[str, dict[str, float | None]]]:
    rows, numbers = [], {}
    for member in study.members:
        test, train = (
            member.test,
            nan_to_none(accuracy_at_half(predict(member.experiment, member.network, "train"))),
        )
        value, interval = bootstrap_mean(_is_correct(test), test.label_mask, test.patient, **study.bootstrap_options)
        all_negative = float((test.label <= 0)[test.label_mask].mean())
        paper = study.paper.for_arm("accuracy", member.name) or {}
        numbers[member.name] = {"train": train, "test": value, "all negative": all_negative}
        rows.append(
            [member.name, train, paper.get("train"), value, format_interval(interval.low, interval.high),
             paper.get("test"), all_negative]
        )  # fmt: skip
    text = (
        "Accuracy over all labels at a probability of 0.5. Most labels are negative: the last column is the accuracy "
        "of predicting no finding at all, with which an accuracy must be compared.",
    )
    columns = ("Arm", "Training", "Training, paper", "Test", "Interval", "Test, paper", "All negative")
    return Section("Accuracy", text, tables=[Table("Accuracy over labels.", columns, rows)]), numbers


def _accuracy_claim(study: Study, first: str, second: str, statement: str) -> Claim:
    tables = [study.arm(name).test for name in (first, second)]
    difference = _is_correct(tables[0]) - _is_correct(tables[1])
    value, interval = bootstrap_mean(difference, tables[0].label_mask, tables[0].patient, **study.bootstrap_options)
    return Claim(
        statement,
        claim_status(interval.low > 0, interval.high < 0),
        f"accuracy over test labels of {first} minus {second}: {value:+.3f} "
        f"({interval.low:+.3f} to {interval.high:+.3f})",
    )


def _above_half_claim(study: Study) -> Claim:
    """Test the paper's claim that with augmentation every AUC of the DenseNet is above one half."""
    rows = [row for row in study.scores["densenet_augmented"].rows()[:-1] if not np.isnan(row["auroc"])]
    undefined = len(study.findings) - len(rows)
    low, high = ([row["finding"] for row in rows if row[f"auroc_{bound}"] > 0.5] for bound in ("low", "high"))
    below = [row["finding"] for row in rows if row["finding"] not in high and not np.isnan(row["auroc_high"])]
    printed = {arm: study.paper.numbers["below_half"][arm] for arm in ("densenet", "resnet_augmented")}
    exceptions = "; ".join(f"{arm} is below it for {join_names(findings)}" for arm, findings in printed.items())
    return Claim(
        "With augmentation every AUC of the DenseNet is above one half",
        claim_status(bool(rows) and len(low) == len(rows), bool(below)),
        f"the whole interval is above 0.5 for {len(low)} of {len(rows)} defined AUCs"
        + (f" and below it for {join_names(below)}" if below else "")
        + f"; {undefined} are undefined. In the paper all are above 0.5; without augmentation, or with the ResNet: "
        + exceptions,
    )


def _estimators(study: Study) -> tuple[Section, dict[str, list]]:
    tables, numbers, undefined = [], {}, []
    columns = ("Finding", "Trapezoid", "Mann-Whitney", "Binormal", "Note")
    for member in study.members:
        rows = numbers[member.name] = auc_report(member.test)
        cells = [
            ["Mean" if row is rows[-1] else row["finding"], *(nan_to_none(row[name]) for name in AUC_ESTIMATORS),
             row["reason"]]
            for row in rows
        ]  # fmt: skip
        tables.append(Table(f"{member.name}: three estimators of the AUC.", columns, cells))
        undefined.append(f"{member.name}: {rows[-1]['reason'] or 'none undefined'}")
    text = (
        "The trapezoid under the empirical curve and the Mann-Whitney statistic are the same number. The binormal "
        "estimate assumes that the logits of both classes are normal. An AUC is undefined if the test split has one "
        f"class only; it is counted here and left out of means. {'; '.join(undefined)}.",
    )
    return Section("Three estimators of the AUC", text, tables=tables), numbers


def _cams(study: Study) -> tuple[dict[str, dict[str, Cam]], str, str]:
    """Return every arm's maps of the test image with most findings, the image's id and its findings.

    The maps show the findings with the highest probabilities in the best arm.
    """
    best, table = study.best, study.best.test
    positive = (table.label > 0) & table.label_mask
    index = int(positive.sum(1).argmax())
    likely = [table.findings[k] for k in np.argsort(-table.logit[index], kind="stable")[:_CAM_FINDINGS]]
    row = int(best.experiment.examples("test").row[index])
    grid: dict[str, dict[str, Cam]] = {finding: {} for finding in likely}
    for member in study.members:
        cams = compute_cams(member.experiment, member.network, np.array([row]), likely)
        for finding in likely:
            grid[finding][member.name] = make_cam(member.experiment, cams, finding, row)
    present = [finding for finding, shown in zip(table.findings, positive[index], strict=True) if shown]
    return grid, str(table.id[index]), join_names(present) if present else "no finding"
