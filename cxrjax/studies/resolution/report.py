"""A resolution study as files and as one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.console import print_text, stdout
from cxrjax.files import write_json
from cxrjax.metrics.scores import score
from cxrjax.report import figures, style
from cxrjax.report.content import Cam, Field, StudyReport, Table
from cxrjax.report.page import write_page
from cxrjax.report.tables import csv, terminal
from cxrjax.runs.evaluate_run import roc_curves, read_epochs, describe_intervals, read_provenance
from cxrjax.runs.explain_run import make_cam, compute_cams
from cxrjax.studies.members import ENSEMBLES, STACKED, Study
from cxrjax.studies.resolution import statements, tables
from cxrjax.studies.resolution.claims import assess
from cxrjax.studies.system_study import plain

Fields = Mapping[str, Sequence[Field]]


def report(study: Study, fields: Fields, directory: Path) -> dict[str, Any]:
    """Everything the study found, as files and as one page; `fields` holds each size's, one a group."""
    sections = [tables.group_section(study)] if study.several else []
    sections += [tables.paper_section(study)] if study.config.study.paper else []
    spread = ", drawn fold by fold" if study.several and study.kind != "training seed" else ""
    interval = describe_intervals(study.scores[STACKED])
    content = StudyReport(
        title=study.config.title or "Resolution study",
        findings=study.findings,
        sizes=study.sizes,
        scores={name: of.rows() for name, of in study.scores.items()},
        ensembles=ENSEMBLES,
        lead=statements.lead(study),
        claims=assess(study, fields),
        notes=statements.notes(study),
        interval=interval and interval + spread,
        weights=study.mean_weights,
        curves={name: roc_curves(of[0]) for name, of in study.tables.items()},
        training={member.name: read_epochs(member.directory) for member in study.first},
        fields={name: of[0] for name, of in fields.items()},
        cams=_cams(study),
        image_sizes=_image_sizes(study),
        control=_control_table(study),
        tables=[tables.spread_table(study)] if study.several else [],
        sections=sections,
        provenance=_provenance(study),
    )
    return _write(content, study, fields, directory)


def _cams(study: Study) -> dict[str, dict[str, Cam]]:
    """For each finding the test image that the ensemble is surest of among those that show it, at every size."""
    stacked, experiment = study.tables[STACKED][0], study.first[0].experiment
    rows = {}
    for k, finding in enumerate(stacked.findings):
        shows = np.flatnonzero((stacked.label[:, k] > 0.5) & stacked.label_mask[:, k])
        if len(shows):
            rows[finding] = int(experiment.examples("test").row[shows[stacked.logit[shows, k].argmax()]])
    chosen = np.unique(list(rows.values()))
    grid: dict[str, dict[str, Cam]] = {finding: {} for finding in rows}
    for member in study.first:
        cams = compute_cams(member.experiment, member.network, chosen, stacked.findings)
        for finding, row in rows.items():
            [probability] = cams.probability[cams.row == row]
            said = {name: float(p) for name, p in zip(cams.findings, probability, strict=True) if p > 0.5}
            grid[finding][member.name] = replace(make_cam(member.experiment, cams, finding, row), said=said)
    return grid


def _image_sizes(study: Study) -> np.ndarray | None:
    """Width and height of the original images of all parts, as far as the records hold them."""
    experiment = study.first[0].experiment
    sizes = experiment.records.original_sizes
    return None if sizes is None else sizes[np.concatenate([part.row for part in experiment.examples_by_split.values()])]


def _control_table(study: Study) -> Table | None:
    if study.control is None:
        return None
    control = study.control
    size = study.sizes.index(control.name) if control.name in study.sizes else None
    columns = ["Finding", f"{control.name}, alone"] + (
        [f"{control.name}, all findings together"] if size is not None else []
    )
    alone = {row["finding"]: row["auroc"] for row in score(control.test, resamples=0).rows()}
    models = [alone]
    if size is not None:
        together = study.first[size].test.select(control.test.findings)
        models.append({row["finding"]: row["auroc"] for row in score(together, resamples=0).rows()})
    rows = [[finding, *(tables.text_of(model[finding]) for model in models)] for finding in alone]
    return Table("AUROC of the same network trained on these findings only", columns, rows)


