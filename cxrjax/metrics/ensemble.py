"""Ensembles of models trained at different scales (resolutions).

- Stacking (the resolution study's equations 2 and 3): the probability is a weighted mean of the scales' probabilities,
  p_k = sum over s of w_ks sigmoid(l_ks), with w_k = softmax(v_k). v f64[K, S] starts at zero and minimises the binary
  cross-entropy of validation logits.
- Voting: the same with equal weights.
- Logistic stacking: a logistic regression of each finding on the scales' logits, which may also improve calibration.

The first two are computed in log space, so that confident models neither overflow nor lose their gradient. Every
finding is combined separately: of exclusive classes, only voting keeps probabilities that sum to 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped
from scipy.special import log_expit, logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from cxrjax.errors import CxrError
from cxrjax.metrics.auc import undefined_reason
from cxrjax.metrics.predictions import Predictions


class StackingFit(NamedTuple):
    """Weights f64[K, S], each row summing to 1, and the loss before each epoch and after the last, f64[epochs + 1]."""

    weights: Float64[np.ndarray, "K S"]
    loss: Float64[np.ndarray, " E"]


def fit_weights(
    logits: Float[np.ndarray, "S N K"],
    labels: Shaped[np.ndarray, "N K"],
    label_mask: Bool[np.ndarray, "N K"],
    *,
    learning_rate: float = 0.1,
    decay: float = 0.99,
    epochs: int = 100,
) -> StackingFit:
    """Fit the stacking weights of all findings.

    Adam (0.9, 0.999) with full batches, one step per epoch, at learning_rate * decay^epoch. The study states the
    learning rate, the epochs and "exponential decay"; the decay factor and full batches are this project's choice.

    Args:
      logits: of each scale on the validation images, finite.
      labels: 0 or 1.
      label_mask: which labels count. A finding without any keeps equal weights.
      learning_rate: of the first epoch, above 0.
      decay: factor per epoch, above 0 to 1.
      epochs: number of steps.

    Raises:
      CxrError: shapes do not fit, no label is known, a logit is not finite, or a setting is out of range.
    """
    logits, labels, label_mask = _check_arrays(logits, labels, label_mask)
    if not (learning_rate > 0 and 0 < decay <= 1 and epochs >= 0):
        raise CxrError(f"ensemble: learning_rate={learning_rate}, decay={decay}, epochs={epochs} are out of range")

    likelihood = MixtureLikelihood.from_logits(logits, labels, label_mask)
    v = np.zeros((logits.shape[2], logits.shape[0]))
    mean, square, losses = np.zeros_like(v), np.zeros_like(v), []
    for epoch in range(epochs):
        loss, gradient = likelihood.loss(v)
        losses.append(loss)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        step = (mean / (1 - 0.9 ** (epoch + 1))) / (np.sqrt(square / (1 - 0.999 ** (epoch + 1))) + 1e-8)
        v -= learning_rate * decay**epoch * step
    return StackingFit(softmax(v, axis=1), np.array([*losses, likelihood.loss(v)[0]]))


class MixtureLikelihood(NamedTuple):
    """The likelihood of each label under each scale alone, from which the mixture's loss follows.

    Attributes:
      relative: f64[K, S, N], a scale's probability of the true label divided by the best scale's; 0 where unknown.
      best: f64, the sum of the log probabilities of the best scales.
      label_mask: f64[K, N], 1 where a label counts.
    """

    relative: Float64[np.ndarray, "K S N"]
    best: float
    label_mask: Float64[np.ndarray, "K N"]

    @classmethod
    def from_logits(
        cls,
        logits: Float64[np.ndarray, "S N K"],
        labels: Shaped[np.ndarray, "N K"],
        label_mask: Bool[np.ndarray, "N K"],
    ) -> "MixtureLikelihood":
        """Compute it once for all epochs."""
        log_probability = log_expit(np.where(labels > 0, logits, -logits)).transpose(2, 0, 1)
        best = log_probability.max(axis=1)
        relative = np.exp(log_probability - best[:, None]) * label_mask.T[:, None]
        return cls(relative, float(best[label_mask.T].sum()), label_mask.T.astype(np.float64))

    def loss(self, v: Float64[np.ndarray, "K S"]) -> tuple[float, Float64[np.ndarray, "K S"]]:
        """Return the mixture's mean binary cross-entropy over the known labels, in nats, and its gradient in v.

        With r_s, a scale's share of the probability of the true label, the gradient is the mean of w_s - r_s.
        """
        weights = np.maximum(softmax(v, axis=1), 1e-300)
        mixture = np.einsum("ks,ksn->kn", weights, self.relative) + (1 - self.label_mask)  # log 1 = 0 where unknown
        count = self.label_mask.sum()
        share = weights * np.einsum("ksn,kn->ks", self.relative, 1 / mixture)
        gradient = (weights * self.label_mask.sum(axis=1, keepdims=True) - share) / count
        return float(-(self.best + np.log(mixture).sum()) / count), gradient


def stack(logits: Float[np.ndarray, "S N K"], weights: Float[np.ndarray, "K S"]) -> Float64[np.ndarray, "N K"]:
    """Return the logits of the weighted mean of the scales' probabilities.

    Raises:
      CxrError: the shapes do not fit, or a finding's weights are not positive fractions that sum to 1.
    """
    logits, weights = np.asarray(logits, np.float64), np.asarray(weights, np.float64)
    if logits.ndim != 3 or weights.shape != (logits.shape[2], logits.shape[0]):
        raise CxrError(f"ensemble: weights {weights.shape} do not fit logits {logits.shape}: give findings x scales")
    if not ((weights >= 0).all() and np.allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-6)):
        raise CxrError("ensemble: each finding's weights must be positive and sum to 1")
    share = weights.T[:, None, :]
    return logsumexp(log_expit(logits), axis=0, b=share) - logsumexp(log_expit(-logits), axis=0, b=share)


def vote(logits: Float[np.ndarray, "S N K"]) -> Float64[np.ndarray, "N K"]:
    """Return the logits of the unweighted mean of the scales' probabilities."""
    return stack(logits, np.full((logits.shape[2], logits.shape[0]), 1 / logits.shape[0]))


