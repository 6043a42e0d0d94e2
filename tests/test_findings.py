import csv
import gzip
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats

from cxrjax.errors import CxrError
from cxrjax.findings import (
    CHEXPERT14,
    NIH14,
    ONES_SMOOTHED,
    PHANTOM,
    SIX_CLASS,
    ZEROS_SMOOTHED,
    LabelPolicy,
    derive_no_finding,
    finding_indices,
    make_targets,
    translate_labels,
)

FOUR = np.array([[1, 0, -1, -2]], np.int8)


@pytest.mark.parametrize(
    ("policy", "value", "mask"),
    [
        (LabelPolicy(), [1, 0, 0, 0], [1, 1, 1, 1]),
        (LabelPolicy(uncertain="ones"), [1, 0, 1, 0], [1, 1, 1, 1]),
        (LabelPolicy(uncertain="ignore"), [1, 0, 0, 0], [1, 1, 0, 1]),
        (LabelPolicy(not_mentioned="unknown"), [1, 0, 0, 0], [1, 1, 1, 0]),
        (LabelPolicy("ignore", "unknown"), [1, 0, 0, 0], [1, 1, 0, 0]),
        (LabelPolicy("ones", "unknown"), [1, 0, 1, 0], [1, 1, 1, 0]),
    ],
)
def test_policies(policy, value, mask):
    got_value, got_known = make_targets(FOUR, policy)
    assert got_value.dtype == np.float32
    assert got_known.dtype == np.bool_
    np.testing.assert_array_equal(got_value, [value])
    np.testing.assert_array_equal(got_known, np.array([mask], bool))


@given(
    arrays(np.int8, array_shapes(min_dims=2, max_dims=2, min_side=0), elements=st.integers(-2, 1)),
    st.sampled_from(["zeros", "ones", "ignore"]),
    st.sampled_from(["negative", "unknown"]),
)
def test_certain_labels_never_change(labels, uncertain, not_mentioned):
    value, mask = make_targets(labels, LabelPolicy(uncertain, not_mentioned))
    certain = labels >= 0
    assert mask[certain].all()
    np.testing.assert_array_equal(value[certain], labels[certain])
    assert (value[~mask] == 0).all()


UNCERTAIN_ONLY = np.full((4000, 2), -1, np.int8)
IDS = [f"{k}.png" for k in range(4000)]
NAMES = ("Edema", "Mass")


@pytest.mark.parametrize("smooth_range", [ONES_SMOOTHED, ZEROS_SMOOTHED])
def test_smoothed_targets_are_uniform_in_their_interval(smooth_range):
    policy = LabelPolicy("smooth", smooth_range=smooth_range)
    value, mask = make_targets(UNCERTAIN_ONLY, policy, findings=NAMES, ids=IDS)
    assert mask.all()
    low, high = smooth_range
    for column in value.T:
        assert stats.kstest(column, stats.uniform(low, high - low).cdf).pvalue > 0.01
        assert low <= column.min() < column.max() <= high
    assert abs(np.corrcoef(value.T)[0, 1]) < 0.06


def test_a_smoothed_target_depends_on_seed_record_and_finding_alone():
    policy = LabelPolicy("smooth")
    value, _ = make_targets(UNCERTAIN_ONLY, policy, findings=NAMES, ids=IDS)
    few, _ = make_targets(UNCERTAIN_ONLY[:5], policy, findings=NAMES[::-1], ids=IDS[4::-1])
    np.testing.assert_array_equal(few, value[4::-1, ::-1])
    other, _ = make_targets(UNCERTAIN_ONLY, LabelPolicy("smooth", seed=1), findings=NAMES, ids=IDS)
    assert (other != value).mean() > 0.99
    first = 0.55 + 0.3 * (int(hashlib.sha256(b"0/Edema/0.png").hexdigest()[:16], 16) / 2**64)
    assert value[0, 0] == np.float32(first)


