"""Many tests at once: p-values that hold for all of them together."""

import numpy as np
from jaxtyping import Float64

from cxrjax.errors import CxrError


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
