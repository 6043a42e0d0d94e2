import csv
import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cxrjax.errors import CxrError
from cxrjax.findings import CHEXPERT14, NIH14, PHANTOM, SIX_CLASS, LabelPolicy, positions, targets

FOUR = np.array([[1, 0, -1, -2]], np.int8)


@pytest.mark.parametrize(
    ("policy", "value", "known"),
    [
        (LabelPolicy(), [1, 0, 0, 0], [1, 1, 1, 1]),
        (LabelPolicy(uncertain="ones"), [1, 0, 1, 0], [1, 1, 1, 1]),
        (LabelPolicy(uncertain="ignore"), [1, 0, 0, 0], [1, 1, 0, 1]),
        (LabelPolicy(not_mentioned="unknown"), [1, 0, 0, 0], [1, 1, 1, 0]),
        (LabelPolicy("ignore", "unknown"), [1, 0, 0, 0], [1, 1, 0, 0]),
        (LabelPolicy("ones", "unknown"), [1, 0, 1, 0], [1, 1, 1, 0]),
    ],
)
def test_policies(policy, value, known):
    got_value, got_known = targets(FOUR, policy)
    assert got_value.dtype == np.float32
    assert got_known.dtype == np.bool_
    np.testing.assert_array_equal(got_value, [value])
    np.testing.assert_array_equal(got_known, np.array([known], bool))


@given(
    arrays(np.int8, array_shapes(min_dims=2, max_dims=2, min_side=0), elements=st.integers(-2, 1)),
    st.sampled_from(["zeros", "ones", "ignore"]),
    st.sampled_from(["negative", "unknown"]),
)
def test_certain_labels_never_change(labels, uncertain, not_mentioned):
    value, known = targets(labels, LabelPolicy(uncertain, not_mentioned))
    certain = labels >= 0
    assert known[certain].all()
    np.testing.assert_array_equal(value[certain], labels[certain])
    assert (value[~known] == 0).all()


def test_a_label_outside_the_four_values_is_named():
    with pytest.raises(CxrError, match="label 2 in row 0, column 1"):
        targets(np.array([[0, 2]], np.int8), LabelPolicy())


def test_an_unknown_policy_is_an_error():
    with pytest.raises(CxrError, match=r"uncertain='U-Zeros'.*zeros, ones, ignore"):
        LabelPolicy(uncertain="U-Zeros")  # pyright: ignore[reportArgumentType]


def test_vocabularies():
    assert (len(NIH14), len(CHEXPERT14), len(SIX_CLASS), len(PHANTOM)) == (14, 14, 6, 7)
    for vocabulary in (NIH14, CHEXPERT14, SIX_CLASS, PHANTOM):
        assert len(set(vocabulary)) == len(vocabulary)
        assert positions(vocabulary, vocabulary) == list(range(len(vocabulary)))
    assert list(CHEXPERT14) == sorted(CHEXPERT14)
    assert list(SIX_CLASS) == sorted(SIX_CLASS)


def test_nih_vocabulary_is_that_of_the_published_table(shared):
    with gzip.open(shared / "data/nih/Data_Entry_2017_v2020.csv.gz", "rt") as file:
        found = {finding for row in csv.DictReader(file) for finding in row["Finding Labels"].split("|")}
    assert found == {*NIH14, "No Finding"}


def test_positions():
    assert positions(["Mass", "Atelectasis"], NIH14) == [4, 0]
    with pytest.raises(CxrError, match="'Cardiomegali': did you mean Cardiomegaly"):
        positions(["Cardiomegali"], NIH14)
    with pytest.raises(CxrError, match="'effusion': did you mean Pleural Effusion"):
        positions(["effusion"], CHEXPERT14)
    with pytest.raises(CxrError, match="'Pleural Thickening': did you mean Pleural_Thickening"):
        positions(["Pleural Thickening"], NIH14)
    with pytest.raises(CxrError, match="'Zebra': the findings are Atelectasis, "):
        positions(["Zebra"], NIH14)
    with pytest.raises(CxrError, match="'Mass' is listed twice"):
        positions(["Mass", "Mass"], NIH14)
