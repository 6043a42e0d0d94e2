"""A network as plain data: what `jax.jit`, `jax.grad` and checkpoints take."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from cxrjax.errors import CxrError
from cxrjax.models.backbone import Backbone
from cxrjax.models.input_spec import InputSpec, prepare


@dataclass(frozen=True, eq=False)
class NetworkDef:
    """What of a network is no array. Equal networks share one, so comparing two, at each call, is one `is`."""

    graph: nnx.GraphDef
    classes: int
    inputs: InputSpec
    dtype: np.dtype

    def __reduce__(self):
        return _network_def, (self.graph, self.classes, self.inputs, self.dtype)


@cache
def _network_def(graph: nnx.GraphDef, classes: int, inputs: InputSpec, dtype: np.dtype) -> NetworkDef:
    return NetworkDef(graph, classes, inputs, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network:
    """Parameters and batch statistics as plain nested dicts of arrays, and the static rest.

    It is a pytree: pass it to jitted functions, map over it, replace its parts with `dataclasses.replace`. Passing
    plain dicts is what keeps the cost of a call low, and returning the statistics is what keeps them from getting
    lost.
    """

    params: dict[str, Any]
    stats: dict[str, Any]
    definition: NetworkDef = field(metadata={"static": True})

    @classmethod
    def from_model(cls, model: Backbone) -> "Network":
        """The network that a module holds; the module's later changes do not show in it."""
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        definition = _network_def(graph, model.classes, model.inputs, model.dtype)
        return cls(nnx.to_pure_dict(params), nnx.to_pure_dict(stats), definition)

    @property
    def classes(self) -> int:
        """Number of findings K."""
        return self.definition.classes

    @property
    def inputs(self) -> InputSpec:
        """What the network expects of its images."""
        return self.definition.inputs

    @property
    def dtype(self) -> np.dtype:
        """The compute type."""
        return self.definition.dtype

    def model(self) -> Backbone:
        """The module; build it inside the function that is traced, never outside."""
        return nnx.merge(self.definition.graph, self.params, self.stats)

    def apply(
        self,
        images: UInt8[Array, "B H W 1"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        backbone_in_training: bool = True,
    ) -> tuple[Float[Array, "B K"], dict[str, Any]]:
        """Logits of grey images, and the batch statistics afterwards; see `outputs`."""
        outputs, stats = self.outputs(images, train=train, key=key, backbone_in_training=backbone_in_training)
        return list(outputs.values())[-1], stats

    def outputs(
        self,
        images: UInt8[Array, "B H W 1"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        backbone_in_training: bool = True,
    ) -> tuple[OrderedDict[str, Float[Array, "B K"]], dict[str, Any]]:
        """Logits of every head for grey images, the prediction last, and the batch statistics afterwards.

        Args:
          images: grey values 0..255.
          train: normalise by the batch's statistics, and move the running ones.
          key: for dropout, which is active where a key is given.
          backbone_in_training: False computes features as at inference also in training, and leaves statistics alone.

        Raises:
          CxrError: images that are not uint8 B x H x W x 1, or too small for the network.
        """
        model = self.model()
        prepared = prepare(images, self.inputs, self.dtype)
        outputs = model.outputs(prepared, train=train, key=key, backbone_in_training=backbone_in_training)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def parameter_count(of: Any) -> int:
    """Number of parameters, batch statistics left out, of a module, a `Network` or nested dicts of arrays."""
    from clu.parameter_overview import count_parameters  # not where only a step is measured

    if isinstance(of, Backbone):
        of = Network.from_model(of)
    return int(count_parameters(of.params if isinstance(of, Network) else of))


STEP, TRIES = 32, 4
"""Sizes that are proposed are multiples of this: networks halve their images five times. So many are tried."""


def check_size(network: Network, size: int, *, images: int = 1, backbone_in_training: bool = True) -> None:
    """Check that a training step can be made.

    Args:
      network: of any family.
      size: side of the images in px.
      images: normalised together.
      backbone_in_training: whether its norms learn their statistics.

    Raises:
      CxrError: the network says why not; the nearest multiples of `STEP` that work are named.
    """
    how = (images, backbone_in_training)
    reason = _refusal(network, size, *how)
    if not reason:
        return
    below = size // STEP * STEP
    candidates = [below + STEP * step for step in range(1, TRIES + 1)]
    choices = [each for each in (below, *candidates) if each and not _refusal(network, each, *how)]
    nearest = [each for each in choices if each < size][:1] + [each for each in choices if each > size][:1]
    mend = f": choose data.size = {' or '.join(map(str, nearest))}" if nearest else ""
    raise CxrError(f"config key data.size = {size} does not suit the network{mend}. It says: {reason}")


def _refusal(network: Network, size: int, images: int, backbone_in_training: bool) -> str:
    try:
        # Traced once for equal networks: a study opens many runs.
        _outputs.eval_shape(network, jax.ShapeDtypeStruct((images, size, size, 1), np.uint8), backbone_in_training)
    except CxrError as error:
        return str(error)
    return ""


@partial(jax.jit, static_argnums=2)
def _outputs(network: Network, image: jax.Array, backbone_in_training: bool) -> list[jax.Array]:
    key = jax.random.PRNGKey(0)
    found, _ = network.outputs(image, train=True, key=key, backbone_in_training=backbone_in_training)
    return list(found.values())
