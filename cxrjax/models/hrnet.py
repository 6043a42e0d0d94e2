"""HRNet (Wang et al. 2020, arXiv:1908.07919): parallel branches of several resolutions, the finest kept to the end.

Module names are timm's, so that its weights fit by name.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs
from cxrjax.models.input_spec import GREY, IMAGENET
from cxrjax.models.layers import ConvNorm, LayerFactory, Maps, maybe_remat
from cxrjax.models.resnet import BasicBlock, Bottleneck, apply_blocks, apply_stage

# Width of the neck's first bottleneck, whose maps have 4 times as many channels; the neck ends with 64 times as many.
NECKS = {"public": 32, "half": 16, "eighth": 4}


class HRNet(Backbone):
    """HRNet for classification as in timm; the defaults are HRNet-W18.

    A stem and bottlenecks at a quarter of the image's size, then stages: each adds a branch of half the size and twice
    the channels, and its modules exchange maps between all branches. The neck joins the branches at the coarsest size.

    Height and width must be such that each branch is exactly half as large as the one before: with four branches a
    multiple of 32, or up to three pixels less.

    Args (the common ones: see `Backbone`):
      width: channels of the finest branch.
      num_modules: number of modules of each stage; a network has one branch more than stages.
      num_blocks: residual blocks per branch and module.
      stem_channels: output channels of both stem convolutions, and of the 3x3 convolutions of the first bottlenecks.
      stem_blocks: number of the first bottlenecks.
      neck: "public" (128, 256, 512, 1024 maps from the branches, 2048 at the end), "half" of that (FHRNet) or "eighth".
    """

    published_prefixes: ClassVar = (("classifier.output", "classifier"),)
    stem: ClassVar = ("conv1", "bn1")
    replaceable: ClassVar = ("classifier", "incre_modules", "downsamp_modules", "final_layer")

    def __init__(
        self,
        common: CommonArgs,
        *,
        width: int = 18,
        num_modules: Sequence[int] = (1, 4, 3),
        num_blocks: int = 4,
        stem_channels: int = 64,
        stem_blocks: int = 4,
        neck: str = "public",
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(common)
        factory = LayerFactory(common.dtype, common.seed, fan_mode="out")
        if isinstance(num_modules, str) or not isinstance(num_modules, Sequence) or not num_modules:
            raise CxrError(f"num_modules must be a sequence, one per stage, such as (1, 4, 3), not {num_modules!r}")
        self.num_branches = len(num_modules) + 1
        channels = check_positive("stem_channels", stem_channels)
        self.conv1 = factory.conv(self.input_spec.channels, channels, 3, stride=2, padding=1)
        self.bn1 = factory.norm(channels)
        self.conv2 = factory.conv(channels, channels, 3, stride=2, padding=1)
        self.bn2 = factory.norm(channels)
        self.layer1 = _bottlenecks(factory, channels, channels, check_positive("stem_blocks", stem_blocks))
        before = [channels * Bottleneck.expansion]
        widths = [check_positive("width", width) * 2**branch for branch in range(self.num_branches)]
        for stage, count in enumerate(num_modules, start=2):
            after = widths[:stage]
            setattr(self, f"transition{stage - 1}", _transition(factory, before, after))
            count = check_positive("num_modules", count)
            modules = [HighResolutionModule(factory, after, num_blocks, self.remat) for _ in range(count)]
            setattr(self, f"stage{stage}", nnx.List(modules))
            before = after
        neck_widths = [NECKS[check_choice("neck", neck, NECKS)] * 2**branch for branch in range(self.num_branches)]
        neck_channels = [neck_width * Bottleneck.expansion for neck_width in neck_widths]
        self.incre_modules = nnx.List(_bottlenecks(factory, *pair, 1) for pair in zip(widths, neck_widths, strict=True))
        self.downsamp_modules = nnx.List(
            ConvNorm(factory, *pair, 3, stride=2, bias=True) for pair in pairwise(neck_channels)
        )
        outputs = 2 * neck_channels[-1]
        self.final_layer = ConvNorm(factory, neck_channels[-1], outputs, 1, bias=True)
        self.classifier = Classifier(factory, outputs, self.classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the maps "stem", "layer1", of each branch after each stage ("stage2_branch1", finest first), "final".

        Raises:
          CxrError: as in `Backbone`, and for sizes at which the branches do not fit each other.
        """
        self.check_images(images)
        check_branch_sizes(*images.shape[1:-1], multiple=2 ** (self.num_branches + 1))
        named = OrderedDict(stem=maybe_remat(HRNet._stem, self.remat)(self, images, train))
        named["layer1"] = apply_stage(self.layer1, named["stem"], train, self.remat)
        branches = [named["layer1"]]
        for stage in range(2, self.num_branches + 1):
            branches = self._add_branch(getattr(self, f"transition{stage - 1}"), branches, train)
            for module in getattr(self, f"stage{stage}"):
                branches = maybe_remat(HighResolutionModule.__call__, self.remat, "block")(module, branches, train)
            named.update({f"stage{stage}_branch{number}": maps for number, maps in enumerate(branches, start=1)})
        named["final"] = self._neck(branches, train)
        return named

    def _stem(self, images: Maps, train: bool) -> Maps:
        maps = nnx.relu(self.bn1(self.conv1(images), train=train))
        return nnx.relu(self.bn2(self.conv2(maps), train=train))

    def _add_branch(self, transition: nnx.List, branches: list[Maps], train: bool) -> list[Maps]:
        """Return the branches at the next stage's widths, and a new one from the coarsest."""
        *adapt, (downsample,) = transition
        conv_of = maybe_remat(ConvNorm.activated, self.remat)
        adapted = [conv_of(conv, maps, train) if conv else maps for conv, maps in zip(adapt, branches, strict=True)]
        return [*adapted, conv_of(downsample, branches[-1], train)]

    def _neck(self, branches: list[Maps], train: bool) -> Maps:
        """Join the branches from fine to coarse: downsample the sum so far and add the next."""
        conv_of = maybe_remat(ConvNorm.activated, self.remat)
        rows = zip(self.incre_modules, branches, strict=True)
        total, *coarser = [apply_blocks(blocks, maps, train, self.remat) for blocks, maps in rows]
        for downsample, maps in zip(self.downsamp_modules, coarser, strict=True):
            total = maps + conv_of(downsample, total, train)
        return conv_of(self.final_layer, total, train)


