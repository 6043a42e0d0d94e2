"""Published PyTorch weights, into our networks: every key used, every array filled, or an error."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.errors import CxrError, check_choice
from cxrjax.models.backbone import Backbone

_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_SHOWN = 8  # faults in a message


@dataclass(frozen=True)
class Loaded:
    """What `load_published` did.

    Attributes:
      arrays: number of arrays filled.
      values: number of values in them.
      dropped: keys that were not used, because nothing needs them or because their module was left out.
    """

    arrays: int
    values: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """Published weights that fit a network.

    Attributes:
      arrays: by our path, in our layout and the network's types.
      used: the published key of each of these paths.
      dropped: keys that were not used, and why.
      missing: our paths that were left out.
    """

    arrays: dict[tuple[str, ...], np.ndarray]
    used: dict[tuple[str, ...], str]
    dropped: dict[str, str]
    missing: tuple[tuple[str, ...], ...]


def load_published(model: Backbone, state_dict: Mapping[str, np.ndarray], *, leave: Collection[str] = ()) -> Loaded:
    """Fill a network with published weights, in place; on an error it stays as it was.

    Args:
      model: of the architecture that the weights belong to.
      state_dict: PyTorch's names, and arrays in PyTorch's layout (OIHW convolutions, outputs x inputs).
      leave: modules, of the model's `replaceable`, that keep their values; keys of theirs are dropped.

    Raises:
      CxrError: as `fit_published`.
    """
    fit = fit_published(model, state_dict, leave=leave)
    for path, variable in _variables(model).items():
        if path in fit.arrays:
            variable[...] = jnp.array(fit.arrays[path])  # a copy: the array may be a view of a file
    return Loaded(len(fit.arrays), sum(a.size for a in fit.arrays.values()), tuple(sorted(fit.dropped)))


def fit_published(model: Backbone, state_dict: Mapping[str, np.ndarray], *, leave: Collection[str] = ()) -> Fit:
    """Published weights as the network wants them; the network may be one of shapes only, and does not change.

    Args:
      model: of the architecture that the weights belong to.
      state_dict: PyTorch's names, and arrays in PyTorch's layout (OIHW convolutions, outputs x inputs).
      leave: modules, of the model's `replaceable`, to leave out; keys of theirs are dropped.

    Raises:
      CxrError: keys are missing or unexpected, or arrays have another shape, are not floating-point, or not finite,
        or variances are negative; the message lists the first of them and the number of all.
    """
    for module in leave:
        check_choice("replaceable module", module, model.replaceable)
    names, variables = published_names(model), _variables(model)
    slots = {names[path]: path for path in variables if path[0] not in leave}
    counters = {name.replace("running_mean", _COUNTER) for name in slots if name.endswith(".running_mean")}
    left = tuple(f"{published_module(type(model), module)}." for module in leave)
    dropped = dict.fromkeys(sorted(counters & state_dict.keys()), "a counter of PyTorch's that nothing needs")
    for name in state_dict.keys() - slots.keys() - counters:
        if name.startswith(left) or name in names.values():
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
        elif not np.isfinite(ours := _our_layout(array, variable.dtype)).all():
            faults.append(f"{name} holds values that are not finite")
        elif name.endswith(".running_var") and (ours < 0).any():
            faults.append(f"{name} holds negative variances")
        else:
            arrays[slots[name]] = ours
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CxrError(
            f"these weights do not fit this network ({len(faults)} faults): {'; '.join(faults[:_SHOWN])}{more}"
        )
    used = {path: name for name, path in slots.items()}
    return Fit(arrays, used, dropped, tuple(path for path in variables if path[0] in leave))


def _variables(model: Backbone) -> dict[tuple[str, ...], nnx.Variable]:
    """The network's parameters and batch statistics by our path."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {tuple(map(str, path)): variable for path, variable in state}


def published_names(model: Backbone) -> dict[tuple[str, ...], str]:
    """What published weights call each of the network's arrays, by our path."""
    return {path: published_name(type(model), path) for path in _variables(model)}


def published_shapes(model: Backbone) -> dict[str, tuple[int, ...]]:
    """PyTorch's shape of each of the network's arrays, by published name."""
    return {
        published_name(type(model), path): _published_shape(variable.shape)
        for path, variable in _variables(model).items()
    }


def published_name(family: type[Backbone], path: tuple[str, ...]) -> str:
    """What published weights call an array of this family; `path` is ours."""
    *modules, leaf = path
    return ".".join(filter(None, (_published_path(family, ".".join(modules)), _NAMES.get(leaf, leaf))))


def published_module(family: type[Backbone], module: str) -> str:
    """Where published weights keep a top-level module; for the head without the number it may have in a sequence."""
    if module != "classifier":
        return _published_path(family, module)
    return re.sub(r"\.\d+$", "", _published_path(family, "classifier.output"))


def _published_path(family: type[Backbone], module: str) -> str:
    """Module names are the same but for the family's prefixes."""
    for ours, theirs in family.published:
        if not ours or module == ours or module.startswith(f"{ours}."):
            return ".".join(filter(None, (theirs, module.removeprefix(ours).removeprefix("."))))
    return module


def _published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of an array that has this shape here."""
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return shape[::-1]


def _our_layout(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """OIHW -> HWIO; (out, in) -> (in, out); the rest as it is."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is refused
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T, dtype)
