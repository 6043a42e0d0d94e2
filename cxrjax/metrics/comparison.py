"""Do two models differ? On average by paired bootstrap over patients, finding by finding by DeLong's test.

A model may come as several tables, one a fold or a training seed: its AUROC is then the mean over them (see `sample`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.stats import t

from cxrjax.errors import CxrError
from cxrjax.findings import positions
from cxrjax.metrics.bootstrap import BootstrapResult, percentile_interval, same_images, strata
from cxrjax.metrics.delong import Estimate, delong
from cxrjax.metrics.ensemble import align
from cxrjax.metrics.predictions import Predictions


@dataclass(frozen=True)
class Difference:
    """Mean AUROC of one model less that of another.

    Attributes:
      value: the difference.
      low, high: its percentile interval.
      left_out: findings that some table's labels leave undefined.
      per_table: the difference in each table (fold or seed) by itself.
    """

    value: float
    low: float
    high: float
    left_out: tuple[str, ...] = ()
    per_table: tuple[float, ...] = ()

    def __str__(self) -> str:
        without = f", without {', '.join(self.left_out)} (one class only)" if self.left_out else ""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}){without}"


def difference(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    findings: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Mean AUROC of `first` less that of `second` over some findings, on the same patients.

    Args:
      first: tables of one model, one a fold or a training seed; their AUROCs are averaged.
      second: tables of the other, each of the same images and patients as that of `first`.
      findings: over which AUROC is averaged; both models must have them. Those that the labels leave undefined are
        left out, and named in the result.
      resamples: draws of patients.
      seed: of the draws.
      confidence: share of the draws that the interval holds.

    Raises:
      CxrError: the tables are of different images, or a finding is missing.
    """
    one, other = (
        BootstrapResult.from_tables([table.select(findings) for table in tables], resamples=resamples, seed=seed)
        for tables in (first, second)
    )
    return difference_from_bootstrap(one, other, findings, confidence=confidence)


def difference_from_bootstrap(
    first: BootstrapResult, second: BootstrapResult, findings: Sequence[str], *, confidence: float = 0.95
) -> Difference:
    """`difference` of models that were measured before, on the same draws.

    Raises:
      CxrError: the samples are of different images or draws, or a finding is missing.
    """
    alike = (first.resamples, first.seed, len(first.tables)) == (second.resamples, second.seed, len(second.tables))
    if not (alike and all(map(same_images, first.tables, second.tables))):
        raise CxrError("models can only be compared on the same images in the same order: predict the same part")
    places = [np.array(positions(findings, sample.findings)) for sample in (first, second)]
    defined: np.ndarray = np.all(first.defined[:, places[0]] & second.defined[:, places[1]], axis=0)
    left_out = tuple(finding for finding, there in zip(findings, defined, strict=True) if not there)
    if not defined.any():
        return Difference(math.nan, math.nan, math.nan, left_out)
    columns = [of[defined] for of in places]
    gaps = first.value[0][:, columns[0]].mean(1) - second.value[0][:, columns[1]].mean(1)
    draws = [sample.draws[0][:, :, of].mean((0, 2)) for sample, of in zip((first, second), columns, strict=True)]
    spread = percentile_interval(draws[0] - draws[1], confidence)
    return Difference(float(gaps.mean()), spread.low, spread.high, left_out, tuple(map(float, gaps)))


