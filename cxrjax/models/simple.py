"""The simple CNN that the attention-fusion paper compares with: 129,870 parameters at 14 findings."""

from collections import OrderedDict
from typing import ClassVar

import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.heads import Classifier
from cxrjax.models.inputs import UNIT, InputSpec
from cxrjax.models.layers import Maker, Maps, recomputed
from cxrjax.models.pooling import max_pool

WIDTHS = (32, 64, 128)


class SimpleCNN(Backbone):
    """Three times: 3x3 convolution without padding, 2x2 max pooling, ReLU; then mean, 256 hidden units, logits.

    The paper names pooling before ReLU; the order does not change the result.

    Args:
      classes: number of findings.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      pooling: of the head: "average", "max", "average+max" or "log-sum-exp".
      hidden: units of the head's hidden layer; 0 for none.
      dropout: in the head.
    """

    stem: ClassVar = ("stage1.conv", "")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
        pooling: str = "average",
        hidden: int = 256,
        dropout: float = 0.0,
    ):
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        make = Maker(dtype, seed)
        channels = inputs.channels
        for number, width in enumerate(WIDTHS, start=1):
            setattr(self, f"stage{number}", Stage(make, channels, width))
            channels = width
        self.classifier = Classifier(make, channels, classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Maps after each stage: "stage1", "stage2", "final"."""
        self.check(images)
        named, maps = OrderedDict(), images
        for number in range(1, len(WIDTHS) + 1):
            maps = recomputed(Stage.__call__, self.remat)(getattr(self, f"stage{number}"), maps, train)
            named[f"stage{number}" if number < len(WIDTHS) else "final"] = maps
        return named


class Stage(nnx.Module):
    """3x3 convolution without padding, 2x2 max pooling, ReLU."""

    def __init__(self, make: Maker, channels: int, width: int):
        self.conv = make.conv(channels, width, 3, bias=True)

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """The maps after this stage; `train` changes nothing, there is no norm."""
        return nnx.relu(max_pool(self.conv(maps), 2, 2))


ARCHITECTURES = {
    "simple_cnn": Architecture(SimpleCNN, UNIT, {}, "the simple CNN of the attention-fusion paper"),
}
