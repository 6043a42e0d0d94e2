"""What a resolution study was to show, whether this one shows it, and what it cannot show: in plain words."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cxrjax.evaluate.comparison import difference
from cxrjax.evaluate.scores import Scores
from cxrjax.report.content import Claim, Field
from cxrjax.studies.study import STACKED, VOTED, Study

MARGIN = 0.01
"""A gain in AUROC that would matter; a coarse finding 'does not gain' if its interval stays below this."""

PHANTOM_NOTES = (
    "The radiographs of this study are drawn by a program. They prove that the whole path works, from files to this "
    "report, and that a finding drawn finer needs more pixels. They prove nothing about patients: real findings are "
    "not independent, their sizes overlap, and labels from reports err in ways that are not drawn here.",
    "The networks are small and trained for minutes. Where a coarse finding is found worse in larger images, that may "
    "be an effect of this budget and of learning all findings together, and not of the pixels. The control run tells: "
    "the same network, at the largest size, on the same images, with only the coarse findings to learn.",
)


def assess(study: Study, fields: Mapping[str, Field]) -> list[Claim]:
    """Each claim with its statistics; differences are of mean AUROC, with patients drawn in pairs."""
    config, tables, sizes = study.config, study.tables, study.sizes
    options = {"resamples": config.evaluate.resamples or 1000, "confidence": config.evaluate.confidence}
    small, large = sizes[0], sizes[-1]
    found = []

    if config.study.fine:
        gain = difference(tables[large], tables[small], config.study.fine, **options)
        found.append(
            Claim(
                f"Fine findings ({listed(config.study.fine)}) gain with resolution",
                verdict(gain.low > 0, gain.high < 0),
                f"mean AUROC at {large} less that at {small}: {gain}",
            )
        )
    if config.study.coarse:
        gain = difference(tables[large], tables[small], config.study.coarse, **options)
        found.append(
            Claim(
                f"Coarse findings ({listed(config.study.coarse)}) do not",
                verdict(gain.high < MARGIN, gain.low > MARGIN),
                f"mean AUROC at {large} less that at {small}: {gain}; a gain below {MARGIN} counts as none",
            )
        )
    found.append(_ensemble_claim(study, options))
    diameters = [fields[name].diameter_fraction for name in sizes]
    found.append(
        Claim(
            "The effective receptive field shrinks relative to the image as resolution rises",
            verdict(bool(np.all(np.diff(diameters) < 0)), bool(np.all(np.diff(diameters) >= 0))),
            ", ".join(f"{value:.0%} of the width at {name}" for name, value in zip(sizes, diameters, strict=True)),
        )
    )
    if study.control is not None:
        found.append(_control_claim(study, options))
    return found


def lead(study: Study, scores: Mapping[str, Scores]) -> list[str]:
    """The opening: what was done, and the numbers that matter most."""
    experiment = study.first[0].experiment
    images = {name: len(part.row) for name, part in experiment.parts.items()}
    means = {name: of.mean.auroc for name, of in scores.items()}
    best = max(study.sizes, key=lambda name: means[name])
    return [
        f"{study.config.model.name} was trained at {listed(study.sizes)} on {images['train']:,} images of "
        f"{experiment.records.dataset}; each run kept its best epoch of {images['validation']:,} validation images, on "
        f"which the ensemble's weights were learnt too. All scores are of {images['test']:,} test images of other "
        "patients.",
        f"The best single size on average is {best} (mean AUROC {means[best]:.3f}); the stacked ensemble reaches "
        f"{means[STACKED]:.3f}, plain voting {means[VOTED]:.3f}.",
    ]


def notes(study: Study) -> Sequence[str]:
    """What this study does and does not prove."""
    kept = PHANTOM_NOTES if study.first[0].experiment.records.dataset == "cxr_phantom" else ()
    if study.control is None:
        kept = kept[:1]
    seeds = (
        "Every model was trained once: the intervals are of the test patients, and say nothing of how much another "
        "training seed would change."
        if len(study.members) == 1
        else f"Figures and intervals are those of training seed {next(iter(study.members))}; claims average all seeds."
    )
    return (*kept, seeds)


def _control_claim(study: Study, options: Mapping[str, Any]) -> Claim:
    """Whether large images by themselves cost coarse findings anything: the control has nothing else to learn."""
    assert study.control is not None
    control = study.control.test
    losses = {
        name: difference([control], [tables[0].select(control.findings)], control.findings, **options)
        for name, tables in study.tables.items()
        if name in study.sizes
    }
    best = min(losses, key=lambda name: np.nan_to_num(losses[name].value, nan=np.inf))
    return Claim(
        f"Trained on nothing else, the network at {study.control.name} finds {listed(control.findings)} as well as "
        "at any size",
        verdict(losses[best].low > -MARGIN, losses[best].high < -MARGIN),
        f"mean AUROC of this control less that of {best}, their best size: {losses[best]}; "
        f"a loss below {MARGIN} counts as none",
    )


def _ensemble_claim(study: Study, options: Mapping[str, Any]) -> Claim:
    findings = study.first[0].experiment.findings
    gains = {name: difference(study.tables[STACKED], study.tables[name], findings, **options) for name in study.sizes}
    nearest = min(gains, key=lambda name: np.nan_to_num(gains[name].value, nan=np.inf))
    return Claim(
        "The stacked ensemble beats every single size on average",
        verdict(all(gain.low > 0 for gain in gains.values()), any(gain.high < 0 for gain in gains.values())),
        f"mean AUROC of the ensemble less that of {nearest}, the best single size: {gains[nearest]}",
    )


def verdict(yes: bool, no: bool) -> Literal["yes", "no", "undecided"]:
    """What became of a claim: supported, refuted, or neither."""
    return "yes" if yes else "no" if no else "undecided"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
