"""Records, splits, images and the pipeline that makes batches of them.

`Batch` is defined here, apart from `records` and `pipeline`, so that a step does not need their libraries.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8


class Batch(NamedTuple):
    """Input of a training or evaluation step.

    Attributes:
      image: grey levels, 0 is black.
      label: target values from 0 to 1; 0 where masked.
      label_mask: whether a label counts in losses and scores; False in padding.
      example_mask: False in padding.
      record: row of the `Records` table; -1 in padding.
    """

    image: UInt8[np.ndarray, "B H W 1"]
    label: Float32[np.ndarray, "B K"]
    label_mask: Bool[np.ndarray, "B K"]
    example_mask: Bool[np.ndarray, " B"]
    record: Int32[np.ndarray, " B"]