class LogisticStacking(NamedTuple):
    """Logistic regressions of K findings on the logits of S scales.

    Attributes:
      coefficients: f64[K, S], of the logits; 0 where `voted` gives a reason.
      intercept: f64[K].
      voted: K reasons why a finding is voted on instead, empty where it has a regression.
    """

    coefficients: Float64[np.ndarray, "K S"]
    intercept: Float64[np.ndarray, " K"]
    voted: tuple[str, ...]

    def combine(self, logits: Float[np.ndarray, "S N K"]) -> Float64[np.ndarray, "N K"]:
        """Return the logits of the regressions, or of voting where there is none."""
        regressed = np.einsum("ks,snk->nk", self.coefficients, logits) + self.intercept
        return np.where([not reason for reason in self.voted], regressed, vote(logits))


def fit_logistic(
    logits: Float[np.ndarray, "S N K"],
    labels: Shaped[np.ndarray, "N K"],
    label_mask: Bool[np.ndarray, "N K"],
    *,
    inverse_regularization: float = 1.0,
) -> LogisticStacking:
    """Fit a logistic regression of each finding on the scales' logits (scikit-learn's, by Newton's method).

    Args:
      logits: of each scale on the validation images, finite.
      labels: 0 or 1.
      label_mask: which labels count. A finding without both classes among them is voted on instead.
      inverse_regularization: scikit-learn's C. The ridge keeps coefficients finite where the scales separate the
        classes: the sum of the images' losses plus half the sum of squared coefficients over C is minimised.

    Raises:
      CxrError: shapes do not fit, no label is known, a logit is not finite, or C is not above 0.
    """
    logits, labels, label_mask = _check_arrays(logits, labels, label_mask)
    if not inverse_regularization > 0:
        raise CxrError(f"ensemble: inverse_regularization={inverse_regularization}: give a number above 0")
    scales, _, findings = logits.shape
    coefficients, intercept = np.zeros((findings, scales)), np.zeros(findings)
    voted = tuple(undefined_reason(labels[:, k], label_mask[:, k]) for k in range(findings))
    for k in range(findings):
        if not voted[k]:
            model = LogisticRegression(C=inverse_regularization, solver="newton-cholesky", tol=1e-10, max_iter=1000)
            model.fit(logits[:, label_mask[:, k], k].T, labels[label_mask[:, k], k] > 0)
            coefficients[k], intercept[k] = model.coef_[0], np.asarray(model.intercept_).item()
    return LogisticStacking(coefficients, intercept, voted)


