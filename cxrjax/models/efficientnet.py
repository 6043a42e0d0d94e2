"""EfficientNet (Tan and Le 2019, arXiv:1905.11946): inverted bottlenecks with squeeze-and-excitation, scaled jointly.

Module names are torchvision's, so that its weights fit by name.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_fraction, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs, apply_dropout
from cxrjax.models.input_spec import GREY, IMAGENET
from cxrjax.models.layers import ConvNorm, LayerFactory, Maps, maybe_remat

# Per stage: expansion ratio, kernel size, stride, channels, blocks (table 1 of the paper, where the stem is stage 1).
B0_CONFIG = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)

NUM_HEAD_DROPOUTS = 2  # the head folds 0 and 1 into the same key


class EfficientNet(Backbone):
    """EfficientNet as in torchvision; the defaults are EfficientNetB0 without dropout.

    Args (the common ones: see `Backbone`):
      width_mult: multiplies all numbers of channels, which are rounded to multiples of 8.
      depth_mult: multiplies the stages' numbers of blocks, which are rounded up.
      stem_channels: output channels of the first convolution, of stride 2.
      block_config: per stage (expansion ratio, kernel size, stride, channels, blocks), kernel sizes odd; the first
        block has the stride.
      last_channels_mult: channels of the last convolution, in units of the last stage's.
      stochastic_depth: probability with which the last block drops its residual for an image; it grows linearly from 0
        at the first block (Huang et al. 2016, arXiv:1603.09382).
    """

    published_prefixes: ClassVar = (("classifier.output", "classifier.1"), ("stages", "features"))
    stem: ClassVar = ("stages.0.0", "stages.0.1")

    def __init__(
        self,
        common: CommonArgs,
        *,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        stem_channels: int = 32,
        block_config: Sequence[Sequence[int]] = B0_CONFIG,
        last_channels_mult: int = 4,
        stochastic_depth: float = 0.2,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(common)
        if width_mult <= 0 or depth_mult <= 0:
            raise CxrError(f"width_mult and depth_mult must be above 0, not {width_mult!r} and {depth_mult!r}")
        self.stochastic_depth = check_fraction("stochastic_depth", stochastic_depth)
        factory = LayerFactory(common.dtype, common.seed, fan_mode="out")
        _check_block_config(block_config)
        channels = _make_divisible(check_positive("stem_channels", stem_channels) * width_mult)
        stem = ConvNormSiLU(factory, self.input_spec.channels, channels, 3, stride=2)
        self.stages: nnx.List[Any] = nnx.List([stem])  # the stem is stage 0
        for expand_ratio, kernel_size, stride, base_channels, num_blocks in block_config:
            out_channels, stage = _make_divisible(base_channels * width_mult), nnx.List()
            for _ in range(math.ceil(num_blocks * depth_mult)):
                stage.append(MBConv(factory, channels, out_channels, expand_ratio, kernel_size, stride))
                channels, stride = out_channels, 1
            self.stages.append(stage)
        self.channels = check_positive("last_channels_mult", last_channels_mult) * channels
        self.stages.append(ConvNormSiLU(factory, channels, self.channels, 1))
        self.classifier = Classifier(
            factory, self.channels, self.classes, pooling=pooling, hidden=hidden, dropout=dropout
        )

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the maps after the stem and each stage: "stem", "stage1", ..., "final".

        Before each stage whose first block expands come that block's expanded maps, at the size of the stage before:
        "stage2_expansion", ... (Keras' `block2a_expand_activation`).
        """
        self.check_images(images)
        stem, *stages, last = self.stages
        conv_of = maybe_remat(ConvNormSiLU.activated, self.remat)
        maps = conv_of(stem, images, train)
        named, num_blocks, block = OrderedDict(stem=maps), sum(map(len, stages)), 0
        stage_of = maybe_remat(_apply_stage, self.remat, "block", static=(2, 4))
        for number, stage in enumerate(stages, start=1):
            survivals = []
            for index in range(block, block + len(stage)):
                ones = jnp.ones((len(maps), 1, 1, 1), maps.dtype)
                rate = self.stochastic_depth * index / num_blocks
                survivals.append(None if key is None else apply_dropout(ones, rate, key, NUM_HEAD_DROPOUTS + index))
            expanded, maps = stage_of(stage, maps, train, survivals, self.remat)
            if stage[0].has_expansion:
                named[f"stage{number}_expansion"] = expanded  # XLA drops it where it is not used
            named[f"stage{number}"] = maps
            block += len(stage)
        named["final"] = conv_of(last, maps, train)
        return named


def _apply_stage(
    blocks: nnx.List, maps: Maps, train: bool, survivals: list[Maps | None], remat: str
) -> tuple[Maps, Maps]:
    """Return the first block's expanded maps, and the maps after all blocks."""
    block_of = maybe_remat(MBConv.__call__, remat)
    (first, first_survival), *others = zip(blocks, survivals, strict=True)
    expanded, maps = block_of(first, maps, train, first_survival)
    for block, survival in others:
        _, maps = block_of(block, maps, train, survival)
    return expanded, maps


