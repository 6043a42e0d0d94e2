"""Claims of the resolution study: general ones, and those of the paper it reproduces.

Differences are of mean AUROCs over findings and over all folds or seeds; for their intervals see
`ResolutionStudy.difference`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from cxrjax.metrics.comparison import compare_findings, difference, holm
from cxrjax.report.content import Claim, ErfMap
from cxrjax.studies.resolution.study import STACKED, ResolutionStudy
from cxrjax.studies.study import claim_status, join_names

MARGIN = 0.01
"""Smallest difference in AUROC that matters: a coarse finding "does not gain" if its interval stays below this."""
FALLING, RISING = "Cardiomegaly", "Pneumothorax"
_SHUFFLES = 9999


def make_claims(study: ResolutionStudy, erfs: Mapping[str, Sequence[ErfMap]]) -> list[Claim]:
    """Return every claim with its evidence.

    Args:
      study: its members and ensembles.
      erfs: receptive fields of each size, one per group.
    """
    has_paper = bool(study.paper_name)
    return [
        *resolution_claims(study),
        *([*peak_claim(study), *trend_claims(study)] if has_paper else []),
        ensemble_claim(study),
        *([best_everywhere_claim(study), *weights_claim(study)] if has_paper else []),
        receptive_field_claim(study, erfs),
        *control_claim(study),
    ]


def resolution_claims(study: ResolutionStudy) -> list[Claim]:
    """Test whether the findings in `study.fine` gain with resolution and those in `study.coarse` do not."""
    large, small, keys, claims = study.arms[-1], study.arms[0], study.config.study, []
    if keys.fine:
        gain = study.difference(large, small, keys.fine)
        claims.append(
            Claim(
                f"Fine findings ({join_names(keys.fine)}) gain with resolution",
                claim_status(gain.low > 0, gain.high < 0),
                f"mean AUROC at {large} minus {small}: {gain}{study.describe_agreement(gain)}",
            )
        )
    if keys.coarse:
        gain = study.difference(large, small, keys.coarse)
        claims.append(
            Claim(
                f"Coarse findings ({join_names(keys.coarse)}) do not",
                claim_status(gain.high < MARGIN, gain.low > MARGIN),
                f"mean AUROC at {large} minus {small}: {gain}{study.describe_agreement(gain)}; a gain below {MARGIN} "
                "counts as none",
            )
        )
    return claims


def peak_claim(study: ResolutionStudy) -> list[Claim]:
    """Test whether the mean AUROC is highest at a size between the smallest and the largest; empty for two sizes."""
    small, *middle, large = study.arms
    if not middle:
        return []
    means = {name: study.scores[name].mean.auroc for name in study.arms}
    best = max(middle, key=lambda name: np.nan_to_num(means[name], nan=-1))
    gains = {name: study.difference(best, name, study.findings) for name in (small, large)}
    texts = [f"{best} minus {name}: {gain}{study.describe_agreement(gain)}" for name, gain in gains.items()]
    return [
        Claim(
            "Mean AUROC peaks at a middle size",
            claim_status(all(gain.low > 0 for gain in gains.values()), any(gain.high < 0 for gain in gains.values())),
            f"mean AUROC {_format_by_size(means)}; {'; '.join(texts)}",
        )
    ]


def trend_claims(study: ResolutionStudy) -> list[Claim]:
    """Test whether the AUROC of the paper's two examples falls and rises with size; findings not learnt are skipped."""
    claims = []
    for finding, direction in ((FALLING, "falls"), (RISING, "rises")):
        if finding not in study.findings:
            continue
        k, large, small = study.findings.index(finding), study.arms[-1], study.arms[0]
        values = {name: study.scores[name].findings[k].auroc for name in study.arms}
        gain = study.difference(large, small, [finding])
        rises, falls = gain.low > 0, gain.high < 0
        steps = np.diff(list(values.values())) * np.sign(gain.value)
        claims.append(
            Claim(
                f"{finding} {direction} with image size",
                claim_status(*((falls, rises) if direction == "falls" else (rises, falls))),
                f"AUROC {_format_by_size(values)}; {large} minus {small}: {gain}"
                f"{study.describe_agreement(gain)}{'; not at every step' if (steps < 0).any() else ''}",
            )
        )
    return claims


