"""Rates of right and wrong calls, from the four counts of yes or no against true or false."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Shaped


@dataclass(frozen=True, eq=False)
class Counts:
    """How often K findings were called and there, called and absent, missed, and rightly not called.

    The rates are fractions from 0 to 1, NaN where nothing was there to count. Their names and definitions are those of
    the R package caret, whose report the six-class paper prints.

    Attributes:
      tp, fp, fn, tn: int[K], true positives, false positives, false negatives, true negatives.
    """

    tp: Int[np.ndarray, " K"]
    fp: Int[np.ndarray, " K"]
    fn: Int[np.ndarray, " K"]
    tn: Int[np.ndarray, " K"]

    @classmethod
    def of(
        cls, called: Bool[np.ndarray, "N K"], label: Shaped[np.ndarray, "N K"], known: Bool[np.ndarray, "N K"]
    ) -> "Counts":
        """Count calls against labels (positive where true or 1) over the known ones."""
        there = np.asarray(label) > 0
        kinds = (called & there, called & ~there, ~called & there, ~called & ~there)
        return cls(*(np.count_nonzero(kind & known, axis=0) for kind in kinds))

    @property
    def total(self) -> Int[np.ndarray, " K"]:
        """All that was counted."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def sensitivity(self) -> Float64[np.ndarray, " K"]:
        """Of what is there, how much was called; also known as recall."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Float64[np.ndarray, " K"]:
        """Of what is absent, how much was not called."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def ppv(self) -> Float64[np.ndarray, " K"]:
        """Of what was called, how much is there: positive predictive value, also known as precision."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def npv(self) -> Float64[np.ndarray, " K"]:
        """Of what was not called, how much is absent: negative predictive value."""
        return _ratio(self.tn, self.tn + self.fn)

    @property
    def f1(self) -> Float64[np.ndarray, " K"]:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> Float64[np.ndarray, " K"]:
        """How much was called or not called rightly."""
        return _ratio(self.tp + self.tn, self.total)

    @property
    def prevalence(self) -> Float64[np.ndarray, " K"]:
        """How much is there."""
        return _ratio(self.tp + self.fn, self.total)

    @property
    def detection_rate(self) -> Float64[np.ndarray, " K"]:
        """How much was called and is there, of all."""
        return _ratio(self.tp, self.total)

    @property
    def detection_prevalence(self) -> Float64[np.ndarray, " K"]:
        """How much was called, of all."""
        return _ratio(self.tp + self.fp, self.total)

    @property
    def balanced_accuracy(self) -> Float64[np.ndarray, " K"]:
        """Mean of sensitivity and specificity."""
        return (self.sensitivity + self.specificity) / 2


def _ratio(part: Int[np.ndarray, " K"], whole: Int[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