class ConvNormSiLU(ConvNorm):
    """A convolution and its norm, with SiLU as the activation."""

    @staticmethod
    def activation(maps: Maps) -> Maps:
        """Apply SiLU."""
        return nnx.silu(maps)


class SqueezeExcitation(nnx.Module):
    """Scale each channel by a factor in 0..1 computed from all channels' means (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, factory: LayerFactory, channels: int, squeezed_channels: int):
        self.fc1 = factory.conv(channels, squeezed_channels, 1, bias=True)
        self.fc2 = factory.conv(squeezed_channels, channels, 1, bias=True)

    def __call__(self, maps: Maps) -> Maps:
        """Return the maps, scaled image by image."""
        means = maps.mean((1, 2), keepdims=True)
        return maps * nnx.sigmoid(self.fc2(nnx.silu(self.fc1(means))))


class MBConv(nnx.Module):
    """Expansion (1x1), depthwise convolution, squeeze-and-excitation, projection (1x1); a residual if shapes fit.

    The expansion to `expand_ratio * in_channels` is left out if it changes nothing. Kernel size (odd) and stride are
    those of the depthwise convolution.
    """

    def __init__(
        self,
        factory: LayerFactory,
        in_channels: int,
        out_channels: int,
        expand_ratio: int,
        kernel_size: int,
        stride: int,
    ):
        expanded = _make_divisible(in_channels * expand_ratio)
        self.has_expansion = expanded != in_channels
        self.has_residual = stride == 1 and in_channels == out_channels
        expansion = [ConvNormSiLU(factory, in_channels, expanded, 1)] if self.has_expansion else []
        self.block: nnx.List[Any] = nnx.List(expansion)
        self.block.append(ConvNormSiLU(factory, expanded, expanded, kernel_size, stride=stride, groups=expanded))
        self.block.append(SqueezeExcitation(factory, expanded, max(1, in_channels // 4)))
        self.block.append(ConvNormSiLU(factory, expanded, out_channels, 1))

    def __call__(self, maps: Maps, train: bool, survival: Float[Array, "B 1 1 1"] | None = None) -> tuple[Maps, Maps]:
        """Return the expanded maps and the block's; `survival` scales each image's residual (stochastic depth)."""
        *expand, depthwise, squeeze_excite, project = self.block
        expanded = expand[0].activated(maps, train) if expand else maps
        result = project(squeeze_excite(depthwise.activated(expanded, train)), train)
        if not self.has_residual:
            return expanded, result
        return expanded, maps + (result if survival is None else result * survival)


def _make_divisible(channels: float) -> int:
    """Return the nearest multiple of 8, or the next one where that is more than 10 % too small."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _check_block_config(block_config: Any) -> None:
    fields = ("expansion", "kernel", "stride", "channels", "blocks")
    if isinstance(block_config, str) or not isinstance(block_config, Sequence) or not block_config:
        raise CxrError(f"block_config must be a sequence of ({', '.join(fields)}), not {block_config!r}")
    for stage in block_config:
        if isinstance(stage, str) or not isinstance(stage, Sequence) or len(stage) != 5:
            raise CxrError(f"a stage of an EfficientNet is ({', '.join(fields)}), not {stage!r}")
        for field, value in zip(fields, stage, strict=True):
            check_positive(f"{field} of a stage", value)
        if stage[1] % 2 == 0:
            raise CxrError(f"the kernels of an EfficientNet must be odd, not {stage[1]}")


_SMALL = {
    "stem_channels": 8,
    "block_config": ((1, 3, 1, 8, 1), (4, 3, 2, 16, 2), (4, 5, 2, 24, 2)),
    "pooling": "average+max",
}


def _torchvision(name: str, width_mult: float, depth_mult: float, dropout: float) -> Architecture:
    options = {"width_mult": width_mult, "depth_mult": depth_mult, "dropout": dropout}
    return Architecture(EfficientNet, IMAGENET, options, f"torchvision {name}")


ARCHITECTURES = {
    "efficientnet_b0": _torchvision("efficientnet_b0", 1.0, 1.0, 0.2),
    "efficientnet_b1": _torchvision("efficientnet_b1", 1.0, 1.1, 0.2),
    "efficientnet_b2": _torchvision("efficientnet_b2", 1.1, 1.2, 0.3),
    "efficientnet_b3": _torchvision("efficientnet_b3", 1.2, 1.4, 0.3),
    "efficientnet_b4": _torchvision("efficientnet_b4", 1.4, 1.8, 0.4),
    "efficientnet_small": Architecture(EfficientNet, GREY, _SMALL, "ours, for CPUs"),
}