def test_smoothing_leaves_every_other_label_alone_and_is_no_score():
    policy = LabelPolicy("smooth", "unknown")
    value, mask = make_targets(FOUR, policy, findings=[*"abcd"], ids=["x"])
    assert (value[0, 0], value[0, 1], value[0, 3]) == (1, 0, 0)
    assert 0.55 <= value[0, 2] <= 0.85
    np.testing.assert_array_equal(mask, [[True, True, True, False]])
    value, mask = make_targets(FOUR, policy.scored)
    np.testing.assert_array_equal(value, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[True, True, False, False]])


def test_findings_with_a_policy_of_their_own():
    """U-Ones for Edema and Atelectasis, U-Zeros for Cardiomegaly, the rest unknown."""
    ones, zeros = LabelPolicy("ones"), LabelPolicy("zeros")
    policy = LabelPolicy("ignore", per_finding={"Edema": ones, "Atelectasis": ones, "Cardiomegaly": zeros})
    names = ("Atelectasis", "Cardiomegaly", "Edema", "Hernia")
    value, mask = make_targets(np.full((1, 4), -1, np.int8), policy, findings=names)
    np.testing.assert_array_equal(value, [[1, 0, 1, 0]])
    np.testing.assert_array_equal(mask, [[True, True, True, False]])
    mixed = LabelPolicy("ones", per_finding={"Edema": LabelPolicy("smooth", smooth_range=ZEROS_SMOOTHED)})
    value, _ = make_targets(np.full((1, 4), -1, np.int8), mixed, findings=names, ids=["x"])
    assert value[0, [0, 1, 3]].tolist() == [1, 1, 1]
    assert 0 <= value[0, 2] <= 0.3
    _, mask = make_targets(np.full((1, 4), -1, np.int8), mixed.scored, findings=names)
    np.testing.assert_array_equal(mask, [[True, True, False, True]])


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        (LabelPolicy("smooth"), {}, "need the names of the findings"),
        (LabelPolicy(per_finding={"Edema": LabelPolicy("ones")}), {}, "need the names of the findings"),
        (LabelPolicy("smooth"), {"findings": [*"abcd"]}, "need the ids of the records"),
        (LabelPolicy(per_finding={"Edem": LabelPolicy("ones")}), {"findings": ["Edema", *"abc"]}, "did you mean Edema"),
    ],
)
def test_a_policy_that_needs_more_says_so(policy, given, message):
    with pytest.raises(CxrError, match=message):
        make_targets(FOUR, policy, **given)


@pytest.mark.parametrize("smooth_range", [(0.5,), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_an_interval_is_within_0_and_1(smooth_range):
    with pytest.raises(CxrError, match="is not a lowest and a highest target from 0 to 1"):
        LabelPolicy("smooth", smooth_range=smooth_range)


def test_exceptions_have_none():
    with pytest.raises(CxrError, match="cannot have per-finding policies"):
        LabelPolicy(per_finding={"Mass": LabelPolicy(per_finding={"Mass": LabelPolicy()})})


def test_no_finding_is_derived_as_the_chexpert_labeller_does():
    names = ("Edema", "Support Devices", "Mass", "No Finding")
    rows = {  # Edema, Support Devices, Mass, No Finding of the table: derived
        (0, 0, 0, 0): 1,
        (-2, -2, -2, -2): 1,
        (-2, 1, 0, 0): 1,
        (1, 0, 0, 1): 0,
        (-1, 1, -2, 1): -1,
        (-1, -2, 1, 0): 0,
    }
    derived = derive_no_finding(np.array([*rows], np.int8), names)
    assert derived.dtype == np.int8
    assert derived.tolist() == [*rows.values()]


def test_nih_labels_in_chexperts_words():
    nih = np.zeros((5, 14), np.int8)
    for row, finding in enumerate(("Effusion", "Nodule", "Pleural_Thickening", "Hernia")):
        nih[row, NIH14.index(finding)] = 1
    got = translate_labels(nih, NIH14, CHEXPERT14)
    same = {"Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pneumonia", "Pneumothorax"}
    others = [
        # Enlarged C., Fracture, Lung Lesion, Lung Opacity, No Finding, Effusion, Pleural Other, Devices
        (-2, -2, 0, -2, 0, 1, -2, -2),
        (-2, -2, 1, 1, 0, 0, -2, -2),
        (-2, -2, 0, -2, 0, 0, 1, -2),
        (-2, -2, 0, -2, 0, 0, -2, -2),
        (-2, -2, 0, -2, 1, 0, -2, -2),
    ]
    np.testing.assert_array_equal(got[:, [f not in same for f in CHEXPERT14]], others)
    assert (got[:, [f in same for f in CHEXPERT14]] == 0).all()


def test_chexpert_labels_in_nihs_words():
    order = ("Pleural Effusion", "Lung Lesion", "Lung Opacity", "Pleural Other", "Edema")
    rows = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [-1, -1, 0, -1, -1], [-2, -2, -2, -2, -2]], np.int8)
    names = ("Effusion", "Mass", "Nodule", "Infiltration", "Pleural_Thickening", "Edema", "Hernia")
    expected = [
        [1, -1, -1, -1, 0, 0, -2],
        [0, 0, 0, -1, -1, 1, -2],
        [-1, 0, 0, 0, -1, -1, -2],  # no opacity, so no mass either
        [-2, -2, -2, -2, -2, -2, -2],
    ]
    np.testing.assert_array_equal(translate_labels(rows, order, names), expected)