def _provenance(study: Study) -> dict[str, Any]:
    first = read_provenance(study.first[0].directory)
    members = [member for of in study.members.values() for member in of] + ([study.control] if study.control else [])
    seconds = {member.directory.name: read_provenance(member.directory)["train_seconds"] for member in members}
    shared = ("identity", "images", "versions", "device", "devices", "mesh", "host")
    folds = [group.fold for group in study.groups if group.fold is not None]
    return {name: first[name] for name in shared} | {
        "seeds": list(dict.fromkeys(group.seed for group in study.groups)),
        **({"folds": list(dict.fromkeys(folds))} if folds else {}),
        "model": study.config.model.name,
        "steps": first["steps"],
        "training, seconds": seconds,
    }


def _write(content: StudyReport, study: Study, fields: Fields, directory: Path) -> dict[str, Any]:
    for name in ENSEMBLES:
        for group, table in zip(study.groups, study.tables[name], strict=True):
            table.write(directory / "predictions" / f"{name}{group.suffix}.parquet")
    result = plain(
        {
            "scores": {name: of.as_dict() for name, of in study.scores.items()},
            "weights": _by_finding(study, study.mean_weights),
            "logistic": {
                group.called(study.kind): {
                    finding: dict(zip(study.sizes, row, strict=True)) | {"intercept": intercept, "voted": voted}
                    for finding, row, intercept, voted in zip(study.findings, *learnt, strict=True)
                }
                for group, learnt in study.regressions.items()
            },
            "groups": _groups(study, fields),
            "erf": {name: _numbers(of) for name, of in fields.items()},
            "claims": [vars(claim) for claim in content.claims],
            "provenance": json.loads(json.dumps(content.provenance)),
        }
    )
    write_json(directory / "study.json", result)
    style.write(directory / "scores.csv", csv(content.scores).encode())
    for name, figure in figures.study_figures(content).items():
        for kind in ("svg", "pdf"):
            style.save(figure, directory / "figures" / f"{name}.{kind}")
    style.save(figures.summary(content), directory / "figures" / "summary.png")
    page = write_page(content, directory / "report" / "index.html")
    stdout.print(terminal(content.scores, content.findings, content.sizes, title=content.title))
    for claim in content.claims:
        print_text(f"{claim.supported:>9}  {claim.statement}: {claim.evidence}")
    print_text(f"report: {page}")
    return result | {"report": str(page)}


def _by_finding(study: Study, weights: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        finding: dict(zip(study.sizes, map(float, row), strict=True))
        for finding, row in zip(study.findings, weights, strict=True)
    }


def _groups(study: Study, fields: Fields) -> list[dict[str, Any]]:
    """Each seed and fold by itself: AUROC of each model and finding, weights, size of the receptive fields."""
    values = tables.aurocs(study)
    return [
        {
            "seed": group.seed,
            "fold": group.fold,
            "auroc": {
                name: dict(zip((*study.findings, "mean"), of[g].tolist(), strict=True)) for name, of in values.items()
            },
            "weights": _by_finding(study, study.weights[group]),
            "erf": {name: _one(of[g]) for name, of in fields.items()},
        }
        for g, group in enumerate(study.groups)
    ]


def _numbers(fields: Sequence[Field]) -> dict[str, float]:
    """Means over the groups."""
    each = [_one(field) for field in fields]
    return {name: float(np.mean([of[name] for of in each])) for name in each[0]}


def _one(field: Field) -> dict[str, float]:
    names = ("area_fraction", "diameter_px", "diameter_fraction", "theoretical_px", "mass")
    return {name: getattr(field, name) for name in names}
