"""EfficientNet: inverted bottlenecks with squeeze-and-excitation, widened and deepened together.

Tan and Le 2019, arXiv:1905.11946. Module names are torchvision's, so that its weights fit by name.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, positive, share
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.heads import Classifier, drop
from cxrjax.models.input_spec import GREY, IMAGENET, InputSpec
from cxrjax.models.layers import ConvNorm, LayerFactory, Maps, maybe_remat

# Per stage: expansion, kernel, stride, channels, blocks (table 1 of the paper, where the stem is stage 1).
B0 = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)

HEAD_DRAWS = 2  # the head folds 0 and 1 into the same key


class EfficientNet(Backbone):
    """EfficientNet as torchvision defines it; the defaults are EfficientNetB0 without dropout.

    Args:
      classes: number of findings.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      width: what all numbers of channels are multiplied by, and rounded to multiples of 8.
      depth: what the stages' numbers of blocks are multiplied by, and rounded up.
      stem_channels: outputs of the first convolution, of stride 2.
      blocks: per stage (expansion, kernel, stride, channels, blocks), kernels odd; the first one strides.
      last: channels of the last convolution, in units of the last stage's.
      stochastic_depth: share of images for which the last block would leave out its residual; the share grows linearly
        from 0 at the first block (Huang et al. 2016, arXiv:1603.09382).
      pooling: of the head: "average", "max", "average+max" or "log-sum-exp".
      hidden: units of a hidden layer in the head; 0 for none.
      dropout: in the head.
    """

    published: ClassVar = (("classifier.output", "classifier.1"), ("stages", "features"))
    stem: ClassVar = ("stages.0.0", "stages.0.1")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
        width: float = 1.0,
        depth: float = 1.0,
        stem_channels: int = 32,
        blocks: Sequence[Sequence[int]] = B0,
        last: int = 4,
        stochastic_depth: float = 0.2,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        if width <= 0 or depth <= 0:
            raise CxrError(f"width and depth of an EfficientNet must be above 0, not {width!r} and {depth!r}")
        self.stochastic_depth = share("stochastic_depth", stochastic_depth)
        make = LayerFactory(dtype, seed, fan="out")
        rows = [_row(row) for row in _sequence(blocks)]
        channels = _divisible(positive("stem_channels", stem_channels) * width)
        stem = ConvNormSiLU(make, inputs.channels, channels, 3, stride=2)
        self.stages: nnx.List[Any] = nnx.List([stem])  # by their numbers; the stem's is 0
        for expansion, kernel, stride, outputs, count in rows:
            stage = nnx.List()
            for _ in range(math.ceil(count * depth)):
                stage.append(MBConv(make, channels, _divisible(outputs * width), expansion, kernel, stride))
                channels, stride = _divisible(outputs * width), 1
            self.stages.append(stage)
        self.channels = positive("last", last) * channels
        self.stages.append(ConvNormSiLU(make, channels, self.channels, 1))
        self.classifier = Classifier(make, self.channels, classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Maps after the stem and each stage: "stem", "stage1", ..., "final".

        Before each stage whose first block expands comes what that makes, at the size of the stage before:
        "stage2_expansion", ... (Keras' `block2a_expand_activation`).
        """
        self.check(images)
        stem, *stages, last = self.stages
        active = maybe_remat(ConvNormSiLU.active, self.remat)
        maps = active(stem, images, train)
        named, total, done = OrderedDict(stem=maps), sum(map(len, stages)), 0
        in_turn = maybe_remat(_in_turn, self.remat, "block", static=(2, 4))
        for stage, blocks in enumerate(stages, start=1):
            survivals = []
            for number in range(done, done + len(blocks)):
                each = jnp.ones((len(maps), 1, 1, 1), maps.dtype)
                rate = self.stochastic_depth * number / total
                survivals.append(None if key is None else drop(each, rate, key, HEAD_DRAWS + number))
            expansion, maps = in_turn(blocks, maps, train, survivals, self.remat)
            if blocks[0].expands:
                named[f"stage{stage}_expansion"] = expansion  # costs nothing where nobody reads it
            named[f"stage{stage}"] = maps
            done += len(blocks)
        named["final"] = active(last, maps, train)
        return named


def _in_turn(blocks: nnx.List, maps: Maps, train: bool, survivals: list[Maps | None], remat: str) -> tuple[Maps, Maps]:
    """What the first of a stage's blocks expands, and what all of them make."""
    block_of = maybe_remat(MBConv.__call__, remat)
    first, *others = zip(blocks, survivals, strict=True)
    expansion, maps = block_of(first[0], maps, train, first[1])
    for block, survival in others:
        _, maps = block_of(block, maps, train, survival)
    return expansion, maps


