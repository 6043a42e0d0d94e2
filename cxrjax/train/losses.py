"""Masked losses over findings, exclusive or not. Unknown labels and padding do not count.

Each returns a sum and its number of terms, so that accumulated and sharded batches have one mean,
`total / max(count, 1)`. All are computed from logits in at least float32, so that confident networks neither overflow
nor lose their gradient.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float64, Shaped

from cxrjax.errors import CxrError, check_choice


@dataclass(frozen=True)
class Loss:
    """A loss of logits against labels.

    Attributes:
      terms: `(logits f[B, K], label f[B, K]) -> f[B, K]`, the loss of each label; f[B, 1], of each image, with softmax.
      exclusive: whether the K findings are classes of which an image has exactly one.
      softmax: whether the probabilities of an image are the softmax of its logits, else the sigmoid.
    """

    terms: Callable[[Float[Array, "B K"], Float[Array, "B K"]], Float[Array, "B k"]]
    exclusive: bool = False
    softmax: bool = False

    def __call__(
        self,
        logits: Float[Array, "B K"],
        label: Float[Array, "B K"],
        label_mask: Bool[Array, "B K"],
        example_mask: Bool[Array, " B"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the sum of the loss terms and their number, in float32, or float64 if the logits are.

        Args:
          logits: any finite value.
          label: 0 to 1 (soft labels allowed); each row sums to 1 if the classes are exclusive.
          label_mask: false where the label is ignored; with softmax an image needs all its labels.
          example_mask: false where the image is padding.
        """
        logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
        terms, counts = self.terms(logits, label.astype(logits.dtype)), self.counts(label_mask, example_mask)
        return jnp.sum(terms, where=counts), jnp.sum(counts, dtype=terms.dtype)

    def counts(self, label_mask: Bool[Array, "B K"], example_mask: Bool[Array, " B"]) -> Bool[Array, "B k"]:
        """Return which terms count: labels [B, K], or images [B, 1] with softmax."""
        return (jnp.all(label_mask, axis=1, keepdims=True) if self.softmax else label_mask) & example_mask[:, None]

    def accuracy(
        self, logits: Float[np.ndarray, "N K"], label: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
    ) -> float:
        """Return the accuracy over known labels at a threshold of 0.5; NaN if no label is known.

        For exclusive classes, it is the fraction of images whose class has the highest probability.
        """
        if self.exclusive:
            correct, counts = logits.argmax(1) == label.argmax(1), label_mask.all(1)
        else:
            from cxrjax.metrics.predictions import softmax_log_odds  # needs pyarrow, which a step does not

            odds = softmax_log_odds(logits) if self.softmax else logits
            correct, counts = (odds > 0) == (label > 0.5), label_mask
        return float(correct[counts].mean()) if counts.any() else float("nan")

    def mean(
        self, logits: Float[np.ndarray, "N K"], label: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
    ) -> float:
        """Return the mean loss of a whole table, in float64; NaN if no label is known."""
        with jax.enable_x64(True):
            arrays = (jnp.asarray(logits, jnp.float64), jnp.asarray(label, jnp.float64), jnp.asarray(label_mask, bool))
            total, count = self(*arrays, jnp.ones(len(logits), bool))
            return float(total) / float(count) if count > 0 else float("nan")


def make_loss(name: str, *, prevalence: Shaped[np.ndarray, " K"] | None = None, **options: Any) -> Loss:
    """Return a loss by name.

    - `bce`: binary cross-entropy of each finding.
    - `weighted_bce`: the same with weights w_p for positive and w_n for negative labels of each finding. Option
      `weighting`: "counter" (default) counters imbalance, w_p = frequency of negatives and w_n = frequency of
      positives; "literal" swaps them.
    - `focal`: -alpha (1 - p_t)^gamma log p_t (Lin et al., ICCV 2017). Options `alpha` (0.25), `gamma` (2.0), and
      `weighting`: "uniform" (default), the same alpha for every label, or "balanced", alpha for positive labels and
      1 - alpha for negative ones.
    - `cross_entropy`: categorical, softmax over exclusive classes; its mean is over images.
    - `softmax`: the same for findings that are not exclusive, the sum of -log p over an image's positive labels
      (FHRNet's equations 6 to 9, literally); an image without positive labels has no gradient.

    Args:
      name: one of the above.
      prevalence: of each finding in training, see `label_prevalence`; only `weighted_bce` needs it.
      options: of the loss.

    Raises:
      CxrError: unknown loss or option, or a value out of range.
    """
    make, defaults = _LOSSES[check_choice("loss", name, _LOSSES)]
    for option in options:
        check_choice(f"option of the loss {name}", option, defaults)
    if name == "weighted_bce":
        return make(prevalence=prevalence, **defaults | options)
    return make(**defaults | options)