def ensemble_claim(study: ResolutionStudy) -> Claim:
    """Test whether the stacked ensemble has a higher mean AUROC than every single size."""
    gains = {name: study.difference(STACKED, name, study.findings) for name in study.arms}
    nearest = min(gains, key=lambda name: np.nan_to_num(gains[name].value, nan=np.inf))
    return Claim(
        "The stacked ensemble beats every single size on average",
        claim_status(all(gain.low > 0 for gain in gains.values()), any(gain.high < 0 for gain in gains.values())),
        f"mean AUROC of the ensemble minus that of {nearest}, the best single size: {gains[nearest]}"
        f"{study.describe_agreement(gains[nearest])}",
    )


def best_everywhere_claim(study: ResolutionStudy) -> Claim:
    """Test whether the stacked ensemble beats the best single size on every finding."""
    alpha = 1 - study.config.evaluate.confidence_level
    rows = [row for row in ensemble_gains(study) if not row["reason"]]
    wins = [row for row in rows if row["low"] > 0]
    losses = [row for row in rows if row["difference"] < 0 and row["p_holm"] < alpha]
    higher = sum(row["difference"] >= 0 for row in rows)
    smallest = min(rows, key=lambda row: row["difference"], default=None)
    evidence = f"its AUROC is the highest in {higher} of {len(rows)} findings, significantly in {len(wins)}"
    if smallest is not None:
        gain = f"{smallest['difference']:+.3f} ({smallest['low']:+.3f} to {smallest['high']:+.3f})"
        evidence += f"; smallest difference: {gain} for {smallest['finding']}, against {smallest['against']}"
    if losses:
        evidence += f"; significantly worse in {join_names([row['finding'] for row in losses])}"
    return Claim(
        "The stacked ensemble is the best on every finding",
        claim_status(bool(rows) and len(wins) == len(rows), bool(losses)),
        evidence,
    )


def ensemble_gains(study: ResolutionStudy) -> list[dict[str, Any]]:
    """Compare the stacked ensemble with the best single size of each finding, which `against` names.

    DeLong's test, folds having independent patients; with several folds, intervals and p values are widened as in
    `ResolutionStudy.difference`.
    """
    confidence, tables = study.config.evaluate.confidence_level, study.tables
    rows_by_size = {name: compare_findings(tables[STACKED], tables[name], confidence=confidence) for name in study.arms}
    aurocs, rows = study.group_aurocs, []
    for k in range(len(study.findings)):
        best = max(study.arms, key=lambda name: np.nan_to_num(rows_by_size[name][k]["second"], nan=-1))
        row: dict[str, Any] = rows_by_size[best][k] | {"against": best}
        group_gains = (aurocs[STACKED] - aurocs[best])[:, k].tolist()
        row["low"], row["high"] = study.widen_interval(row["low"], row["high"], group_gains)
        if (estimate := study.estimate_over_folds(group_gains)) is not None:
            row["p"] = max(row["p"], estimate.p)
        rows.append(row)
    adjusted = holm(np.array([row["p"] for row in rows]))
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


class WeightCorrelation(NamedTuple):
    """How ensemble weights correlate with scores.

    Attributes:
      hits: number of findings whose largest weight is on a size with the highest score.
      findings: number of findings.
      correlation: Spearman's rank correlation across sizes, mean over findings.
      p: two-sided p value of a correlation of 0.
    """

    hits: int
    findings: int
    correlation: float
    p: float


