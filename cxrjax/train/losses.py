"""Losses over findings that are not exclusive; what is unknown or padding costs nothing."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


def masked_bce(
    logits: Float[Array, "B K"], label: Float[Array, "B K"], known: Bool[Array, "B K"], valid: Bool[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Binary cross-entropy summed over known labels of valid images, and how many there are.

    Returns sums, so that accumulated and sharded batches have one mean: `total / max(count, 1)`.

    Args:
      logits: any finite value; the loss is finite and exact in the tails (softplus form).
      label: 0 to 1 (soft labels allowed).
      known: false where the label is to be ignored.
      valid: false where the image is padding.
    """
    counts = (known & valid[:, None]).astype(logits.dtype)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype)) * counts), jnp.sum(counts)
