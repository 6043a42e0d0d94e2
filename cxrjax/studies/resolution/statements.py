"""What a resolution study was to show, whether this one shows it, and what it cannot show: in plain words.

Differences are of AUROCs, averaged over findings and over all folds or seeds; for their intervals see `Study.gain`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cxrjax.metrics.comparison import difference
from cxrjax.report.content import Claim, Field
from cxrjax.studies.members import LOGISTIC, STACKED, VOTED, Study

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


def fine_and_coarse(study: Study) -> list[Claim]:
    """Whether the findings that `study.fine` and `study.coarse` name gain with resolution."""
    large, small, found = study.sizes[-1], study.sizes[0], []
    if study.config.study.fine:
        gain = study.gain(large, small, study.config.study.fine)
        found.append(
            Claim(
                f"Fine findings ({listed(study.config.study.fine)}) gain with resolution",
                verdict(gain.low > 0, gain.high < 0),
                f"mean AUROC at {large} less that at {small}: {gain}{study.agreeing(gain)}",
            )
        )
    if study.config.study.coarse:
        gain = study.gain(large, small, study.config.study.coarse)
        found.append(
            Claim(
                f"Coarse findings ({listed(study.config.study.coarse)}) do not",
                verdict(gain.high < MARGIN, gain.low > MARGIN),
                f"mean AUROC at {large} less that at {small}: {gain}{study.agreeing(gain)}; a gain below {MARGIN} "
                "counts as none",
            )
        )
    return found


def ensemble(study: Study) -> Claim:
    """Whether stacking pays on average."""
    gains = {name: study.gain(STACKED, name, study.findings) for name in study.sizes}
    nearest = min(gains, key=lambda name: np.nan_to_num(gains[name].value, nan=np.inf))
    return Claim(
        "The stacked ensemble beats every single size on average",
        verdict(all(gain.low > 0 for gain in gains.values()), any(gain.high < 0 for gain in gains.values())),
        f"mean AUROC of the ensemble less that of {nearest}, the best single size: {gains[nearest]}"
        f"{study.agreeing(gains[nearest])}",
    )


def receptive_field(study: Study, fields: Mapping[str, Sequence[Field]]) -> Claim:
    """Whether the effective receptive field shrinks in the image's frame; `fields` has one of each size and group."""
    diameters = np.array([[field.diameter_fraction for field in fields[name]] for name in study.sizes]).T
    steps = np.diff(diameters, axis=1)
    falls = (steps < 0).all(axis=1)
    means = zip(study.sizes, diameters.mean(axis=0), strict=True)
    return Claim(
        "The effective receptive field shrinks relative to the image as resolution rises",
        verdict(bool(falls.all()), bool((steps >= 0).all())),
        ", ".join(f"{value:.0%} of the width at {name}" for name, value in means)
        + (f"; it falls at every step in {falls.sum()} of {study.several}" if study.several else ""),
    )


def control(study: Study) -> list[Claim]:
    """Whether large images by themselves cost coarse findings anything: the control has nothing else to learn."""
    if study.control is None:
        return []
    alone, evaluate = study.control.test, study.config.evaluate
    options: dict[str, Any] = {"resamples": evaluate.resamples or 1000, "confidence": evaluate.confidence}
    losses = {
        name: difference([alone], [study.tables[name][0].select(alone.findings)], alone.findings, **options)
        for name in study.sizes
    }
    best = min(losses, key=lambda name: np.nan_to_num(losses[name].value, nan=np.inf))
    return [
        Claim(
            f"Trained on nothing else, the network at {study.control.name} finds {listed(alone.findings)} as well as "
            "at any size",
            verdict(losses[best].low > -MARGIN, losses[best].high < -MARGIN),
            f"mean AUROC of this control less that of {best}, their best size: {losses[best]}; "
            f"a loss below {MARGIN} counts as none",
        )
    ]


def lead(study: Study) -> list[str]:
    """The opening: what was done, and the numbers that matter most."""
    means = {name: of.mean.auroc for name, of in study.scores.items()}
    best = max(study.sizes, key=lambda name: means[name])
    return [
        _design(study),
        f"The best single size on average is {best} (mean AUROC {means[best]:.3f}); the stacked ensemble reaches "
        f"{means[STACKED]:.3f}, plain voting {means[VOTED]:.3f}, logistic stacking {means[LOGISTIC]:.3f}.",
    ]


def _design(study: Study) -> str:
    experiment, model = study.first[0].experiment, study.config.model.name
    images = {name: len(part.row) for name, part in experiment.examples_by_split.items()}
    if study.kind == "training seed":
        return (
            f"{model} was trained at {listed(study.sizes)} on {images['train']:,} images of {study.dataset}; each run "
            f"kept its best epoch of {images['validation']:,} validation images, on which the ensemble's weights were "
            f"learnt too. All scores are of {images['test']:,} test images of other patients."
        )
    test = study.scores[STACKED]
    return (
        f"{model} was trained at {listed(study.sizes)} in {study.several} of {study.dataset}, in {study.first_called} "
        f"on {images['train']:,} images; each run kept its best epoch of that fold's {images['validation']:,} "
        f"validation images, on which the ensembles were learnt too. All scores are means over {study.several}, of "
        f"{test.images:,} test images of {test.patients:,} patients in all; no patient is in two parts of a fold, nor "
        "tested on in two folds."
    )


def notes(study: Study) -> Sequence[str]:
    """What this study does and does not prove."""
    drawn = study.dataset == "cxr_phantom"
    kept = [PHANTOM_NOTES[0]] * drawn + [PHANTOM_NOTES[1]] * (drawn and study.control is not None)
    if not study.several:
        kept.append(
            "Every model was trained once: the intervals are of the test patients, and say nothing of how much another "
            "training seed would change."
        )
        return [*kept, *_voted(study), *_unsized(study)]
    kept.append(
        f"Scores, intervals and claims average {study.several}. ROC curves, loss curves, activation maps and pictures "
        f"of receptive fields are those of {study.first_called}."
    )
    if study.kind == "training seed":
        kept.append(
            "Intervals come of drawing test patients; how much another training would change shows in the standard "
            f"deviations over {study.several}."
        )
    else:
        kept.append(
            "Intervals of scores come of drawing test patients, fold by fold: they hold for these networks. Those of "
            "differences, by which claims are judged, are the wider of that and of the corrected t-test over folds "
            "(Nadeau and Bengio 2003), which counts what another training would change, too."
        )
    return [*kept, *_voted(study), *_unsized(study)]


def _unsized(study: Study) -> list[str]:
    """Why a study that is to have it has no scatter of the images' sizes."""
    if not study.config.study.paper or study.first[0].experiment.records.original_sizes is not None:
        return []
    return [
        "The records hold no sizes of original images (they are drawn, or were prepared before sizes were kept), so "
        "that there is no scatter of them."
    ]


def _voted(study: Study) -> list[str]:
    """Findings that logistic stacking has no regression of."""
    why = {
        f"{finding} ({reason})": None
        for learnt in study.regressions.values()
        for finding, reason in zip(study.findings, learnt.voted, strict=True)
        if reason
    }
    if not why:
        return []
    return [f"Logistic stacking votes where validation labels define no regression: {listed(list(why))}."]


def verdict(yes: bool, no: bool) -> Literal["yes", "no", "undecided"]:
    """What became of a claim: supported, refuted, or neither."""
    return "yes" if yes else "no" if no else "undecided"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
