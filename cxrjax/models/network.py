"""A network as plain data, which `jax.jit`, `jax.grad` and checkpoints take."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray, UInt8

from cxrjax.errors import CxrError
from cxrjax.models.backbone import Backbone, Logits
from cxrjax.models.input_spec import InputSpec, prepare


@dataclass(frozen=True, eq=False)
class NetworkDef:
    """The static part of a network; equal networks share one, so that comparing two, at each call, is one `is`."""

    graph: nnx.GraphDef
    classes: int
    input_spec: InputSpec
    dtype: np.dtype

    def __reduce__(self):
        return _network_def, (self.graph, self.classes, self.input_spec, self.dtype)


@cache
def _network_def(graph: nnx.GraphDef, classes: int, input_spec: InputSpec, dtype: np.dtype) -> NetworkDef:
    return NetworkDef(graph, classes, input_spec, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network:
    """Parameters and batch statistics as plain nested dicts of arrays, and the static definition.

    A network is a pytree: pass it to jitted functions, map over it, replace its fields with `dataclasses.replace`.
    Plain dicts keep the cost of a call low, and returning the statistics keeps them from getting lost.
    """

    params: dict[str, Any]
    stats: dict[str, Any]
    definition: NetworkDef = field(metadata={"static": True})

    @classmethod
    def from_model(cls, model: Backbone) -> "Network":
        """Return the network that a module holds; later changes of the module do not affect it."""
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        definition = _network_def(graph, model.classes, model.input_spec, model.dtype)
        return cls(nnx.to_pure_dict(params), nnx.to_pure_dict(stats), definition)

    @property
    def classes(self) -> int:
        """Number of findings K."""
        return self.definition.classes

    @property
    def input_spec(self) -> InputSpec:
        """What the network expects of its images."""
        return self.definition.input_spec

    @property
    def dtype(self) -> np.dtype:
        """The compute type."""
        return self.definition.dtype

    def model(self) -> Backbone:
        """Return the module; call this inside the traced function, never outside."""
        return nnx.merge(self.definition.graph, self.params, self.stats)

    def apply(self, images: UInt8[Array, "B H W 1"], **options: Any) -> tuple[Logits, dict[str, Any]]:
        """Return the prediction's logits for grey images, and the updated batch statistics; see `outputs`."""
        outputs, stats = self.outputs(images, **options)
        return list(outputs.values())[-1], stats

    def outputs(
        self,
        images: UInt8[Array, "B H W 1"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        backbone_in_training: bool = True,
    ) -> tuple[OrderedDict[str, Logits], dict[str, Any]]:
        """Return the logits of every head for grey images, the prediction last, and the updated batch statistics.

        Args:
          images: grey values 0..255.
          train: normalise by the batch's moments, and update the running statistics.
          key: for dropout, which is active where a key is given.
          backbone_in_training: False computes features as at inference, also in training, and keeps the statistics.

        Raises:
          CxrError: images that are not uint8 B x H x W x 1, or too small for the network.
        """
        model = self.model()
        prepared = prepare(images, self.input_spec, self.dtype)
        outputs = model.outputs(prepared, train=train, key=key, backbone_in_training=backbone_in_training)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def parameter_count(network: Any) -> int:
    """Return the number of parameters, without statistics, of a module, a `Network` or nested dicts of arrays."""
    from clu.parameter_overview import count_parameters  # slow to import, and a training step does not need it

    if isinstance(network, Backbone):
        network = Network.from_model(network)
    return int(count_parameters(network.params if isinstance(network, Network) else network))


SIZE_MULTIPLE, NUM_CANDIDATES = 32, 4
"""`check_size` proposes multiples of 32, since networks halve their images five times, and tries this many above."""


def check_size(network: Network, size: int, *, batch_size: int = 1, backbone_in_training: bool = True) -> None:
    """Check that the network can be trained on images of `size` px a side, by tracing a training step's outputs.

    `batch_size` images are normalised together, if `backbone_in_training` says that norms use the batch's moments.

    Raises:
      CxrError: it cannot; the message has the network's reason and the nearest multiples of 32 that work.
    """
    refusal = partial(_refusal, network, batch_size=batch_size, backbone_in_training=backbone_in_training)
    reason = refusal(size)
    if not reason:
        return
    below = size // SIZE_MULTIPLE * SIZE_MULTIPLE
    candidates = [below + SIZE_MULTIPLE * step for step in range(NUM_CANDIDATES + 1)]
    working = [candidate for candidate in candidates if candidate and not refusal(candidate)]
    nearest = [side for side in working if side < size][:1] + [side for side in working if side > size][:1]
    advice = f": choose data.image_size = {' or '.join(map(str, nearest))}" if nearest else ""
    raise CxrError(f"config key data.image_size = {size} does not suit the network{advice}. Its reason: {reason}")


def _refusal(network: Network, size: int, batch_size: int, backbone_in_training: bool) -> str:
    """Return why the network refuses a size; empty if it does not."""
    images = jax.ShapeDtypeStruct((batch_size, size, size, 1), np.uint8)
    try:
        # Jitted, so that equal networks are traced once: a study opens many runs.
        _training_outputs.eval_shape(network, images, backbone_in_training)
    except CxrError as error:
        return str(error)
    return ""


@partial(jax.jit, static_argnums=2)
def _training_outputs(network: Network, images: jax.Array, backbone_in_training: bool) -> list[jax.Array]:
    key = jax.random.PRNGKey(0)
    outputs, _ = network.outputs(images, train=True, key=key, backbone_in_training=backbone_in_training)
    return list(outputs.values())
