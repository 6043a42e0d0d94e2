"""Six exclusive classes: confusion, the report by class beside the paper's, and what the images' sources give away."""

import numpy as np
from scipy.special import log_expit

from cxrjax.errors import CxrError
from cxrjax.inference.load_run import predict
from cxrjax.inference.mc_dropout import make_pooled_step
from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import bootstrap_mean
from cxrjax.metrics.confounding import majority_class_accuracy, border_pixels, pool_rare_sources, predict_source
from cxrjax.metrics.confusion import REPORT_COLUMNS, ConfusionMatrix
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import Scores, score
from cxrjax.metrics.tables import normalize_name
from cxrjax.report.content import Claim, Matrix, Section, Table
from cxrjax.runs.explain_run import load_images
from cxrjax.studies.framework import ArmStudy, Extra
from cxrjax.studies.members import Member
from cxrjax.studies.resolution.statements import verdict
from cxrjax.studies.sections import between, comparability, interval_cell, number
from cxrjax.train.forward import predict_logits

_SIDE = 64  # px at which borders are compared: coarse enough for a linear model of every outer pixel


def add(study: ArmStudy) -> Extra:
    """Confusion and report of the first arm, accuracy of all, and the check of the sources."""
    first = study.members[0]
    confusion = ConfusionMatrix.from_predictions(first.test)
    accuracies, accuracy_numbers = _accuracies(study)
    sources, claims, source_numbers = _sources(study, first)
    sections = [accuracies, _confusion(study, first, confusion), _report(study, first, confusion), sources]
    numbers = {
        "accuracy": accuracy_numbers,
        "confusion": {"classes": list(confusion.classes), "rows actual": confusion.matrix.tolist()},
        "report": confusion.report(), "balanced accuracy": confusion.balanced_accuracy, "source": source_numbers,
    }  # fmt: skip
    return Extra(sections, claims, numbers=numbers)


def _loss(table: Predictions) -> float:
    """Mean categorical cross-entropy: the tables hold log p / (1 - p) of the softmax."""
    rows = table.label_mask.all(1)
    return float(-log_expit(table.logit)[rows][table.label[rows] > 0].mean()) if rows.any() else float("nan")


def _accuracies(study: ArmStudy) -> tuple[Section, dict]:
    rows, numbers = [], {}
    for member in study.members:
        tables = {"train": predict(member.experiment, member.network, "train")}
        tables |= {"validation": member.validation, "test": member.test}
        paper = study.paper.of_arm("accuracy", member.name) or {}
        losses = study.paper.of_arm("loss", member.name) or {}
        numbers[member.name] = {}
        for part, table in tables.items():
            right = np.take_along_axis(table.label, table.logit.argmax(1)[:, None], axis=1)  # 1 at the true class
            label_mask = np.all(table.label_mask, axis=1)[:, None]
            value, spread = bootstrap_mean(right, label_mask, table.patient, **study.drawing)
            loss = _loss(table)
            numbers[member.name][part] = {"images": len(table), "accuracy": value, "loss": number(loss)}
            rows.append(
                [f"{member.name}, {part}", f"{len(table):,}", value, between(spread.low, spread.high), paper.get(part),
                 number(loss), losses.get(part)]
            )  # fmt: skip
    columns = ("Arm and part", "Images", "Accuracy", "Interval", "Paper", "Loss", "Loss, paper")
    table = Table("Accuracy and categorical cross-entropy on each part.", columns, rows)
    return Section("Accuracy", (comparability(study),), tables=[table]), numbers


def _confusion(study: ArmStudy, first: Member, confusion: ConfusionMatrix) -> Section:
    figures = {
        f"confusion-{rows}": Matrix(
            f"{first.name}: rows are {rows} classes, columns {columns} ones; shades are shares of a row.",
            confusion.classes, confusion.oriented(rows), rows, columns,
        )
        for rows, columns in (("actual", "predicted"), ("predicted", "actual"))
    }  # fmt: skip
    others = [(member.name, ConfusionMatrix.from_predictions(member.test)) for member in study.members[1:]]
    details = [
        Table(f"{name}: actual classes down, predicted ones across.", ("Actual", *each.classes),
              [[row, *map(int, counts)] for row, counts in zip(each.classes, each.matrix, strict=True)])
        for name, each in others
    ]  # fmt: skip
    text = ("The paper's matrix has predictions as rows: it is to be read beside the second figure.",)
    return Section("Which class was taken for which", text, figures, details=details)


