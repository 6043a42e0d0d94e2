"""Published PyTorch state dicts into our networks: every key used and every array filled, or an error."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.errors import CxrError, check_choice
from cxrjax.models import ARCHITECTURES, create
from cxrjax.models.backbone import Backbone
from cxrjax.models.input_spec import INPUT_SPECS
from cxrjax.models.layers import skip_init

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
    names = published_names(model)
    return {names[path]: _published_shape(variable.shape) for path, variable in _variables(model).items()}


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


# torchvision before 0.3: denselayer1.norm.1.weight for denselayer1.norm1.weight
_LEGACY_LAYER = re.compile(r"(?P<layer>denselayer\d+\.(?:norm|conv))\.(?P<number>[12])\.(?=\w+$)")
_XRV_THRESHOLDS = "op_threshs"


@dataclass(frozen=True)
class RenamedArrays:
    """Arrays by published names.

    Attributes:
      arrays: by published name.
      original: the file's name of each.
      dropped: the file's names of arrays that belong to no network, with the reason.
      notes: how names were changed.
      torchxrayvision: whether one of torchxrayvision's own arrays was among them.
    """

    arrays: dict[str, np.ndarray]
    original: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    torchxrayvision: bool


def to_published_names(arrays: Mapping[str, np.ndarray], family: type[Backbone]) -> RenamedArrays:
    """Rename arrays as the family's reference implementation names them.

    Handled are: prefixes common to all names (`module.` of DataParallel, `model.`, CheXNet's `module.densenet121.`),
    torchvision's older names of dense layers (`norm.1`), a head inside a sequence (`classifier.0`), and
    torchxrayvision's operating thresholds.

    Raises:
      CxrError: two names become one.
    """
    original = {name: name for name in arrays}  # the file's name by the current one
    notes = []

    def rename(change, note: str) -> None:
        nonlocal original
        renamed = {}
        for name, in_file in original.items():
            if (new := change(name)) in renamed:
                raise CxrError(f"{in_file} and {renamed[new]} are both {new}: remove one")
            renamed[new] = in_file
        if renamed != original:
            notes.append(note)
        original = renamed

    thresholds = [name for name in original if name.rpartition(".")[2] == _XRV_THRESHOLDS]
    reason = "torchxrayvision's operating thresholds are not part of the network"
    dropped = {original.pop(name): reason for name in thresholds}
    while prefix := _common_prefix(original, top_modules(family)):
        rename(lambda name, prefix=prefix: name.removeprefix(prefix), f"all names began with {prefix}")
    rename(lambda name: _LEGACY_LAYER.sub(r"\g<layer>\g<number>.", name), "older names such as norm.1 stand for norm1")
    head = published_name(family, ("classifier", "output", "kernel")).removesuffix(".weight")
    root = published_module(family, "classifier")
    head_name = re.compile(rf"{re.escape(root)}(\.\d+|)\.(?:weight|bias)$")
    positions = {match[1] for name in original if (match := head_name.match(name))}
    if len(positions) == 1 and (in_file := root + positions.pop()) != head:
        rename(
            lambda name: re.sub(rf"^{re.escape(in_file)}\.(?=\w+$)", f"{head}.", name), f"the head was called {in_file}"
        )
    renamed = {name: arrays[in_file] for name, in_file in original.items()}
    return RenamedArrays(renamed, original, dropped, tuple(notes), bool(thresholds))


def top_modules(family: type[Backbone]) -> set[str]:
    """Return the published names of those top-level modules that are known from the family alone."""
    ours = [path for path in (*getattr(family, "stem", ()), *family.replaceable) if path]
    theirs = [path for _, path in family.published_prefixes if path]
    theirs += [published_module(family, path) for path in ours]
    return {path.partition(".")[0] for path in theirs}


def _common_prefix(names: Mapping[str, str], modules: set[str]) -> str:
    """Return the first component of all names, with its dot, if it is the same and not one of the network's modules."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return f"{first}." if first and first not in modules else ""


def get_family(architecture: str) -> type[Backbone]:
    """Return the class of a network."""
    return cast(type[Backbone], ARCHITECTURES[architecture].family)


def abstract_model(architecture: str, **options: Any) -> Backbone:
    """Return the module that `create` would build, with shapes and types in place of arrays.

    Raises:
      CxrError: as `create`; or options have a wrong type, or are too large.
    """
    try:
        with skip_init():
            return nnx.eval_shape(lambda: create(architecture, **options))
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, AssertionError, MemoryError) as error:
        given = ", ".join(f"{name}={value!r:.40}" for name, value in options.items())
        reason = " ".join(str(error).split())[:120]
        raise CxrError(f"{architecture} cannot be built with {given}: {reason}") from None


_MIN_MATCH = 0.9  # fraction of matching arrays from which weights are taken to be of an architecture


def suggest_architecture(arrays: Mapping[str, np.ndarray], architecture: str, options: Mapping[str, Any]) -> str:
    """Return the name of another architecture that the weights fit; empty if they fit this one, or none.

    Networks are built one by one, likely ones first, until one fits.
    """
    if _match(arrays, architecture, options) >= _MIN_MATCH:
        return ""
    likely_first = sorted(ARCHITECTURES, key=lambda name: -_module_match(arrays, get_family(name)))
    best, highest = "", _MIN_MATCH
    for name in likely_first:
        if name != architecture and (match := _match(arrays, name, {})) > highest:
            best, highest = name, match
            if match == 1:
                break
    return best


def _module_match(arrays: Mapping[str, np.ndarray], family: type[Backbone]) -> float:
    """Return the fraction of the family's top-level modules that the weights have; builds no network."""
    modules = {name.partition(".")[0] for name in to_published_names(arrays, family).arrays}
    expected = top_modules(family)
    return len(expected & modules) / len(expected)


def _match(arrays: Mapping[str, np.ndarray], architecture: str, options: Mapping[str, Any]) -> float:
    """Return the fraction of arrays, without heads and counters, that network and file have in the same shape."""
    family = get_family(architecture)
    arrays = to_published_names(arrays, family).arrays
    conv = getattr(family, "stem", ("",))[0]
    first = published_name(family, (*conv.split("."), "kernel")) if conv else ""
    if first not in arrays or arrays[first].ndim != 4:
        return 0.0
    channels = arrays[first].shape[1]
    spec = next((spec for spec in INPUT_SPECS.values() if spec.channels == channels), None)
    model = abstract_model(architecture, classes=1, input_spec=spec, **options)
    shapes = published_shapes(model)
    expected = {name for path, name in published_names(model).items() if path[0] not in model.replaceable}
    heads = tuple(f"{published_module(family, module)}." for module in model.replaceable)
    present = {name for name in arrays if not name.endswith("num_batches_tracked") and not name.startswith(heads)}
    matches = sum(name in present and arrays[name].shape == shapes[name] for name in expected)
    return matches / len(expected | present)
