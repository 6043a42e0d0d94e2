"""HRNet: branches of several resolutions side by side, the finest kept to the end.

Wang et al. 2020, "Deep high-resolution representation learning for visual recognition", arXiv:1908.07919. Module names
are timm's, so that its weights fit by name.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.errors import CxrError, one_of, positive
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.heads import Classifier
from cxrjax.models.input_spec import GREY, IMAGENET, InputSpec
from cxrjax.models.layers import ConvNorm, LayerFactory, Maps, maybe_remat
from cxrjax.models.resnet import BasicBlock, Bottleneck, in_turn, one_by_one

# Of the neck's first bottleneck: it makes 4 times as many maps of the finest branch, and the neck ends with 64 times.
NECKS = {"public": 32, "half": 16, "eighth": 4}


class HRNet(Backbone):
    """HRNet for classification as timm defines it; the defaults are HRNet-W18.

    A stem and four bottlenecks at a quarter of the image's size, then stages: each adds a branch of half the size and
    twice the channels, and its modules exchange maps between all branches. The neck brings the branches together at
    the coarsest size.

    Height and width must be such that each branch is exactly half as large as the one before: with four branches a
    multiple of 32, or up to three pixels less.

    Args:
      classes: number of findings.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      width: channels of the finest branch.
      modules: of each stage; a network has one branch more than stages.
      blocks: residual blocks per branch and module.
      stem_channels: outputs of both convolutions of the stem, and of the 3x3 convolutions of the first bottlenecks.
      stem_blocks: number of these bottlenecks.
      neck: "public" (128, 256, 512, 1024 maps of the branches, 2048 in the end), "half" of that (FHRNet) or "eighth".
      pooling: of the head: "average", "max", "average+max" or "log-sum-exp".
      hidden: units of a hidden layer in the head; 0 for none.
      dropout: in the head.
    """

    published: ClassVar = (("classifier.output", "classifier"),)
    stem: ClassVar = ("conv1", "bn1")
    replaceable: ClassVar = ("classifier", "incre_modules", "downsamp_modules", "final_layer")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
        width: int = 18,
        modules: Sequence[int] = (1, 4, 3),
        blocks: int = 4,
        stem_channels: int = 64,
        stem_blocks: int = 4,
        neck: str = "public",
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        make = LayerFactory(dtype, seed, fan="out")
        if isinstance(modules, str) or not isinstance(modules, Sequence) or not modules:
            raise CxrError(f"modules must be a sequence of numbers, one per stage, such as (1, 4, 3), not {modules!r}")
        self.branches = len(modules) + 1
        channels = positive("stem_channels", stem_channels)
        self.conv1 = make.conv(inputs.channels, channels, 3, stride=2, padding=1)
        self.bn1 = make.norm(channels)
        self.conv2 = make.conv(channels, channels, 3, stride=2, padding=1)
        self.bn2 = make.norm(channels)
        self.layer1 = _bottlenecks(make, channels, channels, positive("stem_blocks", stem_blocks))
        before = [channels * Bottleneck.expansion]
        widths = [positive("width", width) * 2**branch for branch in range(self.branches)]
        for stage, count in enumerate(modules, start=2):
            after = widths[:stage]
            setattr(self, f"transition{stage - 1}", _transition(make, before, after))
            row = [HighResolutionModule(make, after, blocks, remat) for _ in range(positive("modules", count))]
            setattr(self, f"stage{stage}", nnx.List(row))
            before = after
        planes = [NECKS[one_of("neck", neck, NECKS)] * 2**branch for branch in range(self.branches)]
        wide = [each * Bottleneck.expansion for each in planes]
        self.incre_modules = nnx.List(_bottlenecks(make, *pair, 1) for pair in zip(widths, planes, strict=True))
        self.downsamp_modules = nnx.List(ConvNorm(make, *pair, 3, stride=2, bias=True) for pair in pairwise(wide))
        self.final_layer = ConvNorm(make, wide[-1], 2 * wide[-1], 1, bias=True)
        self.classifier = Classifier(make, 2 * wide[-1], classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Maps after the stem, "layer1", of each branch after each stage ("stage2_branch1", finest first), and "final".

        Raises:
          CxrError: as in `Backbone`, and for sizes at which the branches do not fit each other.
        """
        self.check(images)
        check_size(*images.shape[1:-1], multiple=2 ** (self.branches + 1))
        named = OrderedDict(stem=maybe_remat(HRNet._stem, self.remat)(self, images, train))
        named["layer1"] = in_turn(self.layer1, named["stem"], train, self.remat)
        branches = [named["layer1"]]
        for stage in range(2, self.branches + 1):
            branches = self._one_more(getattr(self, f"transition{stage - 1}"), branches, train)
            for module in getattr(self, f"stage{stage}"):
                branches = maybe_remat(HighResolutionModule.__call__, self.remat, "block")(module, branches, train)
            named.update({f"stage{stage}_branch{number}": maps for number, maps in enumerate(branches, start=1)})
        named["final"] = self._neck(branches, train)
        return named

    def _stem(self, images: Maps, train: bool) -> Maps:
        maps = nnx.relu(self.bn1(self.conv1(images), train=train))
        return nnx.relu(self.bn2(self.conv2(maps), train=train))

    def _one_more(self, transition: nnx.List, branches: list[Maps], train: bool) -> list[Maps]:
        """The branches in the next stage's widths, and a new one, made from the coarsest."""
        *adapt, (halve,) = transition
        active = maybe_remat(ConvNorm.active, self.remat)
        kept = [active(step, maps, train) if step else maps for step, maps in zip(adapt, branches, strict=True)]
        return [*kept, active(halve, branches[-1], train)]

    def _neck(self, branches: list[Maps], train: bool) -> Maps:
        """From the finest branch to the coarsest: halve what there is and add the next."""
        active = maybe_remat(ConvNorm.active, self.remat)
        rows = zip(self.incre_modules, branches, strict=True)
        total, *others = [one_by_one(row, maps, train, self.remat) for row, maps in rows]
        for halve, maps in zip(self.downsamp_modules, others, strict=True):
            total = maps + active(halve, total, train)
        return active(self.final_layer, total, train)