def _report(study: ArmStudy, first: Member, confusion: ConfusionMatrix) -> Section:
    """Ours and the paper's, class by class, each against the rest."""
    theirs = {normalize_name(name): values for name, values in study.paper.numbers["report"].items()}
    rows, printed = [], []
    for row in confusion.report():
        paper = theirs.get(normalize_name(row["class"]), {})
        same = {"precision": "ppv", "recall": "sensitivity"}
        rows.append([row["class"], row["support"], *(number(row[name]) for name in REPORT_COLUMNS)])
        support = study.paper.numbers["support"].get(row["class"])
        printed.append([row["class"], support, *(paper.get(same.get(name, name)) for name in REPORT_COLUMNS)])
    macro = mean_defined([values["balanced_accuracy"] for values in theirs.values()])
    names = {name: name.replace("_", " ").capitalize() for name in REPORT_COLUMNS} | {"ppv": "PPV", "npv": "NPV"}
    measures = ("Images", *names.values())
    text = (
        f"{first.name}, each class against the rest. Accuracy {confusion.accuracy:.4f}; mean balanced accuracy "
        f"{confusion.balanced_accuracy:.3f}, the paper's {macro:.3f} as computed from its table.",
    )
    tables = [
        Table(caption, ("Measure", *(row[0] for row in each)),
              [[measure, *(row[k] for row in each)] for k, measure in enumerate(measures, start=1)])
        for caption, each in (("Ours.", rows), ("The paper's (version 3).", printed))
    ]  # fmt: skip
    return Section("Report by class", text, tables=tables)


def _sources(study: ArmStudy, first: Member) -> tuple[Section, list[Claim], dict]:
    """How well an image's source is told from its border, and from the network's features."""
    experiment, test = first.experiment, first.test
    config, records, rows = experiment.config, experiment.records, experiment.examples("test").row
    source, patient = records.source[rows], records.patient[rows]
    train = experiment.examples("train")
    guess = majority_class_accuracy(records.source[train.row], train.label.argmax(1), source, test.label.argmax(1))
    title, crossed = "Could it have learnt the source?", _crossed(test, source)
    label_mask = (
        f"Naming each source's commonest class, without a look at the image, gets {guess:.1%} of the test part right."
    )
    pooled = pool_rare_sources(source, patient)
    images = load_images(experiment, rows, min(config.data.size, _SIDE))[..., 0]
    features = predict_logits(
        first.network, experiment.examples("test"), make_pooled_step(experiment.mesh), experiment.mesh,
        size=config.data.size, batch=config.evaluate.batch, threads=config.data.threads,
    )  # fmt: skip
    inputs = {"Border, outer 5 % of the pixels": border_pixels(images), "The network's last features": features}
    try:
        found = {
            name: _told(study, predict_source(values, pooled, id=test.id, patient=patient))
            for name, values in inputs.items()
        }
    except CxrError as error:
        text = (f"The source cannot be told apart here: {error}.", label_mask)
        numbers = {"reason": str(error), "accuracy from source": guess}
        return Section(title, text, tables=[crossed]), [], numbers
    names = [row["finding"] for row in next(iter(found.values())).rows()]
    wanted = names[:1] if len(names) == 2 else names
    told = [
        ["Mean" if name == "mean" else name, *(interval_cell(each.rows()[k]) for each in found.values())]
        for k, name in enumerate(wanted)
    ]
    text = (
        "AUC of telling an image's source, by logistic regression on standardised inputs, cross-validated over "
        "patients of the test part. In the border there is hardly any lung. If the source can be told from it (AUC "
        "near 1), and sources and classes go together, then a network can reach the accuracies above without seeing "
        "any disease, and they are no evidence that it does; if it cannot (near 0.5), this way out is closed, though "
        "there may be others. Features that tell the source say that the network keeps what it would need for that.",
        label_mask,
    )
    mean = {name: each.mean for name, each in found.items()}
    edge = next(iter(mean.values()))
    low, high = (edge.auroc_interval.low, edge.auroc_interval.high) if edge.auroc_interval else (np.nan, np.nan)
    claim = Claim(
        "An image's source cannot be told from its border",
        verdict(low <= 0.5 and high < 0.6, low > 0.5),
        f"AUC {edge.auroc:.3f} ({low:.3f} to {high:.3f}) from the border; below 0.6 and not above 0.5 counts as unable",
    )
    numbers = {name: of.auroc for name, of in mean.items()} | {"accuracy from source": guess}
    table = Table("AUC of the source.", ("Source against the others", *found), told)
    return Section(title, text, tables=[table, crossed]), [claim], numbers


def _told(study: ArmStudy, table: Predictions) -> Scores:
    return score(table, seed=study.config.seed, **study.drawing)


def _crossed(test: Predictions, source: np.ndarray) -> Table:
    names, there = np.unique(source), test.label.argmax(1)
    rows = [
        [name, *(int(((source == each) & (there == k)).sum()) for each in names)]
        for k, name in enumerate(test.findings)
    ]
    return Table("Test images by class and source.", ("Class", *map(str, names)), rows)