@given(arrays(np.int8, (3, 14), elements=st.integers(-2, 1)))
def test_translating_to_the_same_words_changes_nothing(labels):
    for vocabulary in (NIH14, CHEXPERT14):
        np.testing.assert_array_equal(translate_labels(labels, vocabulary, vocabulary), labels)


def test_a_label_outside_the_four_values_is_named():
    with pytest.raises(CxrError, match="label 2 in row 0, column 1"):
        make_targets(np.array([[0, 2]], np.int8), LabelPolicy())


def test_an_unknown_policy_is_an_error():
    with pytest.raises(CxrError, match=r"uncertain='U-Zeros'.*zeros, ones, ignore"):
        LabelPolicy(uncertain="U-Zeros")  # pyright: ignore[reportArgumentType]


def test_vocabularies():
    assert (len(NIH14), len(CHEXPERT14), len(SIX_CLASS), len(PHANTOM)) == (14, 14, 6, 7)
    for vocabulary in (NIH14, CHEXPERT14, SIX_CLASS, PHANTOM):
        assert len(set(vocabulary)) == len(vocabulary)
        assert finding_indices(vocabulary, vocabulary) == list(range(len(vocabulary)))
    assert list(CHEXPERT14) == sorted(CHEXPERT14)
    assert list(SIX_CLASS) == sorted(SIX_CLASS)


def test_nih_vocabulary_is_that_of_the_published_table(shared):
    with gzip.open(shared / "data/nih/Data_Entry_2017_v2020.csv.gz", "rt") as file:
        found = {finding for row in csv.DictReader(file) for finding in row["Finding Labels"].split("|")}
    assert found == {*NIH14, "No Finding"}


def test_positions():
    assert finding_indices(["Mass", "Atelectasis"], NIH14) == [4, 0]
    with pytest.raises(CxrError, match="'Cardiomegali': did you mean Cardiomegaly"):
        finding_indices(["Cardiomegali"], NIH14)
    with pytest.raises(CxrError, match="'effusion': did you mean Pleural Effusion"):
        finding_indices(["effusion"], CHEXPERT14)
    with pytest.raises(CxrError, match="'Pleural Thickening': did you mean Pleural_Thickening"):
        finding_indices(["Pleural Thickening"], NIH14)
    with pytest.raises(CxrError, match="'Zebra': the findings are Atelectasis, "):
        finding_indices(["Zebra"], NIH14)
    with pytest.raises(CxrError, match="'Mass' is listed twice"):
        finding_indices(["Mass", "Mass"], NIH14)