def compare_findings(
    first: Predictions | Sequence[Predictions],
    second: Predictions | Sequence[Predictions],
    *,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Test every finding for a difference in AUROC between two models, images of a patient being one unit.

    Args:
      first: predictions of one model, or several tables as in `difference`: folds are then independent of each other,
        and training seeds share their patients.
      second: of the other; each table of the same images and findings as that of `first`, in any order.
      confidence: of the intervals, each finding by itself.

    Returns:
      A flat row per finding: finding, first and second (the AUROCs), difference (first less second), low, high, z, p
      (two-sided, see `delong`), p_holm (adjusted for the number of findings that could be tested), reason (why a value
      is NaN, else empty).

    Raises:
      CxrError: the tables differ in images, findings, patients or labels.
    """
    firsts, seconds = ([tables] if isinstance(tables, Predictions) else list(tables) for tables in (first, second))
    if len(firsts) != len(seconds) or not firsts:
        raise CxrError(f"models with {len(firsts)} and {len(seconds)} tables of predictions cannot be compared")
    pairs = [align([one, other]) for one, other in zip(firsts, seconds, strict=True)]
    findings = pairs[0][0].findings
    pairs = [[table.select(findings) for table in pair] for pair in pairs]
    stratum = strata([pair[0] for pair in pairs])
    groups = [[pair for pair, of in zip(pairs, stratum, strict=True) if of == number] for number in set(stratum)]
    rows: list[dict[str, Any]] = []
    for k, finding in enumerate(findings):
        parts = [_contrast(group, k, len(pairs)) for group in groups]
        reason = next((reason for *_, reason in parts if reason), "")
        gap = Estimate(sum(part[0].value for part in parts), math.sqrt(sum(part[0].error ** 2 for part in parts)))
        low, high = gap.interval(confidence)
        rows.append(
            {"finding": finding, "first": sum(part[1] for part in parts), "second": sum(part[2] for part in parts)}
            | {"difference": gap.value, "low": low, "high": high, "z": gap.z, "p": gap.p, "reason": reason}
        )
    adjusted = holm(np.array([row["p"] for row in rows]))
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _contrast(pairs: Sequence[Sequence[Predictions]], k: int, tables: int) -> tuple[Estimate, float, float, str]:
    """What tables of the same images add to means over all `tables`: the difference, both AUROCs, why they are NaN."""
    one = pairs[0][0]
    scores = np.stack([table.logit[:, k] for pair in pairs for table in pair])
    areas = delong(scores, one.label[:, k], one.label_mask[:, k], one.patient)
    weights = np.tile([1.0, -1.0], len(pairs)) / tables
    first, second = areas.auroc[::2].sum() / tables, areas.auroc[1::2].sum() / tables
    return areas.contrast(weights), float(first), float(second), areas.reason


@dataclass(frozen=True)
class FoldMean:
    """A mean over folds with Student's distribution around it; NaN where there are fewer than two folds.

    Attributes:
      value: the mean.
      error: its standard error.
      freedom: degrees of freedom, one less than there are folds.
    """

    value: float
    error: float
    freedom: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The bounds value -+ t x error.

        Raises:
          CxrError: the confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise CxrError(f"confidence={confidence}: give a fraction between 0 and 1, such as 0.95")
        half = float(t.ppf((1 + confidence) / 2, self.freedom)) * self.error if self.freedom else math.nan
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p-value of the hypothesis that the mean is 0."""
        if self.error == 0:
            return 0.0 if self.value else 1.0
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom)) if self.freedom else math.nan


def mean_over_folds(each: Sequence[float], *, test_to_train: float) -> FoldMean:
    """The mean of one value a fold, by the corrected t-test (Nadeau & Bengio, Machine Learning 2003).

    Folds share training images, so that their values are correlated and the plain variance of the mean, s^2 / k, is too
    small; the corrected one is s^2 (1 / k + images for testing / images for training).

    Args:
      each: one value a fold.
      test_to_train: how many images are tested on for each that is trained on, in one fold.

    Raises:
      CxrError: no value, or a ratio below 0.
    """
    if not len(each) or test_to_train < 0:
        raise CxrError(f"{len(each)} folds with {test_to_train} test images for each of training have no mean")
    values, folds = np.asarray(each, np.float64), len(each)
    spread = float(values.std(ddof=1)) if folds > 1 else math.nan
    return FoldMean(float(values.mean()), spread * math.sqrt(1 / folds + test_to_train), folds - 1)


def holm(p: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """Adjust p-values so that the chance of any false rejection among them stays below the level (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, made at least as large as the one before it, and cut at 1.

    Args:
      p: 0 to 1; NaN marks a test that could not be made, which is not counted in m.

    Returns:
      The adjusted p-values in the same order, NaN where p is.

    Raises:
      CxrError: a p-value is below 0 or above 1.
    """
    p = np.asarray(p, np.float64)
    made = np.flatnonzero(~np.isnan(p))
    if not ((p[made] >= 0) & (p[made] <= 1)).all():
        raise CxrError("p-values go from 0 to 1")
    rising = made[np.argsort(p[made], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[rising] = np.minimum(np.maximum.accumulate(p[rising] * np.arange(len(rising), 0, -1)), 1)
    return adjusted
