"""Published PyTorch weights, into our networks: every key used, every array filled, or an error."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.errors import CxrError
from cxrjax.models.backbone import Backbone

_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Loaded:
    """What `load_published` did.

    Attributes:
      arrays: number of arrays filled.
      values: number of values in them.
      dropped: keys that have no counterpart here because nothing needs them: PyTorch's batch counters.
    """

    arrays: int
    values: int
    dropped: tuple[str, ...]


def load_published(model: Backbone, state_dict: Mapping[str, np.ndarray]) -> Loaded:
    """Fill a network with published weights, in place; on an error it stays as it was.

    Args:
      model: of the architecture that the weights belong to.
      state_dict: PyTorch's names, and arrays in PyTorch's layout (OIHW convolutions, outputs x inputs).

    Raises:
      CxrError: keys are missing or unexpected, or arrays have another shape, are not floating-point, or not finite;
        the message lists all of them.
    """
    names = published_names(model)
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    slots = {names[tuple(map(str, path))]: variable for path, variable in state}
    counters = {name.replace("running_mean", _COUNTER) for name in slots if name.endswith(".running_mean")}
    faults = [f"missing {name}" for name in sorted(slots.keys() - state_dict.keys())]
    faults += [f"unexpected {name}" for name in sorted(state_dict.keys() - slots.keys() - counters)]
    arrays = {}
    for name in sorted(slots.keys() & state_dict.keys()):
        array, shape = np.asarray(state_dict[name]), _published_shape(slots[name].shape)
        if array.shape != shape:
            faults.append(f"{name} has shape {array.shape}, needed is {shape}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            faults.append(f"{name} is {array.dtype}, needed is a floating-point type")
        elif not np.isfinite(array.astype(np.float64)).all():
            faults.append(f"{name} holds values that are not finite")
        else:
            arrays[name] = _our_layout(array)
    if faults:
        raise CxrError(f"these weights do not fit this network ({len(faults)} faults): {'; '.join(faults)}")
    for name, array in arrays.items():
        slots[name][...] = jnp.asarray(array, slots[name].dtype)
    return Loaded(
        arrays=len(arrays),
        values=sum(array.size for array in arrays.values()),
        dropped=tuple(sorted(counters & state_dict.keys())),
    )


def published_names(model: Backbone) -> dict[tuple[str, ...], str]:
    """What published weights call each of the network's arrays, by our path."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {tuple(map(str, path)): _published_name(model, path) for path, _ in state}


def _published_name(model: Backbone, path: tuple) -> str:
    """A variable's name in published weights: module names are the same but for the family's prefixes."""
    *modules, leaf = map(str, path)
    module = ".".join(modules)
    for ours, theirs in model.published:
        if not ours or module == ours or module.startswith(f"{ours}."):
            module = ".".join(filter(None, (theirs, module.removeprefix(ours).removeprefix("."))))
            break
    return f"{module}.{_NAMES[leaf]}"


def _published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of an array that has this shape here."""
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return shape[::-1]


def _our_layout(array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO; (out, in) -> (in, out); the rest as it is."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