def _bottlenecks(make: LayerFactory, channels: int, width: int, count: int) -> nnx.List:
    """Bottlenecks in a row, with 3x3 convolutions of `width` channels."""
    inputs = [channels, *[width * Bottleneck.expansion] * (count - 1)]
    return nnx.List(Bottleneck(make, each, width, stride=1) for each in inputs)


def _transition(make: LayerFactory, before: Sequence[int], after: Sequence[int]) -> nnx.List:
    """Between stages: a convolution per branch whose channels change, and one that makes the new branch."""
    adapt = [nnx.List() if old == new else ConvNorm(make, old, new, 3) for old, new in zip(before, after, strict=False)]
    return nnx.List([*adapt, nnx.List([ConvNorm(make, before[-1], after[-1], 3, stride=2)])])


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise a `CxrError` unless each branch is exactly half as large as the one before, as timm needs it too.

    The stem makes ceil(size / 4) rows, which must halve evenly: sizes from 3 px below a multiple up to it do.

    Args:
      height: of the images, px.
      width: of the images, px.
      multiple: px per position of the coarsest branch.
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
    """Residual blocks on each branch, then the exchange between all branches."""

    def __init__(self, make: LayerFactory, channels: Sequence[int], blocks: int, remat: str):
        self.remat = remat
        rows = [
            [BasicBlock(make, each, each, stride=1) for _ in range(positive("blocks", blocks))] for each in channels
        ]
        self.branches = nnx.List(nnx.List(row) for row in rows)
        self.fuse_layers = nnx.List(Fusion(make, channels, target) for target in range(len(channels)))

    def __call__(self, branches: list[Maps], train: bool) -> list[Maps]:
        """New maps of every branch, of the same shapes."""
        rows = zip(self.branches, branches, strict=True)
        branches = [one_by_one(row, maps, train, self.remat) for row, maps in rows]
        return [maybe_remat(Fusion.__call__, self.remat)(fusion, branches, train) for fusion in self.fuse_layers]


class Fusion(nnx.List):
    """The sum of all branches, each brought to one branch's size and channels; ReLU."""

    def __init__(self, make: LayerFactory, channels: Sequence[int], target: int):
        own, coarser = channels[target], channels[target + 1 :]
        halved = [Halvings(make, each, own, target - source) for source, each in enumerate(channels[: target + 1])]
        super().__init__([*halved, *(Doublings(make, each, own, times) for times, each in enumerate(coarser, start=1))])

    def __call__(self, branches: list[Maps], train: bool) -> Maps:
        """Maps of the target branch's shape."""
        return nnx.relu(reduce(add, [path(maps, train) for path, maps in zip(self, branches, strict=True)]))


class Halvings(nnx.List):
    """Strided 3x3 convolutions with ReLU between them, the last into the new channels; no convolution for 0 times."""

    def __init__(self, make: LayerFactory, inputs: int, outputs: int, times: int):
        super().__init__(ConvNorm(make, *pair, 3, stride=2) for pair in pairwise([*[inputs] * times, outputs]))

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Maps of a half, a quarter, ... of the size."""
        for number, step in enumerate(self):
            maps = step(nnx.relu(maps) if number else maps, train)
        return maps


class Doublings(ConvNorm):
    """A 1x1 convolution into the new channels, then nearest-neighbour enlargement."""

    def __init__(self, make: LayerFactory, inputs: int, outputs: int, times: int):
        super().__init__(make, inputs, outputs, 1)
        self.factor = 2**times

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Maps of two, four, ... times the size."""
        return repeated(super().__call__(maps, train), self.factor)


def repeated(maps: Maps, factor: int) -> Maps:
    """Nearest-neighbour enlargement: each value fills a square of side `factor`; gradients are summed over it."""
    B, H, W, C = maps.shape
    squares = jnp.broadcast_to(maps[:, :, None, :, None, :], (B, H, factor, W, factor, C))
    return squares.reshape(B, H * factor, W * factor, C)


_SMALL = {
    "width": 8,
    "modules": (1, 1, 1),
    "blocks": 1,
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
