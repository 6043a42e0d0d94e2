"""What every network can do: features, head, and both in a row."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, one_of, positive
from cxrjax.models.heads import Classifier
from cxrjax.models.input_spec import InputSpec
from cxrjax.models.layers import REMATS, Maps, maybe_remat

DTYPES = ("bfloat16", "float32", "float64")


class Backbone(nnx.Module):
    """A network in two halves, so that Grad-CAM and effective receptive fields are gradients of one half.

    Attributes:
      classes: number of findings K.
      inputs: what the network expects of its images.
      dtype: compute type; parameters and statistics are float32 (float64 with float64).
      remat: what the backward pass recomputes: "none", each "layer", and on top each "block", or the network in "full".
      published: where published weights keep ours, as (our path, their path) prefixes; the first that fits holds.
      stem: paths of the first convolution and of the norm after it (empty where there is none).
      replaceable: top-level modules that belong to the task, not to the features: new weights may leave them out.
    """

    published: ClassVar[tuple[tuple[str, str], ...]] = ()
    stem: ClassVar[tuple[str, str]]
    replaceable: ClassVar[tuple[str, ...]] = ("classifier",)

    def __init__(self, *, classes: int, inputs: InputSpec, dtype: np.dtype, remat: str):
        self.classes = positive("classes", classes)
        self.inputs = inputs
        self.dtype = np.dtype(dtype)
        self.remat = one_of("remat", remat, REMATS)
        self.classifier: Classifier

    @property
    def members(self) -> Mapping[str, str]:
        """Modules that are networks themselves, with the names of the architectures whose weights they can take."""
        return {}

    def adapt(self, member: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of a whole network's arrays, by dotted path, a member takes, under its own paths."""
        return dict(arrays)

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Named feature maps in order, coarsest last; the last, "final", is what the head takes.

        An `OrderedDict`, since JAX sorts the keys of a plain one wherever it passes through a transformation.

        Args:
          images: prepared images (`cxrjax.models.input_spec.prepare`), of the compute type.
          train: normalise by the batch's statistics, and move the running ones.
          key: for stochastic depth, or dropout between stages, active where a key is given (and the family has it).

        Raises:
          CxrError: wrong rank, channels or type; images too small.
        """
        raise TypeError(f"{type(self).__name__} does not say how to compute features")

    def trunk(self, images: Maps, train: bool, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """`features`, which the backward pass recomputes from the images where `remat` is "full".

        Of a network of several, each is recomputed by itself, so that only one's maps are in memory at a time.
        """
        remat = "none" if self.members else self.remat
        return maybe_remat(_features, remat, "full")(self, images, train, key)

    def head(
        self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B K"]:
        """Logits, float32 (float64 with float64), of the maps "final".

        Args:
          features: result of `features`.
          train: whether this is a training step.
          key: for dropout; where it is given dropout is active, also when not training (Monte Carlo dropout).
        """
        return self.classifier(features["final"], train=train, key=key)

    def heads(
        self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> OrderedDict[str, Float[Array, "B K"]]:
        """The logits of every head that is trained, by name; the prediction last. Most networks have one."""
        return OrderedDict(prediction=self.head(features, train=train, key=key))

    def __call__(self, images: Maps, **how: Any) -> Float[Array, "B K"]:
        """The prediction: the last of `outputs`, whose arguments it takes."""
        return list(self.outputs(images, **how).values())[-1]

    def outputs(
        self,
        images: Maps,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        backbone_in_training: bool = True,
    ) -> OrderedDict[str, Float[Array, "B K"]]:
        """`heads` of `features`, which get the key in training only: Monte Carlo dropout is the head's.

        With `backbone_in_training` False, features are computed as at inference also in training.
        """
        training = train and backbone_in_training
        features = self.trunk(images, training, key if training else None)
        return self.heads(features, train=train, key=key)

    def check(self, images: Maps) -> None:
        """Raise a `CxrError` unless these are prepared images for this network."""
        if images.ndim != 4 or images.shape[-1] != self.inputs.channels:
            raise CxrError(
                f"this network takes images of shape B x H x W x {self.inputs.channels}, not "
                f"{' x '.join(map(str, images.shape))}: use Network.apply, or inputs.prepare with model.inputs"
            )
        if images.dtype != self.dtype:
            raise CxrError(
                f"this network takes prepared {self.dtype} images, not {images.dtype}: "
                "use Network.apply for uint8, or inputs.prepare with model.inputs and model.dtype"
            )


def _features(network: Backbone, images: Maps, train: bool, key: PRNGKeyArray | None) -> OrderedDict[str, Maps]:
    return network.features(images, train=train, key=key)


@dataclass(frozen=True)
class Architecture:
    """A named network: its family, what images it expects, and where it differs from the family's defaults.

    `reference` is the implementation or paper that defines it.
    """

    family: Callable[..., Backbone]
    inputs: InputSpec
    settings: dict[str, Any]
    reference: str


def compute_dtype(dtype) -> np.dtype:
    """A compute type from its name or type.

    Raises:
      CxrError: not one of bfloat16, float32 and float64, or float64 while JAX has 64-bit types switched off.
    """
    name = one_of("dtype", dtype if isinstance(dtype, str) else np.dtype(dtype).name, DTYPES)
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise CxrError("dtype float64 needs 64-bit types: set JAX_ENABLE_X64=1")
    return jnp.dtype(name)