class ConvNormSiLU(ConvNorm):
    """A convolution and its norm, whose activation is SiLU."""

    @staticmethod
    def activation(maps: Maps) -> Maps:
        """SiLU."""
        return nnx.silu(maps)


class SqueezeExcitation(nnx.Module):
    """Each channel times a factor of 0..1, which two small layers make of all channels' means (arXiv:1709.01507)."""

    def __init__(self, make: LayerFactory, channels: int, squeezed: int):
        self.fc1 = make.conv(channels, squeezed, 1, bias=True)
        self.fc2 = make.conv(squeezed, channels, 1, bias=True)

    def __call__(self, maps: Maps) -> Maps:
        """The maps, rescaled image by image."""
        means = maps.mean((1, 2), keepdims=True)
        return maps * nnx.sigmoid(self.fc2(nnx.silu(self.fc1(means))))


class MBConv(nnx.Module):
    """Expansion (1x1), depthwise convolution, squeeze-and-excitation, projection (1x1); added to the input if it fits.

    Args:
      make: maker of the network's layers.
      inputs: channels of the input.
      outputs: channels of the result.
      expansion: channels in between, in units of `inputs`; there is no first convolution where that changes nothing.
      kernel: size of the depthwise convolution, odd.
      stride: its stride.
    """

    def __init__(self, make: LayerFactory, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        wide = _divisible(inputs * expansion)
        self.expands = wide != inputs
        self.adds = stride == 1 and inputs == outputs
        self.block: nnx.List[Any] = nnx.List([ConvNormSiLU(make, inputs, wide, 1)] if self.expands else [])
        self.block.append(ConvNormSiLU(make, wide, wide, kernel, stride=stride, groups=wide))
        self.block.append(SqueezeExcitation(make, wide, max(1, inputs // 4)))
        self.block.append(ConvNormSiLU(make, wide, outputs, 1))

    def __call__(self, maps: Maps, train: bool, survival: Float[Array, "B 1 1 1"] | None = None) -> tuple[Maps, Maps]:
        """The expanded maps, and the block's; `survival` is what each image's part of the sum is multiplied by."""
        *expand, depthwise, excite, project = self.block
        wide = expand[0].active(maps, train) if expand else maps
        result = project(excite(depthwise.active(wide, train)), train)
        if not self.adds:
            return wide, result
        return wide, maps + (result if survival is None else result * survival)


def _divisible(channels: float) -> int:
    """The nearest multiple of 8, or the next one where that is more than a tenth too small."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _sequence(blocks: Any) -> Sequence:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or not blocks:
        raise CxrError(f"blocks must be a sequence of (expansion, kernel, stride, channels, blocks), not {blocks!r}")
    return blocks


def _row(row: Any) -> Sequence[int]:
    if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 5:
        raise CxrError(f"a stage of an EfficientNet is (expansion, kernel, stride, channels, blocks), not {row!r}")
    for what, value in zip(("expansion", "kernel", "stride", "channels", "blocks"), row, strict=True):
        positive(f"{what} of a stage", value)
    if row[1] % 2 == 0:
        raise CxrError(f"the kernels of an EfficientNet must be odd, not {row[1]}")
    return row


_SMALL = {
    "stem_channels": 8,
    "blocks": ((1, 3, 1, 8, 1), (4, 3, 2, 16, 2), (4, 5, 2, 24, 2)),
    "pooling": "average+max",
}


def _scaled(name: str, width: float, depth: float, dropout: float) -> Architecture:
    settings = {"width": width, "depth": depth, "dropout": dropout}
    return Architecture(EfficientNet, IMAGENET, settings, f"torchvision {name}")


ARCHITECTURES = {
    "efficientnet_b0": _scaled("efficientnet_b0", 1.0, 1.0, 0.2),
    "efficientnet_b1": _scaled("efficientnet_b1", 1.0, 1.1, 0.2),
    "efficientnet_b2": _scaled("efficientnet_b2", 1.1, 1.2, 0.3),
    "efficientnet_b3": _scaled("efficientnet_b3", 1.2, 1.4, 0.3),
    "efficientnet_b4": _scaled("efficientnet_b4", 1.4, 1.8, 0.4),
    "efficientnet_small": Architecture(EfficientNet, GREY, _SMALL, "ours, for CPUs"),
}
