"""Ensembles of models that differ in scale: each finding's probability is a weighted mean of the models' probabilities.

The stacked ensemble (the resolution study's equations 2 and 3) learns v f64[K, S] from zeros, w_k = softmax(v_k),
p_k = sum over s of w_ks sigmoid(l_ks), by minimising binary cross-entropy on validation logits. Voting has equal
weights. Both are computed from logs of probabilities, so that certain models neither overflow nor lose their gradient.
Logistic stacking is a logistic regression of each finding on the scales' logits, which may also mend their calibration.

A finding is combined by itself. Of exclusive classes, voting keeps probabilities that add up to 1; the others do not.
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
    rate: float = 0.1,
    decay: float = 0.99,
    epochs: int = 100,
) -> StackingFit:
    """Learn how far each finding should trust each scale, all findings at once.

    Adam (0.9, 0.999) on the whole set, one step an epoch, at rate x decay^epoch. The study gives the rate, the epochs
    and "exponential decay"; the decay's factor and full batches are this project's choice.

    Args:
      logits: of each scale on the validation images, finite.
      labels: 0 or 1.
      label_mask: which labels count. A finding without any keeps equal weights.
      rate: first learning rate, above 0.
      decay: of the rate from epoch to epoch, above 0 to 1.
      epochs: number of steps.

    Raises:
      CxrError: shapes do not fit, no label is known, a logit is not finite, or a setting is out of range.
    """
    logits, labels, label_mask = _checked(logits, labels, label_mask)
    if not (rate > 0 and 0 < decay <= 1 and epochs >= 0):
        raise CxrError(f"ensemble: rate={rate}, decay={decay}, epochs={epochs} are out of range")

    likelihood = MixtureLikelihood.from_logits(logits, labels, label_mask)
    v = np.zeros((logits.shape[2], logits.shape[0]))
    moment, square, losses = np.zeros_like(v), np.zeros_like(v), []
    for epoch in range(epochs):
        loss, gradient = likelihood.loss(v)
        losses.append(loss)
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        step = (moment / (1 - 0.9 ** (epoch + 1))) / (np.sqrt(square / (1 - 0.999 ** (epoch + 1))) + 1e-8)
        v -= rate * decay**epoch * step
    return StackingFit(softmax(v, axis=1), np.array([*losses, likelihood.loss(v)[0]]))


class MixtureLikelihood(NamedTuple):
    """How well each scale alone predicts each label, which is all that the fit needs to know.

    Attributes:
      relative: f64[K, S, N], the probability a scale gives the true label, over the best scale's; 0 where unknown.
      best: f64, the sum of the logs of the best scales' probabilities.
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
        """Mean binary cross-entropy of the mixture over the known labels, in nats, and its gradient by v.

        With r_s, a scale's share of the probability given to the true label, the gradient is the mean of w_s - r_s.
        """
        weights = np.maximum(softmax(v, axis=1), 1e-300)
        mixture = np.einsum("ks,ksn->kn", weights, self.relative) + (1 - self.label_mask)  # log 1 = 0 where unknown
        count = self.label_mask.sum()
        share = weights * np.einsum("ksn,kn->ks", self.relative, 1 / mixture)
        gradient = (weights * self.label_mask.sum(axis=1, keepdims=True) - share) / count
        return float(-(self.best + np.log(mixture).sum()) / count), gradient


def stack(logits: Float[np.ndarray, "S N K"], weights: Float[np.ndarray, "K S"]) -> Float64[np.ndarray, "N K"]:
    """The logits of the mixture, log p - log(1 - p) with p = sum over scales of weight x probability.

    Args:
      logits: of each scale.
      weights: >= 0; each finding's sum to 1.

    Raises:
      CxrError: the weights are not S positive shares of 1 for each of K findings.
    """
    logits, weights = np.asarray(logits, np.float64), np.asarray(weights, np.float64)
    if logits.ndim != 3 or weights.shape != (logits.shape[2], logits.shape[0]):
        raise CxrError(f"ensemble: weights {weights.shape} do not fit logits {logits.shape}: give findings x scales")
    if not ((weights >= 0).all() and np.allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-6)):
        raise CxrError("ensemble: each finding's weights must be positive and sum to 1")
    share = weights.T[:, None, :]
    return logsumexp(log_expit(logits), axis=0, b=share) - logsumexp(log_expit(-logits), axis=0, b=share)


def vote(logits: Float[np.ndarray, "S N K"]) -> Float64[np.ndarray, "N K"]:
    """The logits of the plain mean of the scales' probabilities."""
    return stack(logits, uniform(logits.shape[2], logits.shape[0]))


def uniform(findings: int, scales: int) -> Float64[np.ndarray, "K S"]:
    """Equal weights."""
    return np.full((findings, scales), 1 / scales)


