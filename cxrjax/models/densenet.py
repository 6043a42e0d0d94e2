"""DenseNet: every layer of a block sees the maps of all layers before it.

Huang et al. 2017, arXiv:1608.06993. Module names are torchvision's, so that its weights fit by name.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.errors import CxrError, one_of, positive
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.heads import Classifier
from cxrjax.models.input_spec import GREY, IMAGENET, InputSpec
from cxrjax.models.layers import BatchNorm, LayerFactory, Maps, Moments, maybe_remat, sum_gradients_early
from cxrjax.models.pooling import STEM_POOLS, average_pool


class DenseNet(Backbone):
    """DenseNet as torchvision defines it; the defaults are DenseNet121.

    The maps of a block stay a list, one entry per layer: with `remat="layer"` each layer concatenates and normalises
    them again in the backward pass, so the memory for maps grows linearly with depth, not quadratically
    (Pleiss et al. 2017, arXiv:1707.06990). The batch's mean and variance of a map are the same for all norms that see
    it: the first of them finds them.

    Args:
      classes: number of findings.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      growth: channels that each layer adds.
      blocks: layers per dense block.
      bottleneck: channels of a layer's 1x1 convolution, in units of `growth`.
      stem_channels: outputs of the first convolution.
      stem_kernel: its size, odd.
      stem_stride: its stride.
      stem_pool: max pooling after it, with stride 2: "3x3", "2x2" or "none".
      last_norm: whether the last block's maps are normalised and rectified.
      pooling: of the head: "average", "max", "average+max" or "log-sum-exp".
      hidden: units of a hidden layer in the head; 0 for none.
      dropout: in the head.
    """

    published: ClassVar = (("classifier.output", "classifier"), ("", "features"))
    stem: ClassVar = ("conv0", "norm0")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
        growth: int = 32,
        blocks: Sequence[int] = (6, 12, 24, 16),
        bottleneck: int = 4,
        stem_channels: int = 64,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        stem_pool: str = "3x3",
        last_norm: bool = True,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        make = LayerFactory(dtype, seed)
        width = positive("bottleneck", bottleneck) * positive("growth", growth)
        if isinstance(blocks, str) or not isinstance(blocks, Sequence):
            raise CxrError(f"blocks must be a sequence of layer numbers such as (6, 12, 24, 16), not {blocks!r}")
        self.blocks = len(blocks)
        self.stem_pool = one_of("stem_pool", stem_pool, STEM_POOLS)
        if self.blocks == 0 or positive("stem_kernel", stem_kernel) % 2 == 0:
            raise CxrError(f"a DenseNet needs at least one block and an odd stem_kernel, not {blocks!r}, {stem_kernel}")
        stride = positive("stem_stride", stem_stride)
        channels = positive("stem_channels", stem_channels)
        self.conv0 = make.conv(inputs.channels, channels, stem_kernel, stride=stride, padding=stem_kernel // 2)
        self.norm0 = make.norm(channels)
        for number, layers in enumerate(blocks, start=1):
            block = DenseBlock(make, channels, positive("layers of a block", layers), growth, width, remat)
            setattr(self, f"denseblock{number}", block)
            channels += layers * growth
            if number < self.blocks:
                setattr(self, f"transition{number}", Transition(make, channels, channels // 2))
                channels //= 2
        self.channels = channels
        self.norm5 = make.norm(channels) if last_norm else nnx.data(None)
        self.classifier = Classifier(make, channels, classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Maps after the stem, of each block ("block1", ... before any norm), and "final" (after the last norm)."""
        self.check(images)
        maps = maybe_remat(DenseNet._stem, self.remat)(self, images, train)
        named = OrderedDict(stem=maps)
        for number in range(1, self.blocks + 1):
            stage = maybe_remat(DenseNet._stage, self.remat, "block", static=(2, 3))
            named[f"block{number}"], maps = stage(self, maps, train, number)
        named["final"] = maps
        return named

    def _stem(self, images: Maps, train: bool) -> Maps:
        return STEM_POOLS[self.stem_pool](nnx.relu(self.norm0(self.conv0(images), train=train)))

    def _stage(self, maps: Maps, train: bool, number: int) -> tuple[Maps, Maps]:
        """A block's maps, which cost nothing where nobody reads them, and what follows makes of them."""
        grown, moments = getattr(self, f"denseblock{number}")([maps], train)
        whole = jnp.concatenate(grown, axis=-1)
        if number < self.blocks:
            transition = getattr(self, f"transition{number}")
            moments = _with_those_of_last(moments, grown, transition.norm, train)
            return whole, maybe_remat(Transition.__call__, self.remat, static=(3,))(transition, grown, moments, train)
        if self.norm5 is None:
            return whole, whole
        moments = _with_those_of_last(moments, grown, self.norm5, train)
        return whole, maybe_remat(DenseNet._last_norm, self.remat, static=(3,))(self, grown, moments, train)

    def _last_norm(self, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
        assert self.norm5 is not None
        return _norm_relu(self.norm5, maps, moments, train)


class DenseBlock(nnx.Module):
    """Dense layers in a row: each adds its maps to the list."""

    def __init__(self, make: LayerFactory, channels: int, layers: int, growth: int, width: int, remat: str):
        self.layers = layers
        self.remat = remat
        for number in range(1, layers + 1):
            setattr(self, f"denselayer{number}", DenseLayer(make, channels, growth, width))
            channels += growth

    def __call__(self, maps: list[Maps], train: bool) -> tuple[list[Maps], Moments | None]:
        """The list of maps, with those of each layer in turn, and the moments of all but the last entry."""
        moments = None
        for number in range(1, self.layers + 1):
            layer = getattr(self, f"denselayer{number}")
            maps = sum_gradients_early(maps) if self.remat != "none" else maps
            moments = _with_those_of_last(moments, maps, layer.norm1, train)
            own = maybe_remat(DenseLayer.__call__, self.remat, static=(3,))(layer, maps, moments, train)
            maps = _fewer([*maps, own])
        return maps, moments


class DenseLayer(nnx.Module):
    """Norm, ReLU and 1x1 convolution of all earlier maps, then norm, ReLU and 3x3 convolution."""

    def __init__(self, make: LayerFactory, channels: int, growth: int, width: int):
        self.norm1 = make.norm(channels)
        self.conv1 = make.conv(channels, width, 1)
        self.norm2 = make.norm(width)
        self.conv2 = make.conv(width, growth, 3, padding=1)

    def __call__(self, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
        """This layer's own maps, from all earlier ones, whose moments are needed in training."""
        narrow = self.conv1(_norm_relu(self.norm1, maps, moments, train))
        return self.conv2(nnx.relu(self.norm2(narrow, train=train)))


class Transition(nnx.Module):
    """Norm, ReLU, 1x1 convolution and 2x2 mean between two blocks.

    The mean comes before the convolution here: both are linear and commute, and a quarter of the work is left.
    """

    def __init__(self, make: LayerFactory, channels: int, outputs: int):
        self.norm = make.norm(channels)
        self.conv = make.conv(channels, outputs, 1)

    def __call__(self, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
        """Maps of half the height and width, from all of a block's, whose moments are needed in training."""
        return self.conv(average_pool(_norm_relu(self.norm, maps, moments, train), 2, 2))


def _norm_relu(norm: BatchNorm, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
    return nnx.relu(norm(jnp.concatenate(maps, axis=-1), train=train, moments=moments))


def _with_those_of_last(moments: Moments | None, maps: list[Maps], norm: BatchNorm, train: bool) -> Moments | None:
    """In training, the moments of all maps: those given, of all but the last, and what `norm` finds for the last.

    Never inside what is recomputed: gradients would be added up in another order there.
    """
    if not train:
        return None
    last = norm.moments(maps[-1], first=sum(each.shape[-1] for each in maps[:-1]))
    if moments is None:
        return last
    return jnp.concatenate([moments[0], last[0]]), jnp.concatenate([moments[1], last[1]])


_READ_AT_ONCE = 10


def _fewer(maps: list[Maps]) -> list[Maps]:
    """The same channels in ten entries or fewer: of four in a row that are as wide one is made, but not of the last.

    XLA for GPUs reads up to ten operands of a concatenation with wide loads, and more of them value by value.
    """
    widths = [each.shape[-1] for each in maps[:-1]]
    if len(maps) <= _READ_AT_ONCE:
        return maps
    for start in range(len(widths) - 3):
        if len(set(widths[start : start + 4])) == 1:
            whole = jnp.concatenate(maps[start : start + 4], axis=-1)
            return _fewer([*maps[:start], whole, *maps[start + 4 :]])
    return maps


_SMALL = {
    "growth": 8,
    "blocks": (2, 2, 2),
    "bottleneck": 2,
    "stem_channels": 16,
    "stem_kernel": 5,
    "stem_pool": "2x2",
    "pooling": "average+max",
}

ARCHITECTURES = {
    "densenet121": Architecture(DenseNet, IMAGENET, {}, "torchvision densenet121"),
    "densenet169": Architecture(DenseNet, IMAGENET, {"blocks": (6, 12, 32, 32)}, "torchvision densenet169"),
    "densenet201": Architecture(DenseNet, IMAGENET, {"blocks": (6, 12, 48, 32)}, "torchvision densenet201"),
    "densenet_small": Architecture(DenseNet, GREY, _SMALL, "ours, for CPUs"),
}
