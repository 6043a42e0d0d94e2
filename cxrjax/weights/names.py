"""From the names that a file gives its arrays to the published names of a network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flax import nnx

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.backbone import Backbone
from cxrjax.models.input_spec import NAMED
from cxrjax.models.layers import skip_init
from cxrjax.models.registry import ARCHITECTURES
from cxrjax.weights.published import published_module, published_name, published_names, published_shapes

# torchvision before 0.3: denselayer1.norm.1.weight for denselayer1.norm1.weight
_LEGACY_LAYER = re.compile(r"(?P<layer>denselayer\d+\.(?:norm|conv))\.(?P<number>[12])\.(?=\w+$)")
_XRV_THRESHOLDS = "op_threshs"


@dataclass(frozen=True)
class Named:
    """Arrays by published names.

    Attributes:
      arrays: by published name.
      original: what the file calls each.
      dropped: the file's names of arrays that no network has, and why.
      notes: how names were changed.
      torchxrayvision: whether an array of torchxrayvision's was among them.
    """

    arrays: dict[str, np.ndarray]
    original: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    torchxrayvision: bool


def published(arrays: Mapping[str, np.ndarray], family: type[Backbone]) -> Named:
    """Give arrays the names that the family's reference gives them.

    Known are: prefixes that all names have (`module.` of DataParallel, `model.`, CheXNet's `module.densenet121.`),
    torchvision's older names of dense layers (`norm.1`), a head inside a sequence (`classifier.0`), and
    torchxrayvision's operating thresholds.

    Raises:
      CxrError: two names become one.
    """
    names = {name: name for name in arrays}  # what each is now: what the file calls it
    notes = []

    def rename(change, note: str) -> None:
        nonlocal names
        new = {}
        for name, original in names.items():
            if (changed := change(name)) in new:
                raise CxrError(f"{original} and {new[changed]} are both {changed}: remove one")
            new[changed] = original
        if new != names:
            notes.append(note)
        names = new

    thresholds = [name for name in names if name.rpartition(".")[2] == _XRV_THRESHOLDS]
    dropped = {
        names.pop(name): "torchxrayvision's operating thresholds are no part of the network" for name in thresholds
    }
    while prefix := _common_prefix(names, top_modules(family)):
        rename(lambda name, prefix=prefix: name.removeprefix(prefix), f"all names began with {prefix}")
    rename(lambda name: _LEGACY_LAYER.sub(r"\g<layer>\g<number>.", name), "older names such as norm.1 stand for norm1")
    head = published_name(family, ("classifier", "output", "kernel")).removesuffix(".weight")
    root = published_module(family, "classifier")
    inside = {match[1] for name in names if (match := re.match(rf"{re.escape(root)}(\.\d+|)\.(?:weight|bias)$", name))}
    if len(inside) == 1 and (found := root + inside.pop()) != head:
        rename(lambda name: re.sub(rf"^{re.escape(found)}\.(?=\w+$)", f"{head}.", name), f"the head was called {found}")
    kept = {name: arrays[original] for name, original in names.items()}
    return Named(kept, names, dropped, tuple(notes), bool(thresholds))


def top_modules(family: type[Backbone]) -> set[str]:
    """Published names of the family's top-level modules, as far as the family alone tells them."""
    ours = [path for path in (*getattr(family, "stem", ()), *family.replaceable) if path]
    theirs = [path for _, path in family.published if path] + [published_module(family, path) for path in ours]
    return {path.partition(".")[0] for path in theirs}


def _common_prefix(names: Mapping[str, str], known: set[str]) -> str:
    """The first part of all names, with its dot, if they have one in common that the network does not."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return f"{first}." if first and first not in known else ""


_ALIKE = 0.9  # share of arrays that fit, from which weights are taken to be of an architecture


def family_of(architecture: str) -> type[Backbone]:
    """The class of a network."""
    return cast(type[Backbone], ARCHITECTURES[architecture].family)


def shapes_of(architecture: str, **options: Any) -> Backbone:
    """The network that `create` would build, with shapes and types for arrays.

    Raises:
      CxrError: as `create`; or options are of a wrong type, or too large.
    """
    try:
        with skip_init():
            return nnx.eval_shape(lambda: create(architecture, **options))
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, AssertionError, MemoryError) as error:
        given = ", ".join(f"{name}={value!r:.40}" for name, value in options.items())
        reason = " ".join(str(error).split())[:120]
        raise CxrError(f"{architecture} cannot be built with {given}: {reason}") from None


def suggestion(arrays: Mapping[str, np.ndarray], architecture: str, options: Mapping[str, Any]) -> str:
    """The name of another architecture that the weights are of; empty where they are of this one, or of none.

    Networks are built one by one, likely ones first, until one fits.
    """
    if _likeness(arrays, architecture, options) >= _ALIKE:
        return ""
    likely = sorted(ARCHITECTURES, key=lambda name: -_familiar(arrays, family_of(name)))
    best, highest = "", _ALIKE
    for name in likely:
        if name != architecture and (likeness := _likeness(arrays, name, {})) > highest:
            best, highest = name, likeness
            if likeness == 1:
                break
    return best


def _familiar(arrays: Mapping[str, np.ndarray], family: type[Backbone]) -> float:
    """The share of the family's top-level modules that are in the weights; needs no network."""
    there = {name.partition(".")[0] for name in published(arrays, family).arrays}
    known = top_modules(family)
    return len(known & there) / len(known)


def _likeness(arrays: Mapping[str, np.ndarray], architecture: str, options: Mapping[str, Any]) -> float:
    """The share of arrays, the network's and the file's but for heads and counters, that agree in name and shape."""
    family = family_of(architecture)
    arrays = published(arrays, family).arrays
    conv = getattr(family, "stem", ("",))[0]
    first = published_name(family, (*conv.split("."), "kernel")) if conv else ""
    if first not in arrays or arrays[first].ndim != 4:
        return 0.0
    channels = arrays[first].shape[1]
    spec = next((spec for spec in NAMED.values() if spec.channels == channels), None)
    model = shapes_of(architecture, classes=1, inputs=spec, **options)
    shapes = published_shapes(model)
    body = {name for path, name in published_names(model).items() if path[0] not in model.replaceable}
    heads = tuple(f"{published_module(family, module)}." for module in model.replaceable)
    there = {name for name in arrays if not name.endswith("num_batches_tracked") and not name.startswith(heads)}
    return sum(name in there and arrays[name].shape == shapes[name] for name in body) / len(body | there)
