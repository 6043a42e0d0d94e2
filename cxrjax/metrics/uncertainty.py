"""Uncertainty from stochastic passes (Monte Carlo dropout; Gal & Ghahramani, ICML 2016)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from scipy.special import entr

from cxrjax.errors import CxrError


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Summary of T passes over N images and K findings.

    Attributes:
      passes: T.
      mean: f64[N, K], the mean probability over the passes.
      std: f64[N, K], standard deviation over the passes (divided by T, not T - 1); 0 to 0.5.
      entropy: f64[N, K] in nats, of the mean: the total uncertainty. [N, 1] for exclusive classes.
      mutual_information: as `entropy`, its epistemic part, on which the passes disagree: entropy of the mean minus mean
        of the entropies; 0 to `entropy`. The rest is aleatoric: noise in the images or labels.
    """

    passes: int
    mean: Float64[np.ndarray, "N K"]
    std: Float64[np.ndarray, "N K"]
    entropy: Float64[np.ndarray, "N k"]
    mutual_information: Float64[np.ndarray, "N k"]

    @property
    def per_image(self) -> Float64[np.ndarray, " N"]:
        """The uncertainty of each image: the mean over findings of their standard deviations."""
        return self.std.mean(axis=1)


def uncertainty_threshold(validation: Float64[np.ndarray, " N"], share: float = 0.1) -> float:
    """Return the smallest threshold that at most this share of the validation images exceeds.

    Raises:
      CxrError: there are no images.
    """
    if not len(validation):
        raise CxrError("uncertainty: there are no validation images to choose a threshold on")
    return float(np.quantile(validation, 1 - share, method="inverted_cdf"))


def summarize_passes(passes: Iterable[Float[np.ndarray, "N K"]], *, exclusive: bool = False) -> Uncertainty:
    """Summarize stochastic passes with running sums, in memory independent of T.

    Args:
      passes: probabilities 0 to 1 of the same images, pass by pass: an array [T, N, K] or any iterable.
      exclusive: whether the K probabilities of an image are of exclusive classes and sum to 1, or are independent.

    Raises:
      CxrError: there are no passes, they differ in shape, or a value is not a probability.
    """
    count, mean, squares, entropies = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for probability in passes:
        p = np.asarray(probability, np.float64)
        if p.ndim != 2 or (count and p.shape != mean.shape):
            expected = f"the first has {mean.shape}" if count else "give images x findings"
            raise CxrError(f"uncertainty: pass {count + 1} has shape {p.shape}; {expected}")
        if not ((p >= 0) & (p <= 1)).all():
            row, k = np.argwhere(~((p >= 0) & (p <= 1)))[0]
            where = f"pass {count + 1}, image {row + 1}, finding {k + 1}"
            raise CxrError(f"uncertainty: {where}: {p[row, k]} is not a probability")
        if not count:
            mean, squares, entropies = np.zeros_like(p), np.zeros_like(p), np.zeros_like(_entropy(p, exclusive))
        count += 1
        step = p - mean  # Welford's update: plain sums of squares would cancel
        mean = mean + step / count
        squares = squares + step * (p - mean)
        entropies = entropies + _entropy(p, exclusive)
    if not count:
        raise CxrError("uncertainty: there are no passes")
    mean = np.clip(mean, 0, 1)
    entropy = _entropy(mean, exclusive)
    mutual_information = np.clip(entropy - entropies / count, 0, entropy)
    return Uncertainty(count, mean, np.sqrt(squares / count), entropy, mutual_information)


def _entropy(p: Float64[np.ndarray, "N K"], exclusive: bool) -> Float64[np.ndarray, "N k"]:
    return entr(p).sum(axis=1, keepdims=True) if exclusive else entr(p) + entr(1 - p)
