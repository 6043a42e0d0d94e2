"""From a network's name to the network."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from cxrjax.models.backbone import Backbone, compute_dtype
from cxrjax.models.densenet import DenseNet
from cxrjax.models.inputs import GREY, IMAGENET, UNIT, InputSpec
from cxrjax.models.options import one_of
from cxrjax.models.simple import SimpleCNN


@dataclass(frozen=True)
class Architecture:
    """A named network: its family, what images it expects, and where it differs from the family's defaults.

    `reference` is the implementation or paper that defines it.
    """

    family: Callable[..., Backbone]
    inputs: InputSpec
    settings: dict[str, Any]
    reference: str


SMALL = {
    "growth": 8,
    "blocks": (2, 2, 2),
    "bottleneck": 2,
    "stem_channels": 16,
    "stem_kernel": 5,
    "stem_pool": "2x2",
    "pooling": "average+max",
}

ARCHITECTURES = {
    "densenet121": Architecture(DenseNet, IMAGENET, {}, "torchvision densenet121"),
    "densenet_small": Architecture(DenseNet, GREY, SMALL, "ours, for CPUs"),
    "simple_cnn": Architecture(SimpleCNN, UNIT, {}, "the simple CNN of the attention-fusion paper"),
}

_COMMON = {"self", "classes", "inputs", "dtype", "remat", "seed"}


def create(
    name: str,
    *,
    classes: int,
    dtype: Any = jnp.float32,
    remat: str = "none",
    seed: int = 0,
    inputs: InputSpec | None = None,
    **options: Any,
) -> Backbone:
    """Build a network with random initial weights, which depend on the seed alone.

    Args:
      name: "densenet121" (torchvision's), "densenet_small" (a small one for CPUs) or "simple_cnn".
      classes: number of findings K.
      dtype: compute type, bfloat16, float32 or float64 (name or type); parameters and batch statistics are float32
        (float64 with float64).
      remat: "none", or "layer" to recompute layer by layer in the backward pass instead of keeping maps.
      seed: of the initial weights.
      inputs: what the network expects of its images; None for the architecture's own.
      **options: of the family, see `DenseNet` and `SimpleCNN`.

    Raises:
      CxrError: unknown name or option (the message names the nearest), or a value out of range.
    """
    architecture = ARCHITECTURES[one_of("network", name, ARCHITECTURES)]
    known = set(inspect.signature(architecture.family.__init__).parameters) - _COMMON
    for option in options:
        one_of(f"option of {name}", option, known)
    return architecture.family(
        classes=classes,
        inputs=inputs or architecture.inputs,
        dtype=compute_dtype(dtype),
        remat=remat,
        seed=seed,
        **{**architecture.settings, **options},
    )
