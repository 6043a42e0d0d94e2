"""Sequential CNN: confusion of six exclusive classes, the report by class, and whether image sources are a shortcut."""

import numpy as np
from scipy.special import log_expit

from cxrjax.errors import CxrError
from cxrjax.inference.load_run import predict
from cxrjax.inference.mc_dropout import make_pooled_step
from cxrjax.metrics.auc import mean_defined
from cxrjax.metrics.bootstrap import bootstrap_mean
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import score
from cxrjax.metrics.subgroups import border_pixels, majority_class_accuracy, pool_rare_sources, predict_source
from cxrjax.metrics.tables import normalize_name
from cxrjax.metrics.thresholds import REPORT_COLUMNS, ConfusionMatrix
from cxrjax.report.content import Claim, Matrix, Section, Table
from cxrjax.runs.explain_run import load_images
from cxrjax.studies.members import Member
from cxrjax.studies.sections import describe_comparability, format_interval, format_score, nan_to_none
from cxrjax.studies.study import Study, System, SystemResults, claim_status
from cxrjax.train.experiment import Experiment, predict_logits

_BORDER_SIZE = 64  # px at which borders are compared: small enough for a linear model of every border pixel


class SequentialCNN(System):
    """A small CNN for six exclusive classes, whose images come from different sources."""

    def check(self, experiment: Experiment) -> None:
        """Refuse data whose classes are not exclusive."""
        if not experiment.records.exclusive:
            raise CxrError(
                f"the study of sequential_cnn needs exclusive classes, but an image of {experiment.records.dataset} "
                "may show several findings: set data.dataset to six_class or to your own data set of exclusive classes"
            )

    def summarize(self, study: Study) -> SystemResults:
        """Return confusion and report of the first arm, accuracy of all arms, and the test for a source shortcut."""
        first = study.members[0]
        confusion = ConfusionMatrix.from_predictions(first.test)
        accuracies, accuracy_numbers = _accuracies(study)
        sources, claims, source_numbers = _sources(study, first)
        sections = [accuracies, _confusion(study), _class_report(study, first.name, confusion), sources]
        numbers = {
            "accuracy": accuracy_numbers,
            "confusion": {"classes": list(confusion.classes), "rows actual": confusion.matrix.tolist()},
            "report": confusion.report(), "balanced accuracy": confusion.balanced_accuracy, "source": source_numbers,
        }  # fmt: skip
        return SystemResults(sections, claims, numbers=numbers)


def _cross_entropy(table: Predictions) -> float:
    """Return the mean categorical cross-entropy; the tables hold log p / (1 - p) of the softmax."""
    rows = table.label_mask.all(1)
    return float(-log_expit(table.logit)[rows][table.label[rows] > 0].mean()) if rows.any() else float("nan")


def _accuracies(study: Study) -> tuple[Section, dict]:
    rows, numbers = [], {}
    for member in study.members:
        tables = {"train": predict(member.experiment, member.network, "train")}
        tables |= {"validation": member.validation, "test": member.test}
        paper = study.paper.for_arm("accuracy", member.name) or {}
        paper_loss = study.paper.for_arm("loss", member.name) or {}
        numbers[member.name] = {}
        for split, table in tables.items():
            is_correct = np.take_along_axis(table.label, table.logit.argmax(1)[:, None], axis=1)  # 1 at the true class
            label_mask = np.all(table.label_mask, axis=1)[:, None]
            value, interval = bootstrap_mean(is_correct, label_mask, table.patient, **study.bootstrap_options)
            loss = nan_to_none(_cross_entropy(table))
            numbers[member.name][split] = {"images": len(table), "accuracy": value, "loss": loss}
            rows.append(
                [f"{member.name}, {split}", f"{len(table):,}", value, format_interval(interval.low, interval.high),
                 paper.get(split), loss, paper_loss.get(split)]
            )  # fmt: skip
    columns = ("Arm and split", "Images", "Accuracy", "Interval", "Paper", "Loss", "Loss, paper")
    table = Table("Accuracy and categorical cross-entropy on each split.", columns, rows)
    return Section("Accuracy", (describe_comparability(study),), tables=[table]), numbers


def _confusion(study: Study) -> Section:
    (name, confusion), *others = [
        (member.name, ConfusionMatrix.from_predictions(member.test)) for member in study.members
    ]
    figures = {
        f"confusion-{rows}": Matrix(
            f"{name}: rows are {rows} classes, columns {columns} ones; shades show the fraction of a row.",
            confusion.classes, confusion.oriented(rows), rows, columns,
        )
        for rows, columns in (("actual", "predicted"), ("predicted", "actual"))
    }  # fmt: skip
    details = [
        Table(f"{other}: rows are actual classes, columns predicted ones.", ("Actual", *matrix.classes),
              [[row, *map(int, counts)] for row, counts in zip(matrix.classes, matrix.matrix, strict=True)])
        for other, matrix in others
    ]  # fmt: skip
    text = ("The paper's matrix has predicted classes as rows: compare it with the second figure.",)
    return Section("Confusion of classes", text, figures, details=details)


