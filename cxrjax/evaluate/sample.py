"""One model measured on the tables of several folds or training seeds, and on draws of their patients.

Networks of different folds put their scores on different scales, so images of two folds are never ranked against each
other: each table has its own AUROC, and these are averaged. Tables of the same images (training seeds) are drawn alike,
those of other patients (folds) by themselves: the bootstrap is stratified by fold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Shaped

from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import Ranking
from cxrjax.evaluate.intervals import bootstrap
from cxrjax.evaluate.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Sample:
    """AUROC (0) and average precision (1) of G tables and K findings, and of R draws of the patients.

    Attributes:
      tables: G of them, all of one model or ensemble.
      resamples, seed: of the draws; 0 resamples means none.
      stratum: i[G], equal where tables are of the same images, else the patients are others.
      value: f64[2, G, K], 0 to 1; NaN where `reasons` says why.
      draws: f64[2, G, R, K], NaN too where a draw is of one class only.
      reasons: G x K, why there is no value, else empty.
    """

    tables: tuple[Predictions, ...]
    resamples: int
    seed: int
    stratum: Int[np.ndarray, " G"]
    value: Float64[np.ndarray, "2 G K"]
    draws: Float64[np.ndarray, "2 G R K"]
    reasons: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, tables: Sequence[Predictions], *, resamples: int = 1000, seed: int = 0) -> "Sample":
        """Measure a model.

        Args:
          tables: with the same findings; any two of the same images in the same order, or of other patients.
          resamples: draws of patients; 0 for none.
          seed: of the draws; the first images' draws have this one, each other images' the next.

        Raises:
          CxrError: no table, other findings, tables that share some patients only, or a setting out of range.
        """
        if not tables:
            raise CxrError("no predictions are given")
        findings = tables[0].findings
        if any(table.findings != findings for table in tables):
            raise CxrError("tables of one model must have the same findings in the same order")
        stratum = strata(tables)
        values, draws, reasons = [], [], []
        for table, number in zip(tables, stratum.tolist(), strict=True):
            known = [(table.logit[:, k], table.label[:, k], table.known[:, k]) for k in range(len(findings))]
            rankings = [Ranking.of(*columns) for columns in known]
            every = np.ones((len(table), 1), np.int64)
            measured = [np.concatenate(ranking.measure(every)) for ranking in rankings]
            values.append(np.array(measured).reshape(len(findings), 2).T)
            nothing = np.empty((2, 0, len(findings)))
            draws.append(
                np.stack(bootstrap(rankings, table.patient, resamples=resamples, seed=seed + number))
                if resamples else nothing
            )  # fmt: skip
            reasons.append(tuple(ranking.reason for ranking in rankings))
        return cls(
            tuple(tables), resamples, seed, stratum, np.stack(values, axis=1), np.stack(draws, axis=1), tuple(reasons)
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """K names."""
        return self.tables[0].findings

    @property
    def defined(self) -> Bool[np.ndarray, "G K"]:
        """Which tables' labels define which findings' values."""
        return np.array([[not reason for reason in row] for row in self.reasons])

    @property
    def distinct(self) -> list[Predictions]:
        """One table of each stratum: every image once."""
        return [self.tables[g] for g in np.unique(self.stratum, return_index=True)[1]]


def strata(tables: Sequence[Predictions]) -> Int[np.ndarray, " G"]:
    """Number the sets of images that tables are of, in the order of their first appearance.

    Raises:
      CxrError: two tables are neither of the same images in the same order, nor of other patients.
    """
    firsts: list[Predictions] = []
    numbers = []
    for table in tables:
        number = next((i for i, first in enumerate(firsts) if same_images(first, table)), len(firsts))
        if number == len(firsts):
            for first in firsts:
                _refuse_shared(first.patient, table.patient)
            firsts.append(table)
        numbers.append(number)
    return np.array(numbers)


def same_images(first: Predictions, second: Predictions) -> bool:
    """Whether two tables are of the same images and patients, in the same order."""
    return np.array_equal(first.id, second.id) and np.array_equal(first.patient, second.patient)


def _refuse_shared(first: Shaped[np.ndarray, " N"], second: Shaped[np.ndarray, " M"]) -> None:
    shared = np.intersect1d(first, second)
    if len(shared):
        raise CxrError(
            f"two tables of one model share {len(shared):,} patients (the first is {shared[0]}) but are not of the "
            "same images in the same order: predict the same part, or folds without common patients"
        )
