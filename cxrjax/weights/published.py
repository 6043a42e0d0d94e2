"""Published PyTorch state dicts into our networks: every key used and every array filled, or an error."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.errors import CxrError, check_choice
from cxrjax.models.backbone import Backbone

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_MAX_FAULTS = 8  # in a message


@dataclass(frozen=True)
class FittedWeights:
    """Published weights that fit a network.

    Attributes:
      arrays: by our path, in our layout and the network's types.
      used: the published key of each of these paths.
      dropped: unused keys, with the reason.
      missing: our paths that were skipped.
    """

    arrays: dict[tuple[str, ...], np.ndarray]
    used: dict[tuple[str, ...], str]
    dropped: dict[str, str]
    missing: tuple[tuple[str, ...], ...]


def load_published(
    model: Backbone, state_dict: Mapping[str, np.ndarray], *, skip: Collection[str] = ()
) -> FittedWeights:
    """Fill a network in place with published weights; arguments and errors as in `fit_published`.

    On an error the network stays as it was. Skipped modules keep their values.
    """
    fitted = fit_published(model, state_dict, skip=skip)
    for path, variable in _variables(model).items():
        if path in fitted.arrays:
            variable[...] = jnp.array(fitted.arrays[path])  # a copy: the array may be a view of a file
    return fitted


def fit_published(
    model: Backbone, state_dict: Mapping[str, np.ndarray], *, skip: Collection[str] = ()
) -> FittedWeights:
    """Convert published weights to a network's paths, layout and types.

    Args:
      model: of the architecture that the weights belong to; it does not change, and shapes alone are enough.
      state_dict: arrays by PyTorch's names, in PyTorch's layout (OIHW convolutions, outputs x inputs).
      skip: modules, of the model's `replaceable`, to leave out; their keys are dropped.

    Raises:
      CxrError: keys are missing or unexpected, or arrays have another shape, are not floating-point or not finite, or
        variances are negative; the message lists the first faults and the number of all.
    """
    for module in skip:
        check_choice("replaceable module", module, model.replaceable)
    names, variables = published_names(model), _variables(model)
    slots = {names[path]: path for path in variables if path[0] not in skip}
    counters = {name.replace("running_mean", _COUNTER) for name in slots if name.endswith(".running_mean")}
    skipped = tuple(f"{published_module(type(model), module)}." for module in skip)
    dropped = dict.fromkeys(sorted(counters & state_dict.keys()), "a counter of PyTorch's that nothing needs")
    for name in state_dict.keys() - slots.keys() - counters:
        if name.startswith(skipped) or name in names.values():
            dropped[name] = "of a module that is left out"
    faults = [f"missing {name}" for name in sorted(slots.keys() - state_dict.keys())]
    faults += [f"unexpected {name}" for name in sorted(state_dict.keys() - slots.keys() - dropped.keys())]
    arrays = {}
    for name in sorted(slots.keys() & state_dict.keys()):
        array, variable = np.asarray(state_dict[name]), variables[slots[name]]
        if array.shape != (shape := _published_shape(variable.shape)):
            faults.append(f"{name} has shape {array.shape}, needed is {shape}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            faults.append(f"{name} is {array.dtype}, needed is a floating-point type")
        elif not np.isfinite(converted := _from_torch_layout(array, variable.dtype)).all():
            faults.append(f"{name} holds values that are not finite")
        elif name.endswith(".running_var") and (converted < 0).any():
            faults.append(f"{name} holds negative variances")
        else:
            arrays[slots[name]] = converted
    if faults:
        more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise CxrError(
            f"these weights do not fit this network ({len(faults)} faults): {'; '.join(faults[:_MAX_FAULTS])}{more}"
        )
    used = {path: name for name, path in slots.items()}
    return FittedWeights(arrays, used, dropped, tuple(path for path in variables if path[0] in skip))


def _variables(model: Backbone) -> dict[tuple[str, ...], nnx.Variable]:
    """The network's parameters and batch statistics by our path."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {tuple(map(str, path)): variable for path, variable in state}


def published_names(model: Backbone) -> dict[tuple[str, ...], str]:
    """Return the published name of each of the network's arrays, by our path."""
    return {path: published_name(type(model), path) for path in _variables(model)}


def published_shapes(model: Backbone) -> dict[str, tuple[int, ...]]:
    """Return PyTorch's shape of each of the network's arrays, by published name."""
    return {
        published_name(type(model), path): _published_shape(variable.shape)
        for path, variable in _variables(model).items()
    }


def published_name(family: type[Backbone], path: tuple[str, ...]) -> str:
    """Return the published name of an array of a family, from our path."""
    *modules, leaf = path
    return ".".join(filter(None, (_published_path(family, ".".join(modules)), _LEAF_NAMES.get(leaf, leaf))))


def published_module(family: type[Backbone], module: str) -> str:
    """Return the published path of a top-level module; of the head without its number in a sequence."""
    if module != "classifier":
        return _published_path(family, module)
    return re.sub(r"\.\d+$", "", _published_path(family, "classifier.output"))


def _published_path(family: type[Backbone], module: str) -> str:
    """Replace the prefix of a module path by the published one; the rest of the names is the same."""
    for ours, theirs in family.published_prefixes:
        if not ours or module == ours or module.startswith(f"{ours}."):
            return ".".join(filter(None, (theirs, module.removeprefix(ours).removeprefix("."))))
    return module


def _published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWIO -> OIHW; (in, out) -> (out, in)."""
    if len(shape) == 4:
        height, width, in_channels, out_channels = shape
        return (out_channels, in_channels, height, width)
    return shape[::-1]


def _from_torch_layout(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """OIHW -> HWIO; (out, in) -> (in, out); vectors stay."""
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, which is refused
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T, dtype)
