"""Which resolution does each finding need? One run a size, their stacked ensemble, and one report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import Config, load
from cxrjax.console import say, stdout
from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import mean_auroc
from cxrjax.evaluate.scores import Scores, score
from cxrjax.files import write_json
from cxrjax.report import figures, style
from cxrjax.report.content import Cam, Claim, Field, StudyReport, Table
from cxrjax.report.page import write_page
from cxrjax.report.tables import csv, terminal
from cxrjax.studies import claims
from cxrjax.studies.explanation import cam_of, compute_cams
from cxrjax.studies.receptive_fields import measure_field
from cxrjax.studies.single import curves, epochs, interval_text, provenance
from cxrjax.studies.study import STACKED, VOTED, Member, Study
from cxrjax.train.experiment import Experiment
from cxrjax.train.loop import train


def resolution(spec: str, overrides: Sequence[str], directory: Path) -> dict[str, Any]:
    """Run the whole study in `directory`; what is done already is not done again.

    Args:
      spec: a recipe whose argument is a size and whose `study.sizes` lists them.
      overrides: `--config.key=value`, applied to every run.
      directory: gets `runs/`, `predictions/`, `figures/`, `arrays/`, `study.json` and `report/index.html`.

    Returns:
      Scores of every model, ensemble weights, receptive fields and claims, ready for JSON.
    """
    config = load(spec, overrides)
    if len(config.study.sizes) < 2:
        raise CxrError(f"config key study.sizes is {config.study.sizes}: a study of resolution needs two sizes or more")
    recipe = spec.partition(":")[0]
    _check(config, load(f"{recipe}:{config.study.sizes[0]}", overrides))
    members = {
        seed: [_member(recipe, overrides, directory, size, seed) for size in config.study.sizes]
        for seed in config.study.seeds
    }
    control = None
    if config.study.control:
        size, findings = config.study.control_size or config.study.sizes[-1], tuple(config.study.control)
        control = _member(recipe, overrides, directory, size, config.study.seeds[0], findings)
    return _report(Study(config, members, control), directory)


def _check(config: Config, smallest: Config) -> None:
    """Find before hours of training what would stop the report after them."""
    sizes = list(config.study.sizes)
    if sizes != sorted(set(sizes)):
        raise CxrError(f"config key study.sizes is {config.study.sizes}: sizes must rise")
    findings = Experiment.open(smallest).findings
    for key in ("fine", "coarse", "control"):
        missing = [finding for finding in config.study[key] if finding not in findings]
        if missing:
            raise CxrError(
                f"config key study.{key} names {', '.join(missing)}, which the runs do not learn; "
                f"they learn {', '.join(findings)}"
            )


def _member(
    recipe: str, overrides: Sequence[str], directory: Path, size: int, seed: int, findings: tuple[str, ...] = ()
) -> Member:
    config = load(f"{recipe}:{size}", overrides)
    with config.unlocked():
        config.seed = seed
        config.data.findings = findings or config.data.findings
    name = f"{'control-' if findings else ''}{size}px" + (f"-seed{seed}" if seed else "")
    run = directory / "runs" / name
    train(config, run, mean_auroc)
    return Member.of(f"{size} px", run)


def _report(study: Study, directory: Path) -> dict[str, Any]:
    """Everything the study found, as files and as one page."""
    config, tables = study.config, study.tables
    scores = {
        name: score(of[0], resamples=config.evaluate.resamples, confidence=config.evaluate.confidence)
        for name, of in tables.items()
    }
    for name in (STACKED, VOTED):
        tables[name][0].write(directory / "predictions" / f"{name}.parquet")
    fields = {
        member.name: measure_field(
            member.experiment, member.network, "test", config.study.erf_estimator, config.study.erf_images
        )
        for member in study.first
    }
    found = claims.assess(study, fields)
    report = StudyReport(
        title=config.title or "Resolution study",
        findings=study.first[0].experiment.findings,
        sizes=study.sizes,
        scores={name: of.rows() for name, of in scores.items()},
        ensembles=(STACKED, VOTED),
        lead=claims.lead(study, scores),
        claims=found,
        notes=claims.notes(study),
        interval=interval_text(scores[STACKED]),
        weights=study.weights[config.study.seeds[0]],
        curves={name: curves(of[0]) for name, of in tables.items()},
        training={member.name: epochs(member.directory) for member in study.first},
        fields=fields,
        cams=_cams(study),
        control=_control_table(study),
        tables=_seed_tables(study),
        provenance=_provenance(study),
    )
    return _write(report, scores, found, directory)


def _cams(study: Study) -> dict[str, dict[str, Cam]]:
    """For each finding the test image that the ensemble is surest of among those that show it, at every size."""
    stacked, experiment = study.tables[STACKED][0], study.first[0].experiment
    rows = {}
    for k, finding in enumerate(stacked.findings):
        shows = np.flatnonzero((stacked.label[:, k] > 0.5) & stacked.known[:, k])
        if len(shows):
            rows[finding] = int(experiment.part("test").row[shows[stacked.logit[shows, k].argmax()]])
    chosen = np.unique(list(rows.values()))
    grid: dict[str, dict[str, Cam]] = {finding: {} for finding in rows}
    for member in study.first:
        cams = compute_cams(member.experiment, member.network, chosen, stacked.findings)
        for finding, row in rows.items():
            grid[finding][member.name] = cam_of(member.experiment, cams, finding, row)
    return grid


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
    rows = [[finding, *(_auroc_text(model[finding]) for model in models)] for finding in alone]
    return Table("AUROC of the same network trained on these findings only", columns, rows)


def _auroc_text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _seed_tables(study: Study) -> list[Table]:
    """Mean and standard deviation over training seeds, where there are several."""
    if len(study.members) < 2:
        return []
    rows = []
    findings = study.first[0].experiment.findings
    values = {
        name: np.array([[row["auroc"] for row in score(table, resamples=0).rows()] for table in of])
        for name, of in study.tables.items()
    }
    for k, finding in enumerate((*findings, "Mean")):
        means = [(_auroc_text(of[:, k].mean()), _auroc_text(of[:, k].std(ddof=1))) for of in values.values()]
        rows.append([finding, *(f"{mean} ± {spread}" for mean, spread in means)])
    return [
        Table(f"AUROC over {len(study.members)} training seeds, mean ± standard deviation", ["Finding", *values], rows)
    ]


def _provenance(study: Study) -> dict[str, Any]:
    first = provenance(study.first[0].directory)
    members = [member for of in study.members.values() for member in of] + ([study.control] if study.control else [])
    seconds = {member.directory.name: provenance(member.directory)["train_seconds"] for member in members}
    shared = ("identity", "images", "versions", "device", "devices", "mesh", "host")
    return {name: first[name] for name in shared} | {
        "seeds": list(study.members),
        "model": study.config.model.name,
        "steps": first["steps"],
        "training, seconds": seconds,
    }


def _write(report: StudyReport, scores: dict[str, Scores], found: list[Claim], directory: Path) -> dict[str, Any]:
    result = {
        "scores": {name: of.as_dict() for name, of in scores.items()},
        "weights": {
            finding: dict(zip(report.sizes, map(float, row), strict=True))
            for finding, row in zip(report.findings, np.asarray(report.weights), strict=True)
        },
        "erf": {name: _numbers(field) for name, field in report.fields.items()},
        "claims": [vars(claim) for claim in found],
        "provenance": json.loads(json.dumps(report.provenance)),
    }
    write_json(directory / "study.json", result)
    style.write(directory / "scores.csv", csv(report.scores).encode())
    for name, figure in figures.study_figures(report).items():
        style.save(figure, directory / "figures" / f"{name}.{'png' if name in ('erf', 'gradcam') else 'svg'}")
    style.save(figures.summary(report), directory / "figures" / "summary.png")
    page = write_page(report, directory / "report" / "index.html")
    stdout.print(terminal(report.scores, report.findings, report.sizes, title=report.title))
    for claim in found:
        say(f"{claim.supported:>9}  {claim.statement}: {claim.evidence}")
    say(f"report: {page}")
    return result | {"report": str(page)}


def _numbers(field: Field) -> dict[str, float]:
    names = ("area_fraction", "diameter_px", "diameter_fraction", "theoretical_px", "mass")
    return {name: getattr(field, name) for name in names}
