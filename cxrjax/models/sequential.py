"""The sequential CNNs of a six-class study: convolutions, then dense layers over the flattened maps.

Version 3 of the study has 167,750 parameters for 64 x 64 images of 3 channels and 6 classes; version 1 is the same
without dropout. What version 2 was cannot be told from the text; the reading here has its 16,851,398 trainable
parameters. The rate of dropout is not stated either.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_positive, check_fraction
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.heads import Classifier, drop
from cxrjax.models.input_spec import UNIT, InputSpec
from cxrjax.models.layers import BatchNorm, LayerFactory, Maps, maybe_remat, param_dtype
from cxrjax.models.pooling import max_pool


class SequentialCNN(Backbone):
    """Stages of a convolution each, dropout after each of them, flattening, dense layers; the defaults are version 3.

    The dropout after the last stage is the head's, so that Monte Carlo dropout, which draws in the head only, has
    something to draw. To draw the other stages' too, give `features` a key, and pay for the convolutions each time.

    The features may be of any size; the head's dense layers fit one size only.

    Args:
      classes: number of classes.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      image_size: height and width of the images.
      widths: channels of each stage's 3x3 convolution.
      pool: whether stages halve height and width: convolutions without padding and 2x2 max pooling. Otherwise
        convolutions are padded and nothing shrinks.
      units: of each dense layer before the logits.
      norm: whether batch norm follows each stage's and each dense layer's ReLU.
      dropout: after each stage.
    """

    stem: ClassVar = ("stage1.conv", "")
    replaceable: ClassVar = ("classifier", "dense")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
        image_size: int = 64,
        widths: Sequence[int] = (32, 32, 32),
        pool: bool = True,
        units: Sequence[int] = (128,),
        norm: bool = False,
        dropout: float = 0.25,
    ):
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        make = LayerFactory(dtype, seed)
        for what, numbers in (("widths", widths), ("units", units)):
            if isinstance(numbers, str) or not isinstance(numbers, Sequence) or not numbers:
                raise CxrError(f"{what} must be a sequence of at least one number such as (32, 32), not {numbers!r}")
        self.stages = len(widths)
        self.dropout = check_fraction("dropout", dropout)
        self.image_size = self.side = check_positive("image_size", image_size)
        channels = inputs.channels
        for number, width in enumerate(widths, start=1):
            setattr(self, f"stage{number}", Stage(make, channels, check_positive("widths", width), pool, norm))
            channels = width
            self.side = (self.side - 2) // 2 if pool else self.side
        if self.side < 1:
            raise CxrError(f"image_size {image_size} is too small for {self.stages} stages with pooling")
        values = self.side**2 * channels
        self.dense = nnx.List()
        for number in units:
            self.dense.append(Dense(make, values, check_positive("units", number), norm))
            values = number
        self.classifier = Classifier(make, values, classes)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Maps after each stage, "stage1", ..., "final", before its dropout, which is active where a key is given."""
        self.check(images)
        named, maps = OrderedDict(), images
        for number in range(1, self.stages + 1):
            maps = drop(maps, self.dropout, key, number) if number > 1 else maps
            maps = maybe_remat(Stage.__call__, self.remat)(getattr(self, f"stage{number}"), maps, train)
            named[f"stage{number}" if number < self.stages else "final"] = maps
        return named

    def head(
        self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B K"]:
        """Logits, float32 (float64 with float64), of the maps "final"; with a key, after dropout.

        Raises:
          CxrError: maps of images of another size than `image_size`; training with dropout, without a key.
        """
        maps = features["final"]
        if maps.shape[1:3] != (self.side, self.side):
            raise CxrError(
                f"this network's dense layers are for images of {self.image_size} x {self.image_size} px, and these "
                "have another size: set its option image_size to the size of the images, which must be square"
            )
        if train and self.dropout and key is None:
            raise CxrError("training with dropout needs a random key: pass key=")
        vector = drop(maps.astype(param_dtype(maps.dtype)).reshape(len(maps), -1), self.dropout, key, 0)
        for dense in self.dense:
            vector = dense(vector, train)
        return self.classifier(vector[:, None, None], train=train)


class Stage(nnx.Module):
    """3x3 convolution, ReLU, batch norm or none, 2x2 max pooling or none."""

    def __init__(self, make: LayerFactory, channels: int, width: int, pool: bool, norm: bool):
        self.pool = pool
        self.conv = make.conv(channels, width, 3, padding=0 if pool else 1, bias=True)
        self.norm = nnx.data(make.norm(width) if norm else None)

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """The maps after this stage."""
        maps = nnx.relu(self.conv(maps))
        if self.norm is not None:
            maps = self.norm(maps, train=train)
        return max_pool(maps, 2, 2) if self.pool else maps


class Dense(nnx.Module):
    """Fully connected layer, ReLU, batch norm or none; in the type of its parameters."""

    def __init__(self, make: LayerFactory, inputs: int, units: int, norm: bool):
        self.linear = make.linear(inputs, units)
        self.norm = nnx.data(BatchNorm(units, dtype=make.param_dtype) if norm else None)

    def __call__(self, vector: Float[Array, "B inputs"], train: bool) -> Float[Array, "B units"]:
        """The layer's values."""
        vector = nnx.relu(self.linear(vector))
        return vector if self.norm is None else self.norm(vector[:, None, None], train=train)[:, 0, 0]


_VERSION_2 = {"widths": (16, 128, 32), "pool": False, "units": (128, 128), "norm": True}

ARCHITECTURES = {
    "sequential_cnn": Architecture(SequentialCNN, UNIT, {}, "the six-class study's version 3"),
    "sequential_cnn_v1": Architecture(SequentialCNN, UNIT, {"dropout": 0.0}, "the six-class study's version 1"),
    "sequential_cnn_v2": Architecture(SequentialCNN, UNIT, _VERSION_2, "the six-class study's version 2, one reading"),
}


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
        make = LayerFactory(dtype, seed)
        channels = inputs.channels
        for number, width in enumerate(WIDTHS, start=1):
            setattr(self, f"stage{number}", SimpleStage(make, channels, width))
            channels = width
        self.classifier = Classifier(make, channels, classes, pooling=pooling, hidden=hidden, dropout=dropout)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Maps after each stage: "stage1", "stage2", "final"."""
        self.check(images)
        named, maps = OrderedDict(), images
        for number in range(1, len(WIDTHS) + 1):
            maps = maybe_remat(SimpleStage.__call__, self.remat)(getattr(self, f"stage{number}"), maps, train)
            named[f"stage{number}" if number < len(WIDTHS) else "final"] = maps
        return named


class SimpleStage(nnx.Module):
    """3x3 convolution without padding, 2x2 max pooling, ReLU."""

    def __init__(self, make: LayerFactory, channels: int, width: int):
        self.conv = make.conv(channels, width, 3, bias=True)

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """The maps after this stage; `train` changes nothing, there is no norm."""
        return nnx.relu(max_pool(self.conv(maps), 2, 2))


ARCHITECTURES |= {
    "simple_cnn": Architecture(SimpleCNN, UNIT, {}, "the simple CNN of the attention-fusion paper"),
}
