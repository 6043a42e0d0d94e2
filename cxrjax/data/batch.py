"""What a step takes; apart from the pipeline, so that a step needs none of its libraries."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8


class Batch(NamedTuple):
    """What a training or evaluation step takes.

    Attributes:
      image: grey bytes, 0 black.
      label: 0 or 1; 0 where unknown.
      label_mask: whether the label counts in losses and scores; False in padding.
      example_mask: False in padding.
      record: row of the `Records` table; -1 in padding.
    """

    image: UInt8[np.ndarray, "B H W 1"]
    label: Float32[np.ndarray, "B K"]
    label_mask: Bool[np.ndarray, "B K"]
    example_mask: Bool[np.ndarray, " B"]
    record: Int32[np.ndarray, " B"]