def _bottlenecks(factory: LayerFactory, channels: int, width: int, count: int) -> nnx.List:
    """Make bottlenecks in sequence, with 3x3 convolutions of `width` channels."""
    in_channels = [channels, *[width * Bottleneck.expansion] * (count - 1)]
    return nnx.List(Bottleneck(factory, inputs, width, stride=1) for inputs in in_channels)


def _transition(factory: LayerFactory, before: Sequence[int], after: Sequence[int]) -> nnx.List:
    """Make the convolutions between stages: one per branch whose channels change, and one for the new branch."""
    adapt = [
        nnx.List() if old == new else ConvNorm(factory, old, new, 3) for old, new in zip(before, after, strict=False)
    ]
    return nnx.List([*adapt, nnx.List([ConvNorm(factory, before[-1], after[-1], 3, stride=2)])])


def check_branch_sizes(height: int, width: int, multiple: int) -> None:
    """Raise a `CxrError` unless each branch is exactly half as large as the one before, which timm needs too.

    The stem makes ceil(size / 4) rows, which must halve evenly: sizes from 3 px below a multiple up to it do, where
    `multiple` is the number of px per position of the coarsest branch.
    """
    for side, size in (("height", height), ("width", width)):
        if -(-size // 4) % (multiple // 4):
            below = size // multiple * multiple
            above = below + multiple - 3
            raise CxrError(
                f"HRNet's branches do not fit each other for images of {height} x {width}: the nearest {side} that "
                f"works is {f'{below} below and {above} above' if below else above}"
            )


class HighResolutionModule(nnx.Module):
    """Residual blocks on each branch, then fusion of all branches into each of them."""

    def __init__(self, factory: LayerFactory, channels: Sequence[int], num_blocks: int, remat: str):
        self.remat = remat
        check_positive("num_blocks", num_blocks)
        branches = [[BasicBlock(factory, width, width, stride=1) for _ in range(num_blocks)] for width in channels]
        self.branches = nnx.List(nnx.List(blocks) for blocks in branches)
        self.fuse_layers = nnx.List(FuseLayer(factory, channels, target) for target in range(len(channels)))

    def __call__(self, branches: list[Maps], train: bool) -> list[Maps]:
        """Return new maps of every branch, of the same shapes."""
        rows = zip(self.branches, branches, strict=True)
        branches = [apply_blocks(blocks, maps, train, self.remat) for blocks, maps in rows]
        return [maybe_remat(FuseLayer.__call__, self.remat)(fuse, branches, train) for fuse in self.fuse_layers]


class FuseLayer(nnx.List):
    """The sum of all branches, each resized to the target branch's size and channels; ReLU."""

    def __init__(self, factory: LayerFactory, channels: Sequence[int], target: int):
        width, finer, coarser = channels[target], channels[: target + 1], channels[target + 1 :]
        down = [Downsample(factory, inputs, width, target - source) for source, inputs in enumerate(finer)]
        up = [Upsample(factory, inputs, width, times) for times, inputs in enumerate(coarser, start=1)]
        super().__init__([*down, *up])

    def __call__(self, branches: list[Maps], train: bool) -> Maps:
        """Return maps of the target branch's shape."""
        return nnx.relu(reduce(add, [path(maps, train) for path, maps in zip(self, branches, strict=True)]))


class Downsample(nnx.List):
    """`times` strided 3x3 convolutions with ReLU between them, the last to `out_channels`; none for 0 times."""

    def __init__(self, factory: LayerFactory, in_channels: int, out_channels: int, times: int):
        channels = [*[in_channels] * times, out_channels]
        super().__init__(ConvNorm(factory, *pair, 3, stride=2) for pair in pairwise(channels))

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Return maps of 1 / 2**times of the size."""
        for number, conv in enumerate(self):
            maps = conv(nnx.relu(maps) if number else maps, train)
        return maps


class Upsample(ConvNorm):
    """A 1x1 convolution to `out_channels`, then nearest-neighbour upsampling."""

    def __init__(self, factory: LayerFactory, in_channels: int, out_channels: int, times: int):
        super().__init__(factory, in_channels, out_channels, 1)
        self.factor = 2**times

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Return maps of 2**times of the size."""
        return upsample_nearest(super().__call__(maps, train), self.factor)


def upsample_nearest(maps: Maps, factor: int) -> Maps:
    """Repeat each value over a square of side `factor`; the backward pass sums gradients over it."""
    B, H, W, C = maps.shape
    squares = jnp.broadcast_to(maps[:, :, None, :, None, :], (B, H, factor, W, factor, C))
    return squares.reshape(B, H * factor, W * factor, C)


_SMALL = {
    "width": 8,
    "num_modules": (1, 1, 1),
    "num_blocks": 1,
    "stem_channels": 8,
    "stem_blocks": 1,
    "neck": "eighth",
    "pooling": "average+max",
}

ARCHITECTURES = {
    "hrnet_w18": Architecture(HRNet, IMAGENET, {}, "timm hrnet_w18"),
    "hrnet_w32": Architecture(HRNet, IMAGENET, {"width": 32}, "timm hrnet_w32"),
    "hrnet_w48": Architecture(HRNet, IMAGENET, {"width": 48}, "timm hrnet_w48"),
    "hrnet_small": Architecture(HRNet, GREY, _SMALL, "ours, for CPUs"),
}
