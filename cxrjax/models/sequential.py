"""Two families of small CNNs: the six-class study's, with a flattening head, and the attention-fusion paper's.

Version 3 of the six-class study has 167,750 parameters for 64 x 64 images of 3 channels and 6 classes; version 1 is the
same without dropout. The text does not say what version 2 was; the reading here has its 16,851,398 trainable
parameters. The dropout rate is not stated either.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_fraction, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs, Logits, apply_dropout
from cxrjax.models.input_spec import UNIT
from cxrjax.models.layers import BatchNorm, LayerFactory, Maps, maybe_remat, param_dtype
from cxrjax.models.pooling import max_pool


class SequentialCNN(Backbone):
    """Stages of one convolution each, dropout after each stage, flattening, dense layers; the defaults are version 3.

    The dropout after the last stage belongs to the head, so that Monte Carlo dropout, which draws in the head only,
    has a dropout to draw. To draw the other stages' too, give `features` a key and compute the convolutions each time.

    The features may have any size; the head's dense layers fit one size only.

    Args (the common ones: see `Backbone`):
      image_size: height and width of the images.
      widths: channels of each stage's 3x3 convolution.
      pool: whether stages halve height and width: convolutions without padding and 2x2 max pooling. Otherwise
        convolutions are padded and nothing shrinks.
      units: units of each dense layer before the logits.
      norm: whether batch norm follows each stage's and each dense layer's ReLU.
      dropout: fraction dropped after each stage.
    """

    stem: ClassVar = ("stage1.conv", "")
    replaceable: ClassVar = ("classifier", "dense")

    def __init__(
        self,
        common: CommonArgs,
        *,
        image_size: int = 64,
        widths: Sequence[int] = (32, 32, 32),
        pool: bool = True,
        units: Sequence[int] = (128,),
        norm: bool = False,
        dropout: float = 0.25,
    ):
        super().__init__(common)
        factory = LayerFactory(common.dtype, common.seed)
        for name, values in (("widths", widths), ("units", units)):
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise CxrError(f"{name} must be a sequence of at least one number such as (32, 32), not {values!r}")
        self.num_stages = len(widths)
        self.dropout = check_fraction("dropout", dropout)
        self.image_size = self.final_size = check_positive("image_size", image_size)
        channels = common.input_spec.channels
        for number, width in enumerate(widths, start=1):
            setattr(self, f"stage{number}", Stage(factory, channels, check_positive("widths", width), pool, norm))
            channels = width
            self.final_size = (self.final_size - 2) // 2 if pool else self.final_size
        if self.final_size < 1:
            raise CxrError(f"image_size {image_size} is too small for {self.num_stages} stages with pooling")
        features = self.final_size**2 * channels
        self.dense = nnx.List()
        for count in units:
            self.dense.append(Dense(factory, features, check_positive("units", count), norm))
            features = count
        self.classifier = Classifier(factory, features, self.classes)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return each stage's maps before its dropout: "stage1", ..., "final"; a key makes the dropout active."""
        self.check_images(images)
        named, maps = OrderedDict(), images
        for number in range(1, self.num_stages + 1):
            maps = apply_dropout(maps, self.dropout, key, number) if number > 1 else maps
            maps = maybe_remat(Stage.__call__, self.remat)(getattr(self, f"stage{number}"), maps, train)
            named[f"stage{number}" if number < self.num_stages else "final"] = maps
        return named

    def head(self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None) -> Logits:
        """Return the logits, float32 (float64 with float64), from the maps "final"; with a key, after dropout.

        Raises:
          CxrError: maps of images of another size than `image_size`; training with dropout, without a key.
        """
        maps = features["final"]
        if maps.shape[1:3] != (self.final_size, self.final_size):
            raise CxrError(
                f"this network's dense layers are for images of {self.image_size} x {self.image_size} px, and these "
                "have another size: set its option image_size to the size of the images, which must be square"
            )
        if train and self.dropout and key is None:
            raise CxrError("training with dropout needs a random key: pass key=")
        vector = maps.astype(param_dtype(maps.dtype)).reshape(len(maps), -1)
        vector = apply_dropout(vector, self.dropout, key, 0)
        for dense in self.dense:
            vector = dense(vector, train)
        return self.classifier(vector[:, None, None], train=train)


