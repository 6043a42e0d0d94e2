"""Confusion matrices and per-class reports against scikit-learn and the six-class paper's printed table."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cxrjax.errors import CxrError
from cxrjax.findings import SIX_CLASS
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.thresholds import REPORT_COLUMNS, ConfusionCounts, ConfusionMatrix

# A matrix (rows actual) with the paper's supports, hits and numbers of predictions per class; which class is mistaken
# for which is not printed and does not enter the report.
PAPER = ConfusionMatrix(
    SIX_CLASS,
    np.array(
        [
            [61, 0, 15, 4, 0, 0], [0, 126, 0, 0, 4, 10], [0, 25, 111, 0, 0, 0],
            [2, 0, 15, 94, 71, 0], [1, 6, 0, 0, 129, 0], [0, 0, 0, 0, 3, 142],
        ]
    ),
)  # fmt: skip


def test_the_papers_table_is_reproduced(shared):
    paper = json.loads((shared / "papers" / "tables.json").read_text())["sequential_cnn"]
    support = np.array(list(paper["support"].values()))
    printed = {name: np.array(list(row.values())) for name, row in paper["report"].items()}
    total = support.sum()
    hits = np.rint(printed["sensitivity"] * support).astype(int)
    called = np.rint(printed["detection_prevalence"] * total).astype(int)
    counts = ConfusionCounts(tp=hits, fp=called - hits, fn=support - hits, tn=total - called - support + hits)
    assert len(printed) == 9
    for name, row in printed.items():
        np.testing.assert_allclose(counts.rates()[name], row, rtol=0, atol=5.1e-8, err_msg=name)
    for name in ("tp", "fp", "fn", "tn"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(PAPER.counts, name))
    assert PAPER.accuracy == pytest.approx(paper["accuracy"]["test"], abs=5e-8)


def test_the_papers_report_from_a_matrix():
    rows = PAPER.report()
    assert [row["class"] for row in rows] == list(SIX_CLASS)
    assert all(tuple(row) == ("class", *REPORT_COLUMNS, "support") for row in rows)
    covid = [0.7625, 0.9959405, 0.953125, 0.9748344, 0.953125, 0.7625, 0.8472222, 0.0976801, 0.0744811, 0.0781441]
    np.testing.assert_allclose([rows[0][name] for name in REPORT_COLUMNS], [*covid, 0.8792202], atol=5e-8)  # as printed
    assert [row["support"] for row in rows] == [80, 140, 136, 182, 136, 145]
    assert round(PAPER.accuracy, 7) == 0.8095238
    assert round(PAPER.balanced_accuracy, 3) == 0.891


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@settings(deadline=None)
@given(pairs)
def test_matches_sklearn(rows):
    actual, predicted = np.array(rows).T
    confusion = ConfusionMatrix.from_classes(actual, predicted, "abcd")
    expected = metrics.confusion_matrix(actual, predicted, labels=range(4))
    np.testing.assert_array_equal(confusion.matrix, expected)
    np.testing.assert_array_equal(confusion.oriented("actual"), expected)
    np.testing.assert_array_equal(confusion.oriented("predicted"), expected.T)
    assert confusion.accuracy == pytest.approx(metrics.accuracy_score(actual, predicted))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        actual, predicted, labels=range(4), zero_division=np.nan
    )
    report = confusion.report()
    for k, row in enumerate(report):
        rest = metrics.confusion_matrix(actual == k, predicted == k, labels=[False, True])
        tn, fp, fn, tp = rest.ravel()
        assert [row["precision"], row["recall"]] == pytest.approx([precision[k], recall[k]], nan_ok=True)
        assert row["f1"] == pytest.approx(f1[k], nan_ok=True)
        assert row["support"] == support[k]
        assert (row["ppv"], row["sensitivity"]) == pytest.approx((row["precision"], row["recall"]), nan_ok=True)
        assert row["specificity"] == pytest.approx(tn / (tn + fp) if tn + fp else np.nan, nan_ok=True)
        assert row["npv"] == pytest.approx(tn / (tn + fn) if tn + fn else np.nan, nan_ok=True)
        assert row["detection_rate"] == tp / len(rows)
        if 0 < tp + fn < len(rows):
            balanced = metrics.balanced_accuracy_score(actual == k, predicted == k)
            assert row["balanced_accuracy"] == pytest.approx(balanced)
        else:
            assert np.isnan(row["balanced_accuracy"])


def predictions(label, logit, label_mask=None):
    label, logit = np.array(label, float), np.array(logit, float)
    label_mask = np.ones(label.shape, bool) if label_mask is None else np.array(label_mask)
    ids = np.arange(len(label))
    return Predictions(ids, ids, ("a", "b", "c"), logit, label, label_mask)


def test_the_highest_logit_is_predicted_and_unlabelled_images_are_skipped():
    label_mask = np.array([[True] * 3, [True] * 3, [False] * 3])
    table = predictions(np.eye(3), [[3, 2, 1], [-1, -2, -3], [0, 0, 1]], label_mask)
    confusion = ConfusionMatrix.from_predictions(table)
    np.testing.assert_array_equal(confusion.matrix, [[1, 0, 0], [1, 0, 0], [0, 0, 0]])
    assert confusion.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("label", "label_mask", "message"),
    [
        ([1, 1, 0], [True] * 3, "row 2 .id 1. is labelled a and b"),
        ([0, 0, 0], [True] * 3, "is labelled nothing"),
        ([1, 0, 0], [True, False, True], "all labels known"),
    ],
)
def test_images_without_exactly_one_class_are_refused(label, label_mask, message):
    with pytest.raises(CxrError, match=message):
        ConfusionMatrix.from_predictions(predictions([[1, 0, 0], label], np.zeros((2, 3)), [[True] * 3, label_mask]))


def test_bad_classes_and_orientations_are_refused():
    with pytest.raises(CxrError, match="predicted classes go from 0 to 1, not 0 to 2"):
        ConfusionMatrix.from_classes(np.array([0, 1]), np.array([2, 0]), "ab")
    with pytest.raises(CxrError, match="did you mean 'predicted'"):
        PAPER.oriented("predictd")


def test_empty_counts_give_nan():
    empty = ConfusionMatrix.from_classes(np.zeros(0, int), np.zeros(0, int), "ab")
    assert np.isnan([empty.accuracy, empty.balanced_accuracy, empty.report()[0]["prevalence"]]).all()
