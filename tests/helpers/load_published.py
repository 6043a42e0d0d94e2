"""Networks filled in place with published weights."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.models.backbone import Backbone
from cxrjax.weights.published import FittedWeights, fit_published


def load_published(model: Backbone, state_dict: Mapping[str, np.ndarray], **options) -> FittedWeights:
    """Fill a network; on an error it stays as it was, and skipped modules keep their values."""
    fitted = fit_published(model, state_dict, **options)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        if (name := tuple(map(str, path))) in fitted.arrays:
            variable[...] = jnp.array(fitted.arrays[name])  # a copy: the array may be a view of a file
    return fitted
