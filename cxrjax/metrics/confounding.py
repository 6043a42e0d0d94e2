"""Tests for confounding by source: could a network have learned where an image comes from?

Where classes come from different collections, as Covid-19 from one and everything else from another, a network that
recognises the collection by its margins, letters or grey levels also separates the classes (Maguolo & Nanni, 2021;
DeGrave et al., Nature Machine Intelligence 2021).
"""

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxrjax.errors import CxrError
from cxrjax.metrics.predictions import Predictions, logits_from_probabilities

OTHER_SOURCES = "other sources"
"""The name of the pooled sources that have too few patients."""


def border_pixels(images: UInt8[np.ndarray, "N H W"], share: float = 0.05) -> Float32[np.ndarray, "N F"]:
    """Return the outer pixels of each image, 0 to 1: those within `share` of the side from an edge, at least one.

    The border shows hardly any lung, so what can be predicted from it is not a finding.

    Raises:
      CxrError: the share is not above 0 and below one half.
    """
    if not 0 < share < 0.5:
        raise CxrError(f"share={share}: give the width of the border as a fraction of the side, above 0 and below 0.5")
    height, width = images.shape[1:]
    dy, dx = max(1, round(share * height)), max(1, round(share * width))
    border = np.ones((height, width), bool)
    border[dy : height - dy, dx : width - dx] = False
    return images[:, border].astype(np.float32) / 255


def pool_rare_sources(source: np.ndarray, patient: np.ndarray, min_patients: int = 10) -> np.ndarray:
    """Return str[N] sources, with those of fewer than `min_patients` patients pooled, unless all would be."""
    names = np.asarray(source, np.str_)
    rare = [name for name in np.unique(names) if len(np.unique(patient[names == name])) < min_patients]
    if len(rare) == len(np.unique(names)):
        return names
    return np.where(np.isin(names, rare), OTHER_SOURCES, names)


def predict_source(
    features: Float[np.ndarray, "N F"],
    source: np.ndarray,
    *,
    id: np.ndarray,
    patient: np.ndarray,
    folds: int = 5,
    seed: int = 0,
) -> Predictions:
    """Predict each image's source from its features, in cross-validation over patients.

    The model is scikit-learn's logistic regression on standardised features. The AUROC of the result (`scores.score`)
    tells how well the source can be recognised: 0.5 not at all, 1 always.

    Args:
      features: finite.
      source: str[N], at least two sources.
      id: str[N], names of the images.
      patient: str[N].
      folds: of the cross-validation; fewer if a source has fewer patients.
      seed: of the folds.

    Returns:
      A table whose findings are the sources; of two sources, the second only.

    Raises:
      CxrError: there is only one source, or one with a single patient.
    """
    names, number = np.unique(source, return_inverse=True)
    if len(names) < 2:
        raise CxrError(f"images come from {len(names)} source ({', '.join(names)}): at least 2 are needed")
    patients = {str(name): len(np.unique(patient[source == name])) for name in names}
    rarest = min(patients, key=lambda name: patients[name])
    folds = min(folds, patients[rarest])
    if folds < 2:
        raise CxrError(f"source {rarest} has a single patient: cross-validation needs at least 2; pool it with others")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    probability = np.full((len(number), len(names)), np.nan)
    for train, test in splitter.split(features, number, patient):
        if len(np.unique(number[train])) < len(names):
            raise CxrError(f"source {rarest} has too few patients to be in every fold: pool it with others")
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        probability[test] = model.fit(features[train], number[train]).predict_proba(features[test])
    first = 1 if len(names) == 2 else 0
    label = number[:, None] == np.arange(first, len(names))
    return Predictions(
        id=id, patient=patient, findings=tuple(map(str, names[first:])),
        logit=logits_from_probabilities(probability[:, first:]),
        label=label.astype(np.float64), label_mask=np.ones(label.shape, bool),
    )  # fmt: skip


def majority_class_accuracy(
    source: np.ndarray, label: Shaped[np.ndarray, " N"], test_source: np.ndarray, test_label: Shaped[np.ndarray, " M"]
) -> float:
    """Return the accuracy, 0 to 1, of predicting the most frequent class of each image's source.

    Args:
      source: str[N] of the images on which classes are counted.
      label: their class indices.
      test_source: str[M] of the images to classify; an unseen source gets the most frequent class overall.
      test_label: their class indices.
    """
    overall = np.bincount(label).argmax()
    majority = {name: np.bincount(label[source == name]).argmax() for name in np.unique(source)}
    return float(np.mean([majority.get(name, overall) for name in test_source] == np.asarray(test_label)))
