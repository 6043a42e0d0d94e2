"""Which architecture weights are of, by the names and shapes of their arrays."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from flax import nnx

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.backbone import Backbone
from cxrjax.models.inputs import NAMED
from cxrjax.models.layers import undrawn
from cxrjax.models.pretrained import published_module, published_name, published_names, published_shapes
from cxrjax.models.registry import ARCHITECTURES
from cxrjax.weights.keys import published, top_modules

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
        with undrawn():
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