def _check_arrays(
    logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits, labels, label_mask = np.asarray(logits, np.float64), np.asarray(labels), np.asarray(label_mask, bool)
    if logits.ndim != 3 or logits.shape[1:] != labels.shape or labels.shape != label_mask.shape:
        shapes = f"logits {logits.shape}, labels {labels.shape} and mask {label_mask.shape}"
        raise CxrError(f"ensemble: {shapes} do not fit: give S x N x K logits, N x K labels and mask")
    if not label_mask.any():
        raise CxrError("ensemble: no label is known to fit the weights on")
    if not np.isfinite(logits).all():
        raise CxrError(f"ensemble: a logit of scale {np.argwhere(~np.isfinite(logits))[0][0] + 1} is not finite")
    return logits, labels, label_mask


def align(tables: Sequence[Predictions]) -> list[Predictions]:
    """Reorder tables of the same images and findings like the first one.

    Raises:
      CxrError: there are none, or they differ in images, findings, patients or labels.
    """
    if not tables:
        raise CxrError("no predictions are given")
    first = tables[0]
    aligned = [first]
    for number, table in enumerate(tables[1:], 2):
        if set(table.findings) != set(first.findings):
            differing = sorted(set(table.findings) ^ set(first.findings))
            raise CxrError(f"predictions: table {number} and the first differ in findings: {', '.join(differing)}")
        differing = np.setxor1d(table.id, first.id)
        if len(differing):
            examples = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
            raise CxrError(
                f"predictions: table {number} and the first differ in {len(differing):,} images ({examples}); "
                "predict the same images with every model"
            )
        order = np.argsort(table.id)
        aligned.append(table.take(order[np.searchsorted(table.id, first.id, sorter=order)]).select(first.findings))
        _check_same_labels(aligned[-1], first, number)
    return aligned


def _check_same_labels(table: Predictions, first: Predictions, number: int) -> None:
    differ = (table.label_mask != first.label_mask) | (first.label_mask & (table.label != first.label))
    differ |= (table.patient != first.patient)[:, None]
    if differ.any():
        row, k = np.argwhere(differ)[0]
        raise CxrError(
            f"predictions: table {number} and the first differ in the patient or the label of {first.id[row]}, "
            f"{first.findings[k]}; predict the same prepared data with every model"
        )


def combine(
    tables: Sequence[Predictions], fitted: Float[np.ndarray, "K S"] | LogisticStacking | None = None
) -> Predictions:
    """Return the ensemble's predictions, by stacking weights, by logistic stacking, or by voting if None.

    Raises:
      CxrError: as `align` and `stack` raise.
    """
    tables = align(tables)
    logits = np.stack([table.logit for table in tables])
    if fitted is None:
        return replace(tables[0], logit=vote(logits))
    stacked = fitted.combine(logits) if isinstance(fitted, LogisticStacking) else stack(logits, fitted)
    return replace(tables[0], logit=stacked)
