"""What k folds say of a mean: its spread with test patients and with training images, from how the folds differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from cxrjax.errors import CxrError


@dataclass(frozen=True)
class OverFolds:
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


def over_folds(each: Sequence[float], *, test_to_train: float) -> OverFolds:
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
    return OverFolds(float(values.mean()), spread * math.sqrt(1 / folds + test_to_train), folds - 1)
