"""DenseNet (Huang et al. 2017, arXiv:1608.06993), with torchvision's module names, so that its weights fit by name."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs
from cxrjax.models.input_spec import GREY, IMAGENET
from cxrjax.models.layers import BatchNorm, LayerFactory, Maps, Moments, maybe_remat, sum_gradients_early
from cxrjax.models.pooling import STEM_POOLS, average_pool


class DenseNet(Backbone):
    """DenseNet as in torchvision; the defaults are DenseNet121.

    The maps of a block stay a list with one entry per layer. With `remat="layer"` each layer concatenates and
    normalises them again in the backward pass, so memory for maps grows linearly with depth, not quadratically (Pleiss
    et al. 2017, arXiv:1707.06990). All norms that read a map share its batch moments; the first one computes them.

    Args (the common ones: see `Backbone`):
      growth_rate: channels that each layer adds.
      block_config: number of layers of each dense block.
      bn_size: channels of a layer's 1x1 convolution, in units of `growth_rate`.
      stem_channels: output channels of the first convolution.
      stem_kernel, stem_stride: its kernel size, odd, and its stride.
      stem_pool: max pooling after it, with stride 2: "3x3", "2x2" or "none".
      last_norm: whether norm and ReLU follow the last block.
    """

    published_prefixes: ClassVar = (("classifier.output", "classifier"), ("", "features"))
    stem: ClassVar = ("conv0", "norm0")

    def __init__(
        self,
        common: CommonArgs,
        *,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        bn_size: int = 4,
        stem_channels: int = 64,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        stem_pool: str = "3x3",
        last_norm: bool = True,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(common)
        factory = LayerFactory(common.dtype, common.seed)
        width = check_positive("bn_size", bn_size) * check_positive("growth_rate", growth_rate)
        if isinstance(block_config, str) or not isinstance(block_config, Sequence):
            raise CxrError(f"block_config must be a sequence of layer counts such as (6, 12), not {block_config!r}")
        self.num_blocks = len(block_config)
        self.stem_pool = check_choice("stem_pool", stem_pool, STEM_POOLS)
        if self.num_blocks == 0 or check_positive("stem_kernel", stem_kernel) % 2 == 0:
            raise CxrError(
                f"a DenseNet needs at least one block and an odd stem_kernel, not block_config={block_config!r} and "
                f"stem_kernel={stem_kernel}"
            )
        stride = check_positive("stem_stride", stem_stride)
        channels = check_positive("stem_channels", stem_channels)
        self.conv0 = factory.conv(
            self.input_spec.channels, channels, stem_kernel, stride=stride, padding=stem_kernel // 2
        )
        self.norm0 = factory.norm(channels)
        for number, layers in enumerate(block_config, start=1):
            block = DenseBlock(
                factory, channels, check_positive("layers of a block", layers), growth_rate, width, self.remat
            )
            setattr(self, f"denseblock{number}", block)
            channels += layers * growth_rate
            if number < self.num_blocks:
                setattr(self, f"transition{number}", Transition(factory, channels, channels // 2))
                channels //= 2
        self.channels = channels
        self.norm5 = factory.norm(channels) if last_norm else nnx.data(None)
        self.classifier = Classifier(factory, channels, self.classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the maps "stem", of each block ("block1", ... before any norm), and "final" (after the last norm)."""
        self.check_images(images)
        maps = maybe_remat(DenseNet._stem, self.remat)(self, images, train)
        named = OrderedDict(stem=maps)
        for number in range(1, self.num_blocks + 1):
            stage = maybe_remat(DenseNet._stage, self.remat, "block", static=(2, 3))
            named[f"block{number}"], maps = stage(self, maps, train, number)
        named["final"] = maps
        return named

    def _stem(self, images: Maps, train: bool) -> Maps:
        return STEM_POOLS[self.stem_pool](nnx.relu(self.norm0(self.conv0(images), train=train)))

    def _stage(self, maps: Maps, train: bool, number: int) -> tuple[Maps, Maps]:
        """Return a block's maps (XLA drops them where they are not used), and those of the transition or last norm."""
        layer_maps, moments = getattr(self, f"denseblock{number}")([maps], train)
        block_maps = jnp.concatenate(layer_maps, axis=-1)
        if number < self.num_blocks:
            transition = getattr(self, f"transition{number}")
            moments = _append_moments(moments, layer_maps, transition.norm, train)
            apply = maybe_remat(Transition.__call__, self.remat, static=(3,))
            return block_maps, apply(transition, layer_maps, moments, train)
        if self.norm5 is None:
            return block_maps, block_maps
        moments = _append_moments(moments, layer_maps, self.norm5, train)
        return block_maps, maybe_remat(DenseNet._last_norm, self.remat, static=(3,))(self, layer_maps, moments, train)

    def _last_norm(self, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
        assert self.norm5 is not None
        return _norm_relu(self.norm5, maps, moments, train)


class DenseBlock(nnx.Module):
    """Dense layers, each of which appends its maps to the list."""

    def __init__(self, factory: LayerFactory, channels: int, num_layers: int, growth_rate: int, width: int, remat: str):
        self.num_layers = num_layers
        self.remat = remat
        for number in range(1, num_layers + 1):
            setattr(self, f"denselayer{number}", DenseLayer(factory, channels, growth_rate, width))
            channels += growth_rate

    def __call__(self, maps: list[Maps], train: bool) -> tuple[list[Maps], Moments | None]:
        """Return the list of maps with those of each layer appended, and the moments of all but the last entry."""
        moments = None
        for number in range(1, self.num_layers + 1):
            layer = getattr(self, f"denselayer{number}")
            maps = sum_gradients_early(maps) if self.remat != "none" else maps
            moments = _append_moments(moments, maps, layer.norm1, train)
            new_maps = maybe_remat(DenseLayer.__call__, self.remat, static=(3,))(layer, maps, moments, train)
            maps = _merge_entries([*maps, new_maps])
        return maps, moments


class DenseLayer(nnx.Module):
    """Norm, ReLU and 1x1 convolution of all earlier maps, then norm, ReLU and 3x3 convolution."""

    def __init__(self, factory: LayerFactory, channels: int, growth_rate: int, width: int):
        self.norm1 = factory.norm(channels)
        self.conv1 = factory.conv(channels, width, 1)
        self.norm2 = factory.norm(width)
        self.conv2 = factory.conv(width, growth_rate, 3, padding=1)

    def __call__(self, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
        """Return this layer's `growth_rate` new maps; in training `moments` are those of all earlier maps."""
        bottleneck = self.conv1(_norm_relu(self.norm1, maps, moments, train))
        return self.conv2(nnx.relu(self.norm2(bottleneck, train=train)))


class Transition(nnx.Module):
    """Norm, ReLU, 1x1 convolution and 2x2 average pooling between two blocks.

    Pooling comes before the convolution here: both are linear and commute, and a quarter of the work is left.
    """

    def __init__(self, factory: LayerFactory, in_channels: int, out_channels: int):
        self.norm = factory.norm(in_channels)
        self.conv = factory.conv(in_channels, out_channels, 1)

    def __call__(self, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
        """Return maps of half the height and width; in training `moments` are those of the block's maps."""
        return self.conv(average_pool(_norm_relu(self.norm, maps, moments, train), 2, 2))


def _norm_relu(norm: BatchNorm, maps: list[Maps], moments: Moments | None, train: bool) -> Maps:
    return nnx.relu(norm(jnp.concatenate(maps, axis=-1), train=train, moments=moments))


def _append_moments(moments: Moments | None, maps: list[Maps], norm: BatchNorm, train: bool) -> Moments | None:
    """Return, in training, the moments of all maps from those of all but the last, and compute the last's.

    Call this outside recomputed functions: inside, gradients would be summed in another order.
    """
    if not train:
        return None
    last = norm.moments(maps[-1], first_channel=sum(entry.shape[-1] for entry in maps[:-1]))
    if moments is None:
        return last
    return jnp.concatenate([moments[0], last[0]]), jnp.concatenate([moments[1], last[1]])


_MAX_ENTRIES = 10


def _merge_entries(maps: list[Maps]) -> list[Maps]:
    """Merge entries, four neighbours of equal width at a time but never the last, until at most ten are left.

    XLA for GPUs reads up to ten operands of a concatenation with wide loads, and more of them value by value.
    """
    widths = [entry.shape[-1] for entry in maps[:-1]]
    if len(maps) <= _MAX_ENTRIES:
        return maps
    for start in range(len(widths) - 3):
        if len(set(widths[start : start + 4])) == 1:
            merged = jnp.concatenate(maps[start : start + 4], axis=-1)
            return _merge_entries([*maps[:start], merged, *maps[start + 4 :]])
    return maps


_SMALL = {
    "growth_rate": 8,
    "block_config": (2, 2, 2),
    "bn_size": 2,
    "stem_channels": 16,
    "stem_kernel": 5,
    "stem_pool": "2x2",
    "pooling": "average+max",
}

ARCHITECTURES = {
    "densenet121": Architecture(DenseNet, IMAGENET, {}, "torchvision densenet121"),
    "densenet169": Architecture(DenseNet, IMAGENET, {"block_config": (6, 12, 32, 32)}, "torchvision densenet169"),
    "densenet201": Architecture(DenseNet, IMAGENET, {"block_config": (6, 12, 48, 32)}, "torchvision densenet201"),
    "densenet_small": Architecture(DenseNet, GREY, _SMALL, "ours, for CPUs"),
}
