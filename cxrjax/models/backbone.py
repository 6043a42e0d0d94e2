"""The interface of every network: features, a head with one logit per finding, and both together."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_fraction, check_positive
from cxrjax.models.input_spec import InputSpec
from cxrjax.models.layers import REMATS, LayerFactory, Maps, maybe_remat, param_dtype

DTYPES = ("bfloat16", "float32", "float64")
LSE_SHARPNESS = 10.0  # r of log-sum-exp pooling: towards 0 it is the mean, towards infinity the maximum

Logits = Float[Array, "B K"]


@dataclass(frozen=True)
class CommonArgs:
    """Arguments of every family.

    Attributes:
      classes: number of findings K.
      input_spec: what the network expects of its images.
      dtype: compute type; parameters and statistics are float32 (float64 with float64).
      remat: what the backward pass recomputes: "none", each "layer", also each "block", or the network in "full".
      seed: seed of the initial values.
    """

    classes: int
    input_spec: InputSpec
    dtype: np.dtype
    remat: str
    seed: int


class Backbone(nnx.Module):
    """A network in two halves: Grad-CAM and effective receptive fields are gradients of one half.

    All families take `CommonArgs`, and those with a `Classifier` as their head also its options.

    Attributes:
      published_prefixes: (our prefix, published prefix) of module paths; the first that matches applies.
      stem: paths of the first convolution and of the norm after it (empty where there is none).
      replaceable: top-level modules that belong to the task, not to the features: published weights may lack them.
    """

    published_prefixes: ClassVar[tuple[tuple[str, str], ...]] = ()
    stem: ClassVar[tuple[str, str]]
    replaceable: ClassVar[tuple[str, ...]] = ("classifier",)

    def __init__(self, common: CommonArgs):
        self.classes = check_positive("classes", common.classes)
        self.input_spec = common.input_spec
        self.dtype = np.dtype(common.dtype)
        self.remat = check_choice("remat", common.remat, REMATS)
        self.classifier: Classifier

    @property
    def members(self) -> Mapping[str, str]:
        """Modules that are networks themselves, with the names of the architectures whose weights they take."""
        return {}

    def member_arrays(self, member: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of a whole network, by dotted path, that a member takes, under the member's own paths."""
        return dict(arrays)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return named feature maps in order, coarsest last; the head takes the last, "final".

        An `OrderedDict`, because JAX sorts the keys of a plain dict that passes through a transformation.

        Args:
          images: prepared images (`cxrjax.models.input_spec.prepare`) of the compute type.
          train: normalise by the batch's moments, and update the running statistics.
          key: for stochastic depth or dropout between stages, where the family has it; None switches it off.

        Raises:
          CxrError: wrong rank, channels or type; images too small.
        """
        raise TypeError(f"{type(self).__name__} must override features")

    def remat_features(self, images: Maps, train: bool, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Compute `features`; with remat "full" the backward pass recomputes them from the images.

        In a network with members each member is recomputed on its own: only one's maps are in memory at a time.
        """
        remat = "none" if self.members else self.remat
        return maybe_remat(_features, remat, "full")(self, images, train, key)

    def head(self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None) -> Logits:
        """Return the prediction's logits, float32 (float64 with float64), from the maps "final".

        A key makes dropout active, also when not training (Monte Carlo dropout).
        """
        return self.classifier(features["final"], train=train, key=key)

    def heads(
        self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> OrderedDict[str, Logits]:
        """Return the logits of every trained head by name, the prediction last; most networks have one head."""
        return OrderedDict(prediction=self.head(features, train=train, key=key))

    def __call__(self, images: Maps, **options: Any) -> Logits:
        """Return the prediction's logits; arguments as in `outputs`."""
        return list(self.outputs(images, **options).values())[-1]

    def outputs(
        self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None, backbone_in_training: bool = True
    ) -> OrderedDict[str, Logits]:
        """Return `heads` of `features`; without `backbone_in_training` features are always computed as at inference.

        Features get the key in training only, since Monte Carlo dropout concerns the head.
        """
        train_backbone = train and backbone_in_training
        features = self.remat_features(images, train_backbone, key if train_backbone else None)
        return self.heads(features, train=train, key=key)

    def check_images(self, images: Maps) -> None:
        """Raise a `CxrError` unless these are prepared images for this network."""
        if images.ndim != 4 or images.shape[-1] != self.input_spec.channels:
            raise CxrError(
                f"this network takes images of shape B x H x W x {self.input_spec.channels}, not "
                f"{' x '.join(map(str, images.shape))}: use Network.apply, or input_spec.prepare with model.input_spec"
            )
        if images.dtype != self.dtype:
            raise CxrError(
                f"this network takes prepared {self.dtype} images, not {images.dtype}: "
                "use Network.apply for uint8, or input_spec.prepare with model.input_spec and model.dtype"
            )


def _features(network: Backbone, images: Maps, train: bool, key: PRNGKeyArray | None) -> OrderedDict[str, Maps]:
    return network.features(images, train=train, key=key)


@dataclass(frozen=True)
class Architecture:
    """A named network.

    Attributes:
      family: its class.
      input_spec: what it expects of its images.
      options: the family's options, where they differ from its defaults.
      reference: the implementation or paper that defines it.
    """

    family: Callable[..., Backbone]
    input_spec: InputSpec
    options: dict[str, Any]
    reference: str


def compute_dtype(dtype) -> np.dtype:
    """Return a compute type given by name or type.

    Raises:
      CxrError: not one of bfloat16, float32 and float64, or float64 while JAX's 64-bit types are disabled.
    """
    name = check_choice("dtype", dtype if isinstance(dtype, str) else np.dtype(dtype).name, DTYPES)
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise CxrError("dtype float64 needs 64-bit types: set JAX_ENABLE_X64=1")
    return jnp.dtype(name)


class Classifier(nnx.Module):
    """Global pooling, dropout, an optional hidden layer (ReLU, dropout), and one logit per finding.

    It takes maps of any type and computes in float32 or wider.

    Args:
      factory: makes the layers.
      channels: of the maps.
      classes: number of findings K.
      pooling: "average", "max", "average+max" (both, concatenated) or "log-sum-exp".
      hidden: units of the hidden layer; 0 for none.
      dropout: fraction of values dropped, 0 <= dropout < 1.
    """

    def __init__(
        self,
        factory: LayerFactory,
        channels: int,
        classes: int,
        *,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        self.pooling = check_choice("pooling", pooling, POOLINGS)
        self.dropout = check_fraction("dropout", dropout)
        channels *= 2 if pooling == "average+max" else 1
        self.hidden = nnx.data(None)
        if hidden:
            self.hidden = factory.linear(channels, check_positive("hidden", hidden))
            channels = hidden
        self.output = factory.linear(channels, check_positive("classes", classes))

    def __call__(self, maps: Maps, *, train: bool, key: PRNGKeyArray | None = None) -> Logits:
        """Return the logits; dropout is active where a key is given: in training, and for Monte Carlo dropout.

        Raises:
          CxrError: training a network that has dropout, without a key.
        """
        if train and self.dropout and key is None:
            raise CxrError("training with dropout needs a random key: pass key=")
        vector = POOLINGS[self.pooling](maps.astype(param_dtype(maps.dtype)))
        vector = apply_dropout(vector, self.dropout, key, 0)
        if self.hidden is not None:
            vector = apply_dropout(nnx.relu(self.hidden(vector)), self.dropout, key, 1)
        return self.output(vector)


def apply_dropout(
    values: Float[Array, "B ..."], rate: float, key: PRNGKeyArray | None, index: int
) -> Float[Array, "B ..."]:
    """Set a fraction of the values to 0 and scale the others so that the mean stays; without a key do nothing.

    The key is common to all dropouts of the network; `index` says which of them this is, and is folded into it.
    """
    if key is None or not rate:
        return values
    keep = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, values.shape)
    return jnp.where(keep, values / (1 - rate), jnp.zeros_like(values))


def _log_sum_exp(maps: Maps) -> Float[Array, "B C"]:
    """Compute log(mean(exp(r x))) / r, between mean and maximum (Wang et al. 2017, arXiv:1705.02315, eq. 2)."""
    positions = maps.shape[1] * maps.shape[2]
    return (jax.nn.logsumexp(LSE_SHARPNESS * maps, axis=(1, 2)) - math.log(positions)) / LSE_SHARPNESS


def _global_max(maps: Maps) -> Float[Array, "B C"]:
    """Return the maximum of each channel; among equal values the first gets the gradient.

    (The gradient of `jnp.max` compares the result with the maps, and divides by 0 where these were recomputed with
    another rounding.)
    """
    values = maps.reshape(len(maps), -1, maps.shape[-1])
    argmax = jnp.argmax(values, axis=1)[:, None]
    is_max = jnp.arange(values.shape[1], dtype=argmax.dtype)[None, :, None] == argmax
    return jnp.where(is_max, values, jnp.zeros_like(values)).sum(1)


POOLINGS = {
    "average": lambda maps: maps.mean((1, 2)),
    "max": _global_max,
    "average+max": lambda maps: jnp.concatenate([maps.mean((1, 2)), _global_max(maps)], axis=-1),
    "log-sum-exp": _log_sum_exp,
}