class LogisticStacking(NamedTuple):
    """Logistic regressions of K findings on the logits of S scales.

    Attributes:
      coefficients: f64[K, S], of the logits; 0 where `voted` says why.
      intercept: f64[K].
      voted: K reasons why a finding has no regression and is voted on, empty where it has one.
    """

    coefficients: Float64[np.ndarray, "K S"]
    intercept: Float64[np.ndarray, " K"]
    voted: tuple[str, ...]

    def combine(self, logits: Float[np.ndarray, "S N K"]) -> Float64[np.ndarray, "N K"]:
        """The logits of the regressions, and of voting where there is none."""
        regressed = np.einsum("ks,snk->nk", self.coefficients, logits) + self.intercept
        return np.where([not reason for reason in self.voted], regressed, vote(logits))


def fit_logistic(
    logits: Float[np.ndarray, "S N K"],
    labels: Shaped[np.ndarray, "N K"],
    label_mask: Bool[np.ndarray, "N K"],
    *,
    strength: float = 1.0,
) -> LogisticStacking:
    """Logistic stacking: a regression of each finding on the scales' logits (scikit-learn's, by Newton's method).

    Args:
      logits: of each scale on the validation images, finite.
      labels: 0 or 1.
      label_mask: which labels count. A finding without both classes among them is voted on instead.
      strength: of the ridge that keeps coefficients finite where the scales separate the classes, as scikit-learn has
        it: the sum of the images' losses plus half the sum of squared coefficients over `strength` is minimised.

    Raises:
      CxrError: shapes do not fit, no label is known, a logit is not finite, or the strength is not above 0.
    """
    logits, labels, label_mask = _checked(logits, labels, label_mask)
    if not strength > 0:
        raise CxrError(f"ensemble: strength={strength} is out of range: give a number above 0")
    scales, _, findings = logits.shape
    coefficients, intercept = np.zeros((findings, scales)), np.zeros(findings)
    voted = tuple(undefined_reason(labels[:, k], label_mask[:, k]) for k in range(findings))
    for k in range(findings):
        if not voted[k]:
            model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=1000)
            model.fit(logits[:, label_mask[:, k], k].T, labels[label_mask[:, k], k] > 0)
            coefficients[k], intercept[k] = model.coef_[0], np.asarray(model.intercept_).item()
    return LogisticStacking(coefficients, intercept, voted)


def _checked(
    logits: np.ndarray, labels: np.ndarray, label_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits, labels, label_mask = np.asarray(logits, np.float64), np.asarray(labels), np.asarray(label_mask, bool)
    if logits.ndim != 3 or logits.shape[1:] != labels.shape or labels.shape != label_mask.shape:
        raise CxrError(f"ensemble: logits {logits.shape} are not scales x the shape of labels {labels.shape} and known")
    if not label_mask.any():
        raise CxrError("ensemble: no label is known, so there is nothing to learn the weights from")
    if not np.isfinite(logits).all():
        raise CxrError(f"ensemble: a logit of scale {np.argwhere(~np.isfinite(logits))[0][0] + 1} is not finite")
    return logits, labels, label_mask


def align(tables: Sequence[Predictions]) -> list[Predictions]:
    """Bring predictions of the same images and findings into the order of the first table.

    Raises:
      CxrError: there are none, or they differ in images, findings, patients or labels; the message names the first.
    """
    if not tables:
        raise CxrError("no predictions are given")
    first = tables[0]
    aligned = [first]
    for number, table in enumerate(tables[1:], 2):
        if set(table.findings) != set(first.findings):
            odd = sorted(set(table.findings) ^ set(first.findings))
            raise CxrError(f"predictions: table {number} and the first differ in findings: {', '.join(odd)}")
        odd = np.setxor1d(table.id, first.id)
        if len(odd):
            raise CxrError(
                f"predictions: table {number} and the first differ in {len(odd):,} images ({', '.join(odd[:3])}"
                f"{', ...' if len(odd) > 3 else ''}); predict the same images with every model"
            )
        order = np.argsort(table.id)
        aligned.append(table.take(order[np.searchsorted(table.id, first.id, sorter=order)]).select(first.findings))
        _same_truth(aligned[-1], first, number)
    return aligned


def combine(tables: Sequence[Predictions], learnt: Float[np.ndarray, "K S"] | LogisticStacking | None = None) -> Predictions:
    """The ensemble's own predictions: by these weights, by these regressions, or by voting.

    Raises:
      CxrError: what `align` and `stack` raise.
    """
    tables = align(tables)
    logits = np.stack([table.logit for table in tables])
    if learnt is None:
        return replace(tables[0], logit=vote(logits))
    return replace(tables[0], logit=learnt.combine(logits) if isinstance(learnt, LogisticStacking) else stack(logits, learnt))


def _same_truth(table: Predictions, first: Predictions, number: int) -> None:
    differ = (table.label_mask != first.label_mask) | (first.label_mask & (table.label != first.label))
    differ |= (table.patient != first.patient)[:, None]
    if differ.any():
        row, k = np.argwhere(differ)[0]
        raise CxrError(
            f"predictions: table {number} and the first differ in the patient or the label of {first.id[row]}, "
            f"{first.findings[k]}; evaluate every model on the same prepared data"
        )
