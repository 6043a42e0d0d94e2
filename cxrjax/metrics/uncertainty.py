"""What stochastic passes (Monte Carlo dropout; Gal & Ghahramani, ICML 2016) say of how sure a network is."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.special import entr

from cxrjax.errors import CxrError


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """T passes over N images and K findings in short.

    Attributes:
      passes: T.
      mean: f64[N, K], the probability: the mean of the passes.
      std: f64[N, K], standard deviation of the passes (divided by T, not T - 1); 0 to 0.5.
      entropy: f64[N, K] in nats, of the mean: all that is unsure. [N, 1] over exclusive classes.
      mutual_information: as `entropy`, the part of it about which the passes disagree: entropy of the mean less mean
        of the entropies; 0 to `entropy`. The rest is noise in the images or labels, on which the passes agree.
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

    def flagged(self, threshold: float = 0.1) -> Bool[np.ndarray, " N"]:
        """Which images are too uncertain to be trusted: above the threshold."""
        return self.per_image > threshold


def uncertainty_threshold(validation: Float64[np.ndarray, " N"], share: float = 0.1) -> float:
    """The least threshold that flags at most this share of validation images, by the uncertainty of each.

    Raises:
      CxrError: there are no images.
    """
    if not len(validation):
        raise CxrError("uncertainty: no validation images to choose a threshold on")
    return float(np.quantile(validation, 1 - share, method="inverted_cdf"))


def summarize_passes(passes: Iterable[Float[np.ndarray, "N K"]], *, exclusive: bool = False) -> Uncertainty:
    """Sum up stochastic passes; only running sums are held, whatever T is.

    Args:
      passes: probabilities 0 to 1 of the same images, one pass after the other: an array [T, N, K] or any iterable.
      exclusive: whether the K probabilities of an image are of exclusive classes and sum to 1. Otherwise each is of a
        finding that is there or not.

    Raises:
      CxrError: there are no passes, they differ in shape, or a value is not a probability.
    """
    count, mean, squares, inside = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for one in passes:
        p = np.asarray(one, np.float64)
        if p.ndim != 2 or (count and p.shape != mean.shape):
            shape = f"the first has {mean.shape}" if count else "give images x findings"
            raise CxrError(f"uncertainty: pass {count + 1} has shape {p.shape}; {shape}")
        if not ((p >= 0) & (p <= 1)).all():
            row, k = np.argwhere(~((p >= 0) & (p <= 1)))[0]
            raise CxrError(
                f"uncertainty: pass {count + 1}, image {row + 1}, finding {k + 1}: {p[row, k]} is no probability"
            )
        if not count:
            mean, squares, inside = np.zeros_like(p), np.zeros_like(p), np.zeros_like(_entropy(p, exclusive))
        count += 1
        step = p - mean  # Welford's update: sums of squares would cancel
        mean = mean + step / count
        squares = squares + step * (p - mean)
        inside = inside + _entropy(p, exclusive)
    if not count:
        raise CxrError("uncertainty: no passes")
    mean = np.clip(mean, 0, 1)
    entropy = _entropy(mean, exclusive)
    return Uncertainty(count, mean, np.sqrt(squares / count), entropy, np.clip(entropy - inside / count, 0, entropy))


def _entropy(p: Float64[np.ndarray, "N K"], exclusive: bool) -> Float64[np.ndarray, "N k"]:
    return entr(p).sum(axis=1, keepdims=True) if exclusive else entr(p) + entr(1 - p)