def correlate_weights(
    score: Float[np.ndarray, "K S"], weight: Float[np.ndarray, "K S"], *, seed: int = 0
) -> WeightCorrelation:
    """Correlate each finding's ensemble weights with its scores, across sizes.

    The null distribution comes from shuffling the scores within each finding, as if findings were independent.
    Findings with an undefined score, or with equal scores or equal weights at all sizes, are left out.

    Args:
      score: of each single size.
      weight: of each size in the ensemble.
      seed: of the shuffles.
    """
    usable = np.isfinite(score).all(1) & (np.ptp(score, axis=1) > 0) & (np.ptp(weight, axis=1) > 0)
    score, weight = score[usable], weight[usable]
    if not len(score):
        return WeightCorrelation(0, 0, float("nan"), float("nan"))
    largest, highest = (values == values.max(1, keepdims=True) for values in (weight, score))
    a, b = (_standardize(rankdata(values, axis=1)) for values in (score, weight))
    observed = float((a * b).sum(1).mean())
    rng = np.random.default_rng(seed)
    shuffled = [float((rng.permuted(a, axis=1) * b).sum(1).mean()) for _ in range(_SHUFFLES)]
    extreme = int(np.count_nonzero(np.abs(shuffled) >= abs(observed) - 1e-12))
    hits = int((largest & highest).any(1).sum())
    return WeightCorrelation(hits, len(score), observed, (1 + extreme) / (1 + _SHUFFLES))


def _standardize(ranks: np.ndarray) -> np.ndarray:
    """Scale rows to mean 0 and length 1, so that their products are Spearman's correlations."""
    centred = ranks - ranks.mean(1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def weights_claim(study: ResolutionStudy) -> list[Claim]:
    """Test whether the ensemble's weights follow the scores of the single sizes; empty if undefined."""
    score = np.array([[row.auroc for row in study.scores[name].findings] for name in study.arms]).T
    result = correlate_weights(score, study.mean_weights)
    if not result.findings:
        return []
    significant = result.p < 1 - study.config.evaluate.confidence_level
    return [
        Claim(
            "The ensemble's weights follow the AUROC of the single sizes",
            claim_status(significant and result.correlation > 0, significant and result.correlation < 0),
            f"the largest weight is on the best single size in {result.hits} of {result.findings} findings, "
            f"{result.findings / len(study.arms):.1f} expected by chance; rank correlation across sizes, mean over "
            f"findings: {result.correlation:+.2f} (p {'< 0.001' if result.p < 0.001 else f'= {result.p:.3f}'}, "
            "permutation test)",
        )
    ]


def receptive_field_claim(study: ResolutionStudy, erfs: Mapping[str, Sequence[ErfMap]]) -> Claim:
    """Test whether the effective receptive field shrinks relative to the image; `erfs` has one per size and group."""
    diameters = np.array([[erf.diameter_fraction for erf in erfs[name]] for name in study.arms]).T
    steps = np.diff(diameters, axis=1)
    shrinks = (steps < 0).all(axis=1)
    means = zip(study.arms, diameters.mean(axis=0), strict=True)
    return Claim(
        "The effective receptive field shrinks relative to the image as resolution rises",
        claim_status(bool(shrinks.all()), bool((steps >= 0).all())),
        ", ".join(f"{value:.0%} of the width at {name}" for name, value in means)
        + (f"; it shrinks at every step in {shrinks.sum()} of {study.group_count}" if study.group_count else ""),
    )


def control_claim(study: ResolutionStudy) -> list[Claim]:
    """Test whether large images alone cost coarse findings anything; the control learns nothing else."""
    if study.control is None:
        return []
    alone = study.control.test
    gains = {
        name: difference(
            [alone], [study.tables[name][0].select(alone.findings)], alone.findings, **study.bootstrap_options
        )
        for name in study.arms
    }
    best = min(gains, key=lambda name: np.nan_to_num(gains[name].value, nan=np.inf))
    return [
        Claim(
            f"Trained on nothing else, the network at {study.control.name} finds {join_names(alone.findings)} as well "
            "as at any size",
            claim_status(gains[best].low > -MARGIN, gains[best].high < -MARGIN),
            f"mean AUROC of this control minus that of {best}, their best size: {gains[best]}; "
            f"a loss below {MARGIN} counts as none",
        )
    ]


def _format_by_size(values: Mapping[str, float]) -> str:
    return f"{join_names([f'{value:.3f}' for value in values.values()])} at {join_names(list(values))}"
