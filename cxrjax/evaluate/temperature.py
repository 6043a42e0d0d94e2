"""Temperature scaling: one number per finding, or for all of exclusive ones, that makes probabilities honest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int
from scipy.optimize import root_scalar
from scipy.special import expit, log_expit, softmax

from cxrjax.errors import CxrError
from cxrjax.evaluate.auc import undefined
from cxrjax.evaluate.predictions import Predictions
from cxrjax.train.losses import log_odds

HOTTEST = 100.0
"""The largest temperature; the smallest is 1 / HOTTEST."""

_LEAST = -1e6  # stands for the logarithm of a probability of 0, far beyond any network's


@dataclass(frozen=True)
class Temperatures:
    """What each finding's logits are divided by; over exclusive classes, the logarithms of their probabilities.

    Attributes:
      findings: K names.
      values: 1 / HOTTEST to HOTTEST; above 1 where the network was too sure; 1 where the labels define none.
      reasons: K words, why a value is not a fitted one, else empty.
      exclusive: whether the findings are classes of which an image has exactly one; the values are then equal, and the
        probabilities of an image still add up to 1.
    """

    findings: tuple[str, ...]
    values: tuple[float, ...]
    reasons: tuple[str, ...]
    exclusive: bool = False

    def apply(self, predictions: Predictions) -> Predictions:
        """The table with its logits at the temperatures of its findings; errors are those of `scale`."""
        return replace(predictions, logit=self.scale(predictions.logit, predictions.findings))

    def scale(self, logit: Float64[np.ndarray, "N K"], findings: Sequence[str]) -> Float64[np.ndarray, "N K"]:
        """Log-odds at the temperatures of these findings.

        Raises:
          CxrError: one of them has none, or one of exclusive classes is left out.
        """
        missing = [finding for finding in findings if finding not in self.findings]
        if missing:
            raise CxrError(f"no temperature for {', '.join(missing)}; fitted were {', '.join(self.findings)}")
        values = dict(zip(self.findings, self.values, strict=True))
        divisors = np.array([values[finding] for finding in findings])
        if self.exclusive:
            if len(findings) < len(self.findings):
                raise CxrError(f"the temperature of exclusive classes is for all of them: {', '.join(self.findings)}")
            return log_odds(log_expit(logit) / divisors, "cross_entropy")
        return np.clip(logit / divisors, -1e300, 1e300)


def fit(validation: Predictions, *, exclusive: bool = False) -> Temperatures:
    """Fit each finding's temperature on validation (Guo et al., ICML 2017, one finding at a time).

    It minimises the mean binary cross-entropy of sigmoid(logit / T), or over exclusive classes the categorical one of
    softmax(log p / T); both are convex in 1 / T. Never fit on the images that are scored: calibration would look better
    than it is.

    Args:
      validation: labelled predictions of images that are neither trained nor tested on.
      exclusive: whether the findings are exclusive classes, and the logits log p / (1 - p) of their softmax.
    """
    p, values, reasons = validation, [], []
    if exclusive:
        rows = p.known.all(1)
        log_p = np.maximum(log_expit(p.logit[rows]), _LEAST)
        sharpness = _sharpness_of_classes(log_p, p.label[rows].argmax(1)) if rows.any() else 1.0
        reason = _limit(sharpness) if rows.any() else "no known label"
        count = len(p.findings)
        return Temperatures(p.findings, (1 / sharpness,) * count, (reason,) * count, exclusive=True)
    for k in range(len(p.findings)):
        known = p.known[:, k]
        reasons.append(undefined(p.label[:, k], known))
        sharpness = 1.0 if reasons[-1] else _sharpness(p.logit[known, k], p.label[known, k] > 0)
        values.append(1 / sharpness)
        reasons[-1] = reasons[-1] or _limit(sharpness)
    return Temperatures(p.findings, tuple(values), tuple(reasons))


def _limit(sharpness: float) -> str:
    """Why a temperature is at its limit; empty where it is not."""
    if sharpness not in (1 / HOTTEST, HOTTEST):
        return ""
    why = "the logits say nothing or the opposite" if sharpness < 1 else "the logits separate the labels"
    return f"at the limit of {1 / sharpness:g}: {why}"


def _sharpness(logit: Float64[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> float:
    """1 / T where the slope of the loss is 0; the limit towards which it falls if there is no such place."""
    unit = max(float(np.abs(logit).max()), 1.0)  # infinite logits stand as 1e300: sums of them must not overflow

    def slope(sharpness: float) -> float:
        return float(np.mean((expit(sharpness * logit) - label) * (logit / unit)))

    return _zero(slope)


def _sharpness_of_classes(log_p: Float64[np.ndarray, "N K"], actual: Int[np.ndarray, " N"]) -> float:
    """The same of the categorical cross-entropy of softmax(log_p / T)."""
    own = np.take_along_axis(log_p, actual[:, None], axis=1)[:, 0]

    def slope(sharpness: float) -> float:
        return float(np.mean((softmax(sharpness * log_p, axis=1) * log_p).sum(1) - own))

    return _zero(slope)


def _zero(slope: Callable[[float], float]) -> float:
    low, high = 1 / HOTTEST, HOTTEST
    if slope(low) >= 0:
        return low
    return high if slope(high) <= 0 else root_scalar(slope, bracket=(low, high), xtol=1e-12, rtol=1e-12).root