class Stage(nnx.Module):
    """3x3 convolution, ReLU, optional batch norm, optional 2x2 max pooling."""

    def __init__(self, factory: LayerFactory, in_channels: int, out_channels: int, pool: bool, norm: bool):
        self.pool = pool
        self.conv = factory.conv(in_channels, out_channels, 3, padding=0 if pool else 1, bias=True)
        self.norm = nnx.data(factory.norm(out_channels) if norm else None)

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Return the stage's maps."""
        maps = nnx.relu(self.conv(maps))
        if self.norm is not None:
            maps = self.norm(maps, train=train)
        return max_pool(maps, 2, 2) if self.pool else maps


class Dense(nnx.Module):
    """Fully connected layer, ReLU, optional batch norm, in the type of its parameters."""

    def __init__(self, factory: LayerFactory, in_features: int, units: int, norm: bool):
        self.linear = factory.linear(in_features, units)
        self.norm = nnx.data(BatchNorm(units, dtype=factory.param_dtype) if norm else None)

    def __call__(self, vector: Float[Array, "B in_features"], train: bool) -> Float[Array, "B units"]:
        """Return the layer's values."""
        vector = nnx.relu(self.linear(vector))
        return vector if self.norm is None else self.norm(vector[:, None, None], train=train)[:, 0, 0]


SIMPLE_WIDTHS = (32, 64, 128)


class SimpleCNN(Backbone):
    """Three stages of 3x3 convolution, 2x2 max pooling and ReLU; then average, 256 hidden units, logits.

    The paper names pooling before ReLU; the order does not change the result. Args: see `Backbone`.
    """

    stem: ClassVar = ("stage1.conv", "")

    def __init__(
        self,
        common: CommonArgs,
        *,
        pooling: str = "average",
        hidden: int = 256,
        dropout: float = 0.0,
    ):
        super().__init__(common)
        factory = LayerFactory(common.dtype, common.seed)
        channels = common.input_spec.channels
        for number, width in enumerate(SIMPLE_WIDTHS, start=1):
            setattr(self, f"stage{number}", SimpleStage(factory, channels, width))
            channels = width
        self.classifier = Classifier(factory, channels, self.classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the maps after each stage: "stage1", "stage2", "final"."""
        self.check_images(images)
        named, maps = OrderedDict(), images
        for number in range(1, len(SIMPLE_WIDTHS) + 1):
            maps = maybe_remat(SimpleStage.__call__, self.remat)(getattr(self, f"stage{number}"), maps, train)
            named[f"stage{number}" if number < len(SIMPLE_WIDTHS) else "final"] = maps
        return named


class SimpleStage(nnx.Module):
    """3x3 convolution without padding, 2x2 max pooling, ReLU."""

    def __init__(self, factory: LayerFactory, in_channels: int, out_channels: int):
        self.conv = factory.conv(in_channels, out_channels, 3, bias=True)

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Return the stage's maps; `train` has no effect, since there is no norm."""
        return nnx.relu(max_pool(self.conv(maps), 2, 2))


_VERSION_2 = {"widths": (16, 128, 32), "pool": False, "units": (128, 128), "norm": True}

ARCHITECTURES = {
    "sequential_cnn": Architecture(SequentialCNN, UNIT, {}, "the six-class study's version 3"),
    "sequential_cnn_v1": Architecture(SequentialCNN, UNIT, {"dropout": 0.0}, "the six-class study's version 1"),
    "sequential_cnn_v2": Architecture(SequentialCNN, UNIT, _VERSION_2, "the six-class study's version 2, one reading"),
    "simple_cnn": Architecture(SimpleCNN, UNIT, {}, "the simple CNN of the attention-fusion paper"),
}
