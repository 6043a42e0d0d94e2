"""Could a network have learnt where an image comes from, and not what it shows?

Where classes come from different collections, as Covid-19 from one and all else from another, a network that tells the
collections apart by their margins, letters or grey levels tells the classes apart (Maguolo & Nanni, 2021; DeGrave et
al., Nature Machine Intelligence 2021).
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
"""What sources of too few patients are pooled under."""


def border_pixels(images: UInt8[np.ndarray, "N H W"], share: float = 0.05) -> Float32[np.ndarray, "N F"]:
    """The outer pixels of each image, 0 to 1: those within `share` of the side of an edge, at least one.

    There is hardly any lung here, so what can be predicted from it is no finding.

    Raises:
      CxrError: the share is not above 0 and below one half.
    """
    if not 0 < share < 0.5:
        raise CxrError(f"share={share}: give the width of the border as a fraction of the side, above 0 and below 0.5")
    height, width = images.shape[1:]
    down, across = max(1, round(share * height)), max(1, round(share * width))
    outer = np.ones((height, width), bool)
    outer[down : height - down, across : width - across] = False
    return images[:, outer].astype(np.float32) / 255


def pool_rare_sources(source: np.ndarray, patient: np.ndarray, least: int = 10) -> np.ndarray:
    """Sources, those of fewer than `least` patients under one name, unless that leaves one only; str[N]."""
    names = np.asarray(source, np.str_)
    few = [name for name in np.unique(names) if len(np.unique(patient[names == name])) < least]
    if len(few) == len(np.unique(names)):
        return names
    return np.where(np.isin(names, few), OTHER_SOURCES, names)


def predict_source(
    features: Float[np.ndarray, "N F"],
    source: np.ndarray,
    *,
    id: np.ndarray,
    patient: np.ndarray,
    folds: int = 5,
    seed: int = 0,
) -> Predictions:
    """Predict each image's source from its features, by images of other patients.

    Logistic regression of scikit-learn, on features brought to mean 0 and variance 1, in cross-validation over
    patients. The AUROC of the result (`scores.score`) says how well the source can be told: 0.5 not at all, 1 always.

    Args:
      features: finite.
      source: str[N], two sources at least.
      id: str[N], names of the images.
      patient: str[N].
      folds: of the cross-validation; fewer where a source has fewer patients.
      seed: of the folds.

    Returns:
      A table whose findings are the sources; of two, the second only.

    Raises:
      CxrError: there is one source only, or one with a single patient.
    """
    names, number = np.unique(source, return_inverse=True)
    if len(names) < 2:
        raise CxrError(f"all images come from {', '.join(names) or 'nowhere'}: there is no source to tell")
    patients = {str(name): len(np.unique(patient[source == name])) for name in names}
    rarest = min(patients, key=lambda name: patients[name])
    folds = min(folds, patients[rarest])
    if folds < 2:
        raise CxrError(f"source {rarest} has a single patient: whether it can be told apart cannot be tried")
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
        id=id, patient=patient, findings=tuple(map(str, names[first:])), logit=logits_from_probabilities(probability[:, first:]),
        label=label.astype(np.float64), label_mask=np.ones(label.shape, bool),
    )  # fmt: skip


def majority_class_accuracy(
    source: np.ndarray, label: Shaped[np.ndarray, " N"], other_source: np.ndarray, other_label: Shaped[np.ndarray, " M"]
) -> float:
    """How many images one gets right by saying each time the commonest class of its source; 0 to 1.

    Args:
      source: str[N] of the images that the commonest classes are counted on.
      label: class numbers of these.
      other_source: str[M] of the images to be guessed; of a source not seen before, the commonest class of all.
      other_label: their class numbers.
    """
    of_all = np.bincount(label).argmax()
    guesses = {name: np.bincount(label[source == name]).argmax() for name in np.unique(source)}
    return float(np.mean([guesses.get(name, of_all) for name in other_source] == np.asarray(other_label)))
