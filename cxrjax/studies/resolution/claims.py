"""All claims of a resolution study, and among them those of the paper it reproduces."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from cxrjax.metrics.comparison import compare_findings, holm
from cxrjax.report.content import Claim, Field, Table
from cxrjax.studies.members import STACKED, Study
from cxrjax.studies.resolution import statements
from cxrjax.studies.resolution.statements import listed, verdict

FALLS, RISES = "Cardiomegaly", "Pneumothorax"
_SHUFFLES = 9999


def assess(study: Study, fields: Mapping[str, Sequence[Field]]) -> list[Claim]:
    """Each claim with its statistics; `fields` holds the receptive fields of each size, one a group."""
    of_paper = bool(study.config.study.paper)
    return [
        *statements.fine_and_coarse(study),
        *([*peak(study), *trends(study)] if of_paper else []),
        statements.ensemble(study),
        *([best_everywhere(study), *weights_follow(study)] if of_paper else []),
        statements.receptive_field(study, fields),
        *statements.control(study),
    ]


def peak(study: Study) -> list[Claim]:
    """Whether the mean AUROC is highest at a size that is neither the smallest nor the largest."""
    small, *middle, large = study.sizes
    if not middle:
        return []
    means = {name: study.scores[name].mean.auroc for name in study.sizes}
    best = max(middle, key=lambda name: np.nan_to_num(means[name], nan=-1))
    gains = {name: study.gain(best, name, study.findings) for name in (small, large)}
    texts = [f"that at {best} less that at {name}: {gain}{study.agreeing(gain)}" for name, gain in gains.items()]
    return [
        Claim(
            "Mean AUROC peaks at a middle size",
            verdict(all(gain.low > 0 for gain in gains.values()), any(gain.high < 0 for gain in gains.values())),
            f"mean AUROC {_by_size(means)}; {'; '.join(texts)}",
        )
    ]


def trends(study: Study) -> list[Claim]:
    """Whether findings that the paper names fall and rise from the smallest to the largest size, if learnt here."""
    found = []
    for finding, way in ((FALLS, "falls"), (RISES, "rises")):
        if finding in study.findings:
            row = study.findings.index(finding)
            values = {name: study.scores[name].findings[row].auroc for name in study.sizes}
            gain = study.gain(study.sizes[-1], study.sizes[0], [finding])
            up, down = gain.low > 0, gain.high < 0
            steps = np.diff(list(values.values())) * np.sign(gain.value)
            found.append(
                Claim(
                    f"{finding} {way} with image size",
                    verdict(*((down, up) if way == "falls" else (up, down))),
                    f"AUROC {_by_size(values)}; at {study.sizes[-1]} less that at {study.sizes[0]}: {gain}"
                    f"{study.agreeing(gain)}{'; not at every step' if (steps < 0).any() else ''}",
                )
            )
    return found


def best_everywhere(study: Study) -> Claim:
    """Whether the ensemble beats the best single size of every finding."""
    rows = gains_by_finding(study)
    tested = [row for row in rows if not row["reason"]]
    won, lost = [row for row in tested if row["low"] > 0], [row for row in tested if _worse(row, study)]
    ahead = sum(row["difference"] >= 0 for row in tested)
    least = min(tested, key=lambda row: row["difference"], default=None)
    evidence = f"its AUROC is the highest in {ahead} of {len(tested)} findings, significantly in {len(won)}"
    if least is not None:
        gap = f"{least['difference']:+.3f} ({least['low']:+.3f} to {least['high']:+.3f})"
        evidence += f"; least of all in {least['finding']}: less that of {least['against']}, {gap}"
    if lost:
        evidence += f"; significantly worse in {listed([row['finding'] for row in lost])}"
    return Claim(
        "The stacked ensemble is the best on every finding",
        verdict(bool(tested) and len(won) == len(tested), bool(lost)),
        evidence,
    )


def gains_by_finding(study: Study) -> list[dict[str, Any]]:
    """For each finding the stacked ensemble less the single size with the highest AUROC, which `against` names.

    By DeLong's test, patients of folds being independent; over folds, intervals and p are widened as those of `gain`.
    """
    confidence = study.config.evaluate.confidence
    rows = {name: compare_findings(study.tables[STACKED], study.tables[name], confidence=confidence) for name in study.sizes}
    found = []
    for k in range(len(study.findings)):
        best = max(study.sizes, key=lambda name: np.nan_to_num(rows[name][k]["second"], nan=-1))
        row: dict[str, Any] = rows[best][k] | {"against": best}
        each = (study.samples[STACKED].value[0] - study.samples[best].value[0])[:, k].tolist()
        row["low"], row["high"] = study.widened(row["low"], row["high"], each)
        if (spread := study.over_folds(each)) is not None:
            row["p"] = max(row["p"], spread.p)
        found.append(row)
    adjusted = holm(np.array([row["p"] for row in found]))
    return [row | {"p_holm": float(p)} for row, p in zip(found, adjusted, strict=True)]


def gains_table(study: Study) -> Table:
    """The same as a table."""
    rows = [
        [row["finding"], row["first"], f"{row['second']:.3f} ({row['against']})", f"{row['difference']:+.3f}",
         f"{row['low']:+.3f} to {row['high']:+.3f}"] if not row["reason"] else
        [row["finding"], None, None, f"n/a ({row['reason']})", None]
        for row in gains_by_finding(study)
    ]  # fmt: skip
    over = "" if study.kind == "training seed" else ", or over folds where that is wider"
    return Table(
        f"The stacked ensemble less the best single size of each finding, with {study.config.evaluate.confidence:.0%} "
        f"intervals (DeLong, patients as units{over}); the best size is picked on the same images, which favours it.",
        ("Finding", "Stacked", "Best single size", "Difference", "Interval"),
        rows,
    )


def _worse(row: dict, study: Study) -> bool:
    return row["difference"] < 0 and row["p_holm"] < 1 - study.config.evaluate.confidence


class Following(NamedTuple):
    """How weights follow scores.

    Attributes:
      hits: in how many findings the largest weight is on a size of the highest score.
      findings: how many there are.
      correlation: Spearman's across sizes, mean over findings.
      p: two-sided, of its being 0.
    """

    hits: int
    findings: int
    correlation: float
    p: float


def following(score: Float[np.ndarray, "K S"], weight: Float[np.ndarray, "K S"], *, seed: int = 0) -> Following:
    """Compare each finding's weights with its scores, across sizes.

    The null distribution comes of shuffling the scores within each finding, as if findings were independent. Findings
    with an undefined score, or whose scores or weights are all equal, are left out.

    Args:
      score: of each single size.
      weight: of each size in the ensemble.
      seed: of the shuffles.
    """
    usable = np.isfinite(score).all(1) & (np.ptp(score, axis=1) > 0) & (np.ptp(weight, axis=1) > 0)
    score, weight = score[usable], weight[usable]
    if not len(score):
        return Following(0, 0, float("nan"), float("nan"))
    largest, highest = (values == values.max(1, keepdims=True) for values in (weight, score))
    a, b = (_standardised(rankdata(values, axis=1)) for values in (score, weight))
    observed = float((a * b).sum(1).mean())
    rng = np.random.default_rng(seed)
    shuffled = [float((rng.permuted(a, axis=1) * b).sum(1).mean()) for _ in range(_SHUFFLES)]
    beyond = int(np.count_nonzero(np.abs(shuffled) >= abs(observed) - 1e-12))
    return Following(int((largest & highest).any(1).sum()), len(score), observed, (1 + beyond) / (1 + _SHUFFLES))


def _standardised(ranks: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1, whose products are Spearman's correlations."""
    centred = ranks - ranks.mean(1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def weights_follow(study: Study) -> list[Claim]:
    """Whether the ensemble's weights follow the scores of the single sizes."""
    score = np.array([[row.auroc for row in study.scores[name].findings] for name in study.sizes]).T
    found = following(score, study.mean_weights)
    if not found.findings:
        return []
    sure = found.p < 1 - study.config.evaluate.confidence
    return [
        Claim(
            "The ensemble's weights follow the AUROC of the single sizes",
            verdict(sure and found.correlation > 0, sure and found.correlation < 0),
            f"the largest weight is on the best single size in {found.hits} of {found.findings} findings, by chance in "
            f"{found.findings / len(study.sizes):.1f}; rank correlation across sizes, mean over findings: "
            f"{found.correlation:+.2f} (p {'< 0.001' if found.p < 0.001 else f'= {found.p:.3f}'}, by shuffling)",
        )
    ]


def _by_size(values: Mapping[str, float]) -> str:
    return f"{listed([f'{value:.3f}' for value in values.values()])} at {listed(list(values))}"
