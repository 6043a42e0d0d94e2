"""From the last feature maps to one logit per finding."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, one_of, positive, share
from cxrjax.models.layers import LayerFactory, Maps, param_dtype

SHARPNESS = 10.0  # of log-sum-exp pooling: towards 0 it is the mean, towards infinity the maximum


def _log_sum_exp(maps: Maps) -> Float[Array, "B C"]:
    """Between mean and maximum: log(mean(exp(r x))) / r (Wang et al. 2017, arXiv:1705.02315, eq. 2)."""
    positions = maps.shape[1] * maps.shape[2]
    return (jax.nn.logsumexp(SHARPNESS * maps, axis=(1, 2)) - math.log(positions)) / SHARPNESS


def _largest(maps: Maps) -> Float[Array, "B C"]:
    """The largest value of each channel; of equal ones the first has the gradient.

    (The gradient of `jnp.max` compares the result with the maps, and divides by 0 where these were computed anew and
    rounded otherwise.)
    """
    values = maps.reshape(len(maps), -1, maps.shape[-1])
    place = jnp.argmax(values, axis=1)[:, None]
    there = jnp.arange(values.shape[1], dtype=place.dtype)[None, :, None] == place
    return jnp.where(there, values, jnp.zeros_like(values)).sum(1)


POOLINGS = {
    "average": lambda maps: maps.mean((1, 2)),
    "max": _largest,
    "average+max": lambda maps: jnp.concatenate([maps.mean((1, 2)), _largest(maps)], axis=-1),
    "log-sum-exp": _log_sum_exp,
}


def drop(values: Float[Array, "B ..."], rate: float, key: PRNGKeyArray | None, place: int) -> Float[Array, "B ..."]:
    """Dropout: a share of the values becomes 0, and the rest grows so that the mean stays; no key, no dropout.

    Args:
      values: of any shape.
      rate: share of values dropped, 0 <= rate < 1.
      key: the network's, common to all its places of dropout.
      place: which of them this is.
    """
    if key is None or not rate:
        return values
    keep = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, values.shape)
    return jnp.where(keep, values / (1 - rate), jnp.zeros_like(values))


class Classifier(nnx.Module):
    """Global pooling, dropout, an optional hidden layer (ReLU, dropout), and a logit per finding.

    It computes in float32 at least, whatever the type of the maps.

    Args:
      make: maker of the network's layers.
      channels: of the maps.
      classes: number of findings.
      pooling: "average", "max", "average+max" (both, concatenated) or "log-sum-exp".
      hidden: units of the hidden layer; 0 for none.
      dropout: share of values dropped, 0 <= dropout < 1.
    """

    def __init__(
        self,
        make: LayerFactory,
        channels: int,
        classes: int,
        *,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        self.pooling = one_of("pooling", pooling, POOLINGS)
        self.dropout = share("dropout", dropout)
        channels *= 2 if pooling == "average+max" else 1
        self.hidden = nnx.data(None)
        if hidden:
            self.hidden = make.linear(channels, positive("hidden", hidden))
            channels = hidden
        self.output = make.linear(channels, positive("classes", classes))

    def __call__(self, maps: Maps, *, train: bool, key: PRNGKeyArray | None = None) -> Float[Array, "B K"]:
        """Logits; dropout is active where a key is given: in training, and for Monte Carlo dropout.

        Raises:
          CxrError: training a network that has dropout, without a key.
        """
        if train and self.dropout and key is None:
            raise CxrError("training with dropout needs a random key: pass key=")
        vector = POOLINGS[self.pooling](maps.astype(param_dtype(maps.dtype)))
        vector = drop(vector, self.dropout, key, 0)
        if self.hidden is not None:
            vector = drop(nnx.relu(self.hidden(vector)), self.dropout, key, 1)
        return self.output(vector)