def _class_report(study: Study, name: str, confusion: ConfusionMatrix) -> Section:
    """Show ours and the paper's report by class, each class against the rest."""
    printed = {normalize_name(label): values for label, values in study.paper.numbers["report"].items()}
    paper_names = {"precision": "ppv", "recall": "sensitivity"}
    ours, papers = [], []
    for row in confusion.report():
        values = printed.get(normalize_name(row["class"]), {})
        support = study.paper.numbers["support"].get(row["class"])
        ours.append([row["class"], row["support"], *(nan_to_none(row[column]) for column in REPORT_COLUMNS)])
        papers.append(
            [row["class"], support, *(values.get(paper_names.get(column, column)) for column in REPORT_COLUMNS)]
        )
    labels = {column: column.replace("_", " ").capitalize() for column in REPORT_COLUMNS} | {"ppv": "PPV", "npv": "NPV"}
    paper_mean = mean_defined([values["balanced_accuracy"] for values in printed.values()])
    text = (
        f"{name}, each class against the rest. The accuracy is {confusion.accuracy:.4f}. The mean balanced accuracy is "
        f"{confusion.balanced_accuracy:.3f}; the paper's, computed from its table, is {paper_mean:.3f}.",
    )
    tables = [
        Table(caption, ("Measure", *(row[0] for row in rows)),
              [[measure, *(row[k] for row in rows)] for k, measure in enumerate(("Images", *labels.values()), start=1)])
        for caption, rows in (("Ours.", ours), ("The paper's (version 3).", papers))
    ]  # fmt: skip
    return Section("Report by class", text, tables=tables)


def _sources(study: Study, first: Member) -> tuple[Section, list[Claim], dict]:
    """Measure how well an image's source can be predicted from its border and from the network's features."""
    experiment, test = first.experiment, first.test
    config, records, rows = experiment.config, experiment.records, experiment.examples("test").row
    source, patient = records.source[rows], records.patient[rows]
    train = experiment.examples("train")
    baseline = majority_class_accuracy(
        records.source[train.row], train.label.argmax(1), source, test.label.argmax(1)
    )  # fmt: skip
    title, counts_table = "Could it have learnt the source?", _source_table(test, source)
    baseline_text = (
        f"Predicting the commonest class of each source, without looking at the image, is correct for {baseline:.1%} "
        "of the test split."
    )
    pooled = pool_rare_sources(source, patient)
    images = load_images(experiment, rows, min(config.data.image_size, _BORDER_SIZE))[..., 0]
    features = predict_logits(
        first.network, experiment.examples("test"), make_pooled_step(experiment.mesh), experiment.mesh,
        size=config.data.image_size, batch=config.evaluate.batch_size, threads=config.data.num_threads,
    )  # fmt: skip
    inputs = {"Border, outer 5 % of the pixels": border_pixels(images), "The network's last features": features}
    try:
        scores = {
            name: score(
                predict_source(values, pooled, id=test.id, patient=patient),
                seed=study.config.seed, **study.bootstrap_options,
            )
            for name, values in inputs.items()
        }  # fmt: skip
    except CxrError as error:
        text = (f"The source cannot be predicted here: {error}.", baseline_text)
        numbers = {"reason": str(error), "accuracy from source": baseline}
        return Section(title, text, tables=[counts_table]), [], numbers
    names = [row["finding"] for row in next(iter(scores.values())).rows()]
    shown = names[:1] if len(names) == 2 else names
    cells = [
        ["Mean" if name == "mean" else name, *(format_score(result.rows()[k]) for result in scores.values())]
        for k, name in enumerate(shown)
    ]
    text = (
        "AUC of predicting an image's source by logistic regression on standardized inputs, cross-validated over "
        "patients of the test split. The border shows hardly any lung. If the source can be predicted from the border "
        "(AUC near 1), and sources and classes are associated, then a network can reach the accuracies above without "
        "seeing any disease, and they are no evidence that it does. If it cannot (AUC near 0.5), this shortcut is "
        "ruled out, although there may be others. Features that predict the source show that the network keeps the "
        "information that the shortcut needs.",
        baseline_text,
    )
    border = next(iter(scores.values())).mean
    low, high = (border.auroc_interval.low, border.auroc_interval.high) if border.auroc_interval else (np.nan, np.nan)
    claim = Claim(
        "An image's source cannot be told from its border",
        claim_status(low <= 0.5 and high < 0.6, low > 0.5),
        f"AUC {border.auroc:.3f} ({low:.3f} to {high:.3f}) from the border; an interval that includes 0.5 and stays "
        "below 0.6 supports the claim",
    )
    numbers = {name: result.mean.auroc for name, result in scores.items()} | {"accuracy from source": baseline}
    table = Table("AUC of the source.", ("Source against the others", *scores), cells)
    return Section(title, text, tables=[table, counts_table]), [claim], numbers


def _source_table(test: Predictions, source: np.ndarray) -> Table:
    sources, labels = np.unique(source), test.label.argmax(1)
    rows = [
        [name, *(int(((source == value) & (labels == k)).sum()) for value in sources)]
        for k, name in enumerate(test.findings)
    ]
    return Table("Test images by class and source.", ("Class", *map(str, sources)), rows)