def label_prevalence(
    label: Shaped[np.ndarray, "N K"], label_mask: Bool[np.ndarray, "N K"]
) -> Float64[np.ndarray, " K"]:
    """Return each finding's mean label over the known ones; 0.5, a neutral weight, if none is known."""
    count = np.count_nonzero(label_mask, axis=0)
    total = np.sum(label, axis=0, where=label_mask, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), 0.5)


def _bce() -> Loss:
    return Loss(optax.sigmoid_binary_cross_entropy)


def _weighted_bce(prevalence: Shaped[np.ndarray, " K"] | None, weighting: str) -> Loss:
    check_choice("weighting of the loss weighted_bce", weighting, ("counter", "literal"))
    if prevalence is None:
        raise CxrError("the loss weighted_bce needs the prevalence of each finding")
    positives = np.asarray(prevalence, np.float64)
    if positives.ndim != 1 or not ((positives >= 0) & (positives <= 1)).all():
        raise CxrError(f"prevalence {positives} is not one fraction from 0 to 1 per finding")
    positive_weight, negative_weight = (
        (1 - positives, positives) if weighting == "counter" else (positives, 1 - positives)
    )

    def terms(logits: Float[Array, "B K"], label: Float[Array, "B K"]) -> Float[Array, "B K"]:
        w_p, w_n = (jnp.asarray(weight, logits.dtype)[None] for weight in (positive_weight, negative_weight))
        return -w_p * label * jax.nn.log_sigmoid(logits) - w_n * (1 - label) * jax.nn.log_sigmoid(-logits)

    return Loss(terms)


def _focal(alpha: float, gamma: float, weighting: str) -> Loss:
    check_choice("weighting of the loss focal", weighting, ("uniform", "balanced"))
    are_numbers = all(isinstance(value, int | float) for value in (alpha, gamma))
    if not (are_numbers and 0 < alpha <= 1 and 0 <= gamma < np.inf):
        raise CxrError(
            f"the loss focal needs alpha in (0, 1] and gamma of at least 0, not alpha={alpha}, gamma={gamma}"
        )

    def terms(logits: Float[Array, "B K"], label: Float[Array, "B K"]) -> Float[Array, "B K"]:
        if weighting == "balanced":
            return optax.sigmoid_focal_loss(logits, label, alpha=alpha, gamma=gamma)
        return alpha * optax.sigmoid_focal_loss(logits, label, gamma=gamma)

    return Loss(terms)


def _cross_entropy() -> Loss:
    return dataclasses.replace(_softmax(), exclusive=True)


def _softmax() -> Loss:
    return Loss(lambda logits, label: optax.softmax_cross_entropy(logits, label)[:, None], softmax=True)


_LOSSES: dict[str, tuple[Callable[..., Loss], dict[str, Any]]] = {
    "bce": (_bce, {}),
    "weighted_bce": (_weighted_bce, {"weighting": "counter"}),
    "focal": (_focal, {"alpha": 0.25, "gamma": 2.0, "weighting": "uniform"}),
    "cross_entropy": (_cross_entropy, {}),
    "softmax": (_softmax, {}),
}
LOSSES = tuple(_LOSSES)
"""The names that `make_loss` accepts."""

masked_bce = make_loss("bce")
"""Binary cross-entropy over the known labels of images that are not padding."""
