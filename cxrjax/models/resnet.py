"""ResNet (He et al. 2016, arXiv:1512.03385), with torchvision's module names, so that its weights fit by name.

As in torchvision ("version 1.5") the 3x3 convolution of a bottleneck has the stride, not the first 1x1 as in the paper.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs
from cxrjax.models.input_spec import GREY, IMAGENET
from cxrjax.models.layers import LayerFactory, Maps, maybe_remat
from cxrjax.models.pooling import STEM_POOLS


class ResNet(Backbone):
    """ResNet as in torchvision; the defaults are ResNet50.

    Args (the common ones: see `Backbone`):
      block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1).
      layers: number of blocks of each stage; each stage but the first halves height and width.
      width: channels of the stem and of the first stage's 3x3 convolutions; each stage doubles them.
      stem_kernel, stem_stride: kernel size, odd, and stride of the first convolution.
      stem_pool: max pooling after it, with stride 2: "3x3", "2x2" or "none".
    """

    published_prefixes: ClassVar = (("classifier.output", "fc"),)
    stem: ClassVar = ("conv1", "bn1")

    def __init__(
        self,
        common: CommonArgs,
        *,
        block: str = "bottleneck",
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        stem_pool: str = "3x3",
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(common)
        factory = LayerFactory(common.dtype, common.seed, fan_mode="out")
        block_type = BLOCKS[check_choice("block", block, BLOCKS)]
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise CxrError(f"layers must be a sequence of block counts such as (3, 4, 6, 3), not {layers!r}")
        self.num_stages = len(layers)
        self.stem_pool = check_choice("stem_pool", stem_pool, STEM_POOLS)
        if self.num_stages == 0 or check_positive("stem_kernel", stem_kernel) % 2 == 0:
            raise CxrError(
                f"a ResNet needs at least one stage and an odd stem_kernel, not layers={layers!r} and "
                f"stem_kernel={stem_kernel}"
            )
        stride = check_positive("stem_stride", stem_stride)
        channels = check_positive("width", width)
        self.conv1 = factory.conv(
            self.input_spec.channels, channels, stem_kernel, stride=stride, padding=stem_kernel // 2
        )
        self.bn1 = factory.norm(channels)
        for stage, depth in enumerate(layers, start=1):
            blocks = nnx.List()
            for number in range(check_positive("blocks of a stage", depth)):
                halves = stage > 1 and number == 0
                blocks.append(block_type(factory, channels, width, stride=2 if halves else 1))
                channels = width * block_type.expansion
            setattr(self, f"layer{stage}", blocks)
            width *= 2
        self.classifier = Classifier(factory, channels, self.classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the maps after the stem and each stage: "stem", "layer1", ..., "final"."""
        self.check_images(images)
        maps = maybe_remat(ResNet._stem, self.remat)(self, images, train)
        named = OrderedDict(stem=maps)
        for stage in range(1, self.num_stages + 1):
            maps = apply_stage(getattr(self, f"layer{stage}"), maps, train, self.remat)
            named[f"layer{stage}" if stage < self.num_stages else "final"] = maps
        return named

    def _stem(self, images: Maps, train: bool) -> Maps:
        return STEM_POOLS[self.stem_pool](nnx.relu(self.bn1(self.conv1(images), train=train)))


def apply_stage(blocks: nnx.List, maps: Maps, train: bool, remat: str) -> Maps:
    """Apply residual blocks in sequence; for `remat` together they are a "block", and each of them is a "layer"."""
    return maybe_remat(apply_blocks, remat, "block", static=(2, 3))(blocks, maps, train, remat)


def apply_blocks(blocks: nnx.List, maps: Maps, train: bool, remat: str) -> Maps:
    """Apply residual blocks in sequence, each of which is a "layer" for `remat`."""
    for block in blocks:
        maps = maybe_remat(type(block).__call__, remat)(block, maps, train)
    return maps


class ResidualBlock(nnx.Module):
    """Convolutions with norms, whose result is added to the block's input; ReLU after the sum.

    Where the block changes the shape, a 1x1 convolution and a norm ("downsample") adapt the input.
    """

    expansion: ClassVar[int]

    def __init__(self, factory: LayerFactory, channels: int, width: int, stride: int):
        out_channels = width * self.expansion
        self.downsample: nnx.List[Any] = nnx.List()
        if stride > 1 or channels != out_channels:
            conv = factory.conv(channels, out_channels, 1, stride=stride)
            self.downsample = nnx.List([conv, factory.norm(out_channels)])

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Return the block's maps, of `width * expansion` channels."""
        shortcut = maps
        if self.downsample:
            conv, norm = self.downsample
            shortcut = norm(conv(maps), train=train)
        return nnx.relu(self.residual(maps, train) + shortcut)

    def residual(self, maps: Maps, train: bool) -> Maps:
        """Return what is added to the input."""
        raise TypeError(f"{type(self).__name__} must override residual")


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the first has the stride."""

    expansion: ClassVar = 1

    def __init__(self, factory: LayerFactory, channels: int, width: int, stride: int):
        self.conv1 = factory.conv(channels, width, 3, stride=stride, padding=1)
        self.bn1 = factory.norm(width)
        self.conv2 = factory.conv(width, width, 3, padding=1)
        self.bn2 = factory.norm(width)
        super().__init__(factory, channels, width, stride)

    def residual(self, maps: Maps, train: bool) -> Maps:
        """Return what is added to the input."""
        maps = nnx.relu(self.bn1(self.conv1(maps), train=train))
        return self.bn2(self.conv2(maps), train=train)


class Bottleneck(ResidualBlock):
    """1x1 convolution to `width` channels, 3x3 with the stride, 1x1 to four times as many."""

    expansion: ClassVar = 4

    def __init__(self, factory: LayerFactory, channels: int, width: int, stride: int):
        self.conv1 = factory.conv(channels, width, 1)
        self.bn1 = factory.norm(width)
        self.conv2 = factory.conv(width, width, 3, stride=stride, padding=1)
        self.bn2 = factory.norm(width)
        self.conv3 = factory.conv(width, width * self.expansion, 1)
        self.bn3 = factory.norm(width * self.expansion)
        super().__init__(factory, channels, width, stride)

    def residual(self, maps: Maps, train: bool) -> Maps:
        """Return what is added to the input."""
        maps = nnx.relu(self.bn1(self.conv1(maps), train=train))
        maps = nnx.relu(self.bn2(self.conv2(maps), train=train))
        return self.bn3(self.conv3(maps), train=train)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}

_SMALL = {
    "block": "basic",
    "layers": (1, 1, 1),
    "width": 16,
    "stem_kernel": 5,
    "stem_pool": "2x2",
    "pooling": "average+max",
}

ARCHITECTURES = {
    "resnet18": Architecture(ResNet, IMAGENET, {"block": "basic", "layers": (2, 2, 2, 2)}, "torchvision resnet18"),
    "resnet34": Architecture(ResNet, IMAGENET, {"block": "basic"}, "torchvision resnet34"),
    "resnet50": Architecture(ResNet, IMAGENET, {}, "torchvision resnet50"),
    "resnet101": Architecture(ResNet, IMAGENET, {"layers": (3, 4, 23, 3)}, "torchvision resnet101"),
    "resnet_small": Architecture(ResNet, GREY, _SMALL, "ours, for CPUs"),
}
