"""Sources are predicted from the border if and only if it is marked, across patients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cxrjax.errors import CxrError
from cxrjax.metrics.scores import score
from cxrjax.metrics.subgroups import (
    OTHER_SOURCES,
    border_pixels,
    majority_class_accuracy,
    pool_rare_sources,
    predict_source,
)

COUNT = 120
PATIENT = np.array([f"p{k // 2}" for k in range(COUNT)])
ID = np.array([f"image {k}" for k in range(COUNT)])
SOURCE = np.where(np.random.default_rng(5).random(COUNT // 2).repeat(2) < 0.4, "clinic", "hospital")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@given(st.integers(4, 60), st.integers(4, 60))
def test_the_border_excludes_the_middle(height, width):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width)).astype(np.uint8)
    down, across = max(1, round(0.05 * height)), max(1, round(0.05 * width))
    middle = images[:, down : height - down, across : width - across]
    outer = border_pixels(images)
    assert outer.shape[1] == height * width - middle[0].size
    np.testing.assert_allclose(
        outer.sum(1) * 255, images.sum((1, 2), dtype=np.int64) - middle.sum((1, 2), dtype=np.int64), rtol=1e-5
    )


@pytest.mark.parametrize(("mark", "low", "high"), [(55, 0.95, 1.0), (0, 0.3, 0.7)])
def test_a_mark_in_the_border_is_detected(rng, mark, low, high):
    images = rng.integers(0, 200, (COUNT, 20, 20)).astype(np.uint8)
    images[SOURCE == "clinic", 0] += np.uint8(mark)
    table = predict_source(border_pixels(images), SOURCE, id=ID, patient=PATIENT)
    assert table.findings == ("hospital",)
    result = score(table, resamples=20).findings[0]
    assert low <= result.auroc <= high
    assert result.auroc == pytest.approx(roc_auc_score(SOURCE == "hospital", table.logit[:, 0]))


def test_patient_identity_does_not_leak(rng):
    codes = rng.normal(size=(COUNT // 2, 60)).repeat(2, axis=0)  # both images of a patient are alike, no two patients
    table = predict_source(codes, SOURCE, id=ID, patient=PATIENT)
    assert roc_auc_score(SOURCE == "hospital", table.logit[:, 0]) < 0.7
    leaking = predict_source(codes, SOURCE, id=ID, patient=ID)
    assert roc_auc_score(SOURCE == "hospital", leaking.logit[:, 0]) > 0.9


def test_rare_sources_are_pooled_and_each_source_is_a_finding(rng):
    source = np.where(np.arange(COUNT) < 6, "tiny", np.where(np.arange(COUNT) < 12, "small", SOURCE))
    pooled = pool_rare_sources(source, PATIENT, min_patients=5)
    assert set(pooled) == {OTHER_SOURCES, "clinic", "hospital"}
    assert (pooled == OTHER_SOURCES).sum() == 12
    table = predict_source(rng.normal(size=(COUNT, 3)), pooled, id=ID, patient=PATIENT)
    assert table.findings == ("clinic", "hospital", OTHER_SOURCES)
    np.testing.assert_allclose(table.probability.sum(1), 1, atol=1e-9)


def test_sources_are_not_pooled_if_all_are_rare():
    assert set(pool_rare_sources(SOURCE, PATIENT, min_patients=COUNT)) == {"clinic", "hospital"}


def test_impossible_predictions_are_refused():
    features = np.zeros((COUNT, 2))
    with pytest.raises(CxrError, match=r"come from 1 source \(here\)"):
        predict_source(features, np.full(COUNT, "here"), id=ID, patient=PATIENT)
    once = np.where(np.arange(COUNT) < 2, "once", "often")
    with pytest.raises(CxrError, match="source once has a single patient"):
        predict_source(features, once, id=ID, patient=PATIENT)


def test_majority_class_accuracy():
    source, label = np.array(["a", "a", "a", "b", "b"]), np.array([2, 2, 1, 0, 0])
    other = np.array(["a", "b", "b", "c"])
    # a -> 2, b -> 0, unseen -> the commonest of all, of equals the first: 0
    assert majority_class_accuracy(source, label, other, np.array([2, 0, 1, 0])) == 0.75
