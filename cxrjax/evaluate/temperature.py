"""Temperature scaling: one number per finding that makes its probabilities honest and its ranking stay."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import root_scalar
from scipy.special import expit

from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import undefined
from cxrjax.evaluate.predictions import Predictions

HOTTEST = 100.0
"""The largest temperature; the smallest is 1 / HOTTEST."""


@dataclass(frozen=True)
class Temperatures:
    """What each finding's logits are divided by.

    Attributes:
      findings: K names.
      values: 1 / HOTTEST to HOTTEST; above 1 where the network was too sure; 1 where the labels define none.
      reasons: K words, why a value is not a fitted one, else empty.
    """

    findings: tuple[str, ...]
    values: tuple[float, ...]
    reasons: tuple[str, ...]

    def apply(self, predictions: Predictions) -> Predictions:
        """The table with its logits divided by the temperatures of its findings.

        Raises:
          CxrError: a finding of the table has none.
        """
        missing = [finding for finding in predictions.findings if finding not in self.findings]
        if missing:
            raise CxrError(f"no temperature for {', '.join(missing)}; fitted were {', '.join(self.findings)}")
        values = dict(zip(self.findings, self.values, strict=True))
        divisors = np.array([values[finding] for finding in predictions.findings])
        return replace(predictions, logit=np.clip(predictions.logit / divisors, -1e300, 1e300))


def fit(validation: Predictions) -> Temperatures:
    """Fit each finding's temperature on validation (Guo et al., ICML 2017, one finding at a time).

    It minimises the mean binary cross-entropy of sigmoid(logit / T), which is convex in 1 / T. Never fit on the images
    that are scored: calibration would look better than it is.

    Args:
      validation: labelled predictions of images that are neither trained nor tested on.
    """
    p, values, reasons = validation, [], []
    for k in range(len(p.findings)):
        known = p.known[:, k]
        reasons.append(undefined(p.label[:, k], known))
        sharpness = 1.0 if reasons[-1] else _sharpness(p.logit[known, k], p.label[known, k] > 0)
        values.append(1 / sharpness)
        if not reasons[-1] and sharpness in (1 / HOTTEST, HOTTEST):
            why = "the logits say nothing or the opposite" if sharpness < 1 else "the logits separate the labels"
            reasons[-1] = f"at the limit of {values[-1]:g}: {why}"
    return Temperatures(p.findings, tuple(values), tuple(reasons))


def _sharpness(logit: Float64[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> float:
    """1 / T where the slope of the loss is 0; the limit towards which it falls if there is no such place."""
    unit = max(float(np.abs(logit).max()), 1.0)  # infinite logits stand as 1e300: sums of them must not overflow

    def slope(sharpness: float) -> float:
        return float(np.mean((expit(sharpness * logit) - label) * (logit / unit)))

    low, high = 1 / HOTTEST, HOTTEST
    if slope(low) >= 0:
        return low
    return high if slope(high) <= 0 else root_scalar(slope, bracket=(low, high), xtol=1e-12, rtol=1e-12).root
