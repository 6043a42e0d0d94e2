"""Networks by name."""

from typing import Any

import jax
import jax.numpy as jnp

from cxrjax.errors import check_choice, check_options
from cxrjax.models import attention_fusion, densenet, efficientnet, fhrnet, hrnet, resnet, sequential
from cxrjax.models.backbone import Backbone, CommonArgs, compute_dtype
from cxrjax.models.input_spec import InputSpec
from cxrjax.models.layers import skip_init
from cxrjax.models.network import Network

ARCHITECTURES = (
    attention_fusion.ARCHITECTURES
    | densenet.ARCHITECTURES
    | efficientnet.ARCHITECTURES
    | fhrnet.ARCHITECTURES
    | hrnet.ARCHITECTURES
    | resnet.ARCHITECTURES
    | sequential.ARCHITECTURES
)


def create(
    name: str,
    *,
    classes: int,
    dtype: Any = jnp.float32,
    remat: str = "none",
    seed: int = 0,
    input_spec: InputSpec | None = None,
    **options: Any,
) -> Backbone:
    """Build a network with random initial weights, which depend on the seed alone.

    Args:
      name: one of `ARCHITECTURES`.
      classes: number of findings K.
      dtype: compute type, bfloat16, float32 or float64 (name or type); parameters and batch statistics are float32
        (float64 with float64).
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: seed of the initial weights.
      input_spec: what the network expects of its images; None for the architecture's own.
      **options: options of the family, see its class; a dict updates entries of the architecture's own dict.

    Raises:
      CxrError: unknown name or option (the message names the nearest), or a value out of range.
    """
    architecture = ARCHITECTURES[check_choice("network", name, ARCHITECTURES)]
    check_options(name, options, architecture.family)
    nested = {
        option: {**architecture.options.get(option, {}), **changes}
        for option, changes in options.items()
        if isinstance(changes, dict)
    }
    common = CommonArgs(classes, input_spec or architecture.input_spec, compute_dtype(dtype), remat, seed)
    return architecture.family(common, **{**architecture.options, **options, **nested})


def abstract(name: str, *, classes: int, **options: Any) -> Network:
    """Return the network that `create` would build as shapes and types (`jax.ShapeDtypeStruct`), without values."""
    with skip_init():
        return jax.eval_shape(lambda: Network.from_model(create(name, classes=classes, **options)))
