"""Several data sets as one table."""

import dataclasses
import hashlib

import numpy as np
import pytest

from cxrjax.data.mixture import combine_splits, make_mixture, translated_policy
from cxrjax.data.records import Box, Record, Records
from cxrjax.data.splits import make_split
from cxrjax.errors import CxrError
from cxrjax.findings import NOT_MENTIONED, LabelPolicy, make_targets


def table(dataset, findings, rows, *, images=()):
    records = [
        Record(
            id=f"{n}.png", patient=str(n // 2), study=f"s{n}", view=("PA", "AP")[n % 2], age=40.0 + n, sex="F",
            source=dataset, labels=tuple(labels), official=("train", "validation", "test")[n // 2 % 3],
            boxes=(Box(findings[0], 0.5, 0.25, 0.25, 0.5),) if n == 0 else (),
            sha256=hashlib.sha256((images[n] if images else f"{dataset}{n}").encode()).hexdigest(), width=10, height=20,
        )
        for n, labels in enumerate(rows)
    ]  # fmt: skip
    return Records.from_records(records, findings, dataset=dataset)


@pytest.fixture
def sets():
    nih = table("chestxray14", ("Effusion", "Mass", "Nodule"), [[n % 2, n % 3 == 0, 0] for n in range(12)])
    mimic = table(
        "mimic_cxr_jpg", ("Pleural Effusion", "Lung Lesion", "Fracture"), [[1, 0, -1], [-1, 1, 1], [-2, -2, 0]] * 3
    )
    return nih, mimic


def test_ids_patients_and_columns_of_both(sets):
    pooled = make_mixture(sets, ["Effusion", "Mass", "Fracture", "No Finding"])
    assert len(pooled) == 21
    assert pooled.dataset == "chestxray14+mimic_cxr_jpg"
    assert pooled.id[[0, 11, 12, 20]].tolist() == [
        "chestxray14/0.png", "chestxray14/11.png", "mimic_cxr_jpg/0.png", "mimic_cxr_jpg/8.png",
    ]  # fmt: skip
    assert len(set(pooled.patient.tolist())) == 6 + 5
    np.testing.assert_array_equal(pooled.age, np.concatenate([s.age for s in sets]))
    assert pooled.view[:2].tolist() == ["PA", "AP"]
    np.testing.assert_array_equal(pooled.digests, np.concatenate([s.digests for s in sets]))
    np.testing.assert_array_equal(pooled.origin(np.array([0, 11, 12, 20])), [0, 0, 1, 1])
    assert pooled.original_sizes is not None
    effusion, mass, fracture, none = pooled.labels.T
    np.testing.assert_array_equal(effusion, np.concatenate([sets[0].labels[:, 0], sets[1].labels[:, 0]]))
    np.testing.assert_array_equal(mass[12:15], [0, -1, -2])  # of a lesion: absent, perhaps, unknown
    assert (fracture[:12] == NOT_MENTIONED).all()
    np.testing.assert_array_equal(none[:4], [0, 0, 1, 0])


def test_what_a_data_set_does_not_say_is_masked_whatever_the_policy(sets):
    names = ("Effusion", "Mass", "Fracture")
    pooled = make_mixture(sets, names)
    loose = LabelPolicy("ones", "negative")
    _, label_mask = make_targets(pooled.labels[:12], translated_policy(loose, sets[0], names), findings=names)
    np.testing.assert_array_equal(label_mask, np.tile([True, True, False], (12, 1)))
    value, label_mask = make_targets(pooled.labels[12:15], translated_policy(loose, sets[1], names), findings=names)
    np.testing.assert_array_equal(label_mask, [[1, 1, 1], [1, 0, 1], [1, 0, 1]])
    np.testing.assert_array_equal(value, [[1, 0, 1], [1, 0, 1], [0, 0, 0]])


def test_an_exception_holds_under_either_name(sets):
    policy = LabelPolicy("zeros", per_finding={"Pleural Effusion": LabelPolicy("ignore")})
    policy_of_second = translated_policy(policy, sets[1], ("Effusion", "Fracture"))
    _, label_mask = make_targets(
        make_mixture(sets, ["Effusion", "Fracture"]).labels[12:15], policy_of_second, findings=("Effusion", "Fracture")
    )
    np.testing.assert_array_equal(label_mask, [[1, 1], [0, 1], [1, 1]])


def test_boxes_have_the_common_names(sets):
    pooled = make_mixture(sets, ["Pleural Effusion", "Mass"])
    assert pooled.boxes(0) == [Box("Pleural Effusion", 0.5, 0.25, 0.25, 0.5)]
    assert pooled.boxes(12) == [Box("Pleural Effusion", 0.5, 0.25, 0.25, 0.5)]
    assert pooled.boxes(13) == []
    for row, finding in ((0, "Pleural Effusion"), (12, "Pleural Effusion"), (12, "Mass")):
        mask = pooled.mask(row, finding, 8)
        assert (mask is None) == (finding == "Mass")
        if mask is not None:
            np.testing.assert_array_equal(np.argwhere(mask), [(y, x) for y in range(2, 6) for x in range(4, 6)])


def test_each_keeps_its_own_split(sets):
    pooled = make_mixture(sets, ["Effusion"])
    splits = [make_split(sets[0], "official"), make_split(sets[1], "random", seed=3, fractions=(0.4, 0.2, 0.4))]
    split = combine_splits(pooled, splits)
    assert split.name == "official+random"
    for name, rows in split.rows.items():
        np.testing.assert_array_equal(rows[rows < 12], splits[0].rows[name])
        np.testing.assert_array_equal(rows[rows >= 12] - 12, splits[1].rows[name])
    other = combine_splits(pooled, [splits[0], make_split(sets[1], "random", seed=4, fractions=(0.4, 0.2, 0.4))])
    assert len({split.fingerprint, other.fingerprint}) == 2


def test_the_fingerprint_covers_all_data_sets(sets):
    nih, mimic = sets
    changed = dataclasses.replace(mimic, fingerprint="0" * 64)
    marks = [make_mixture(of, ["Effusion"]).fingerprint for of in (sets, (mimic, nih), (nih, changed))]
    marks.append(make_mixture(sets, ["Effusion", "Mass"]).fingerprint)
    assert len(set(marks)) == 4
    assert make_mixture(sets, ["Effusion"]).fingerprint == marks[0]


def test_an_image_of_two_data_sets_in_different_parts_is_named(capsys):
    images = ["a", "b", "c", "d", "e", "f"]
    one = table("one", ("Mass",), [[1]] * 6, images=images)
    other = table("other", ("Mass",), [[1]] * 6, images=["x", "y", "z", "a", "e", "w"])
    pooled = make_mixture((one, other), ["Mass"])
    capsys.readouterr()
    combine_splits(pooled, [make_split(one, "official"), make_split(other, "official")])
    warning = " ".join(capsys.readouterr().err.split())
    assert "1 images are in different splits of two data sets: one/0.png (train) = other/3.png (validation)" in warning


@pytest.mark.parametrize(
    ("which", "findings", "message"),
    [
        ((0, 1), ["Fractur"], "unknown finding 'Fractur': did you mean Fracture"),
        ((0, 0), ["Mass"], "data set chestxray14 is in the mixture twice"),
    ],
)
def test_what_cannot_be_pooled(sets, which, findings, message):
    with pytest.raises(CxrError, match=message):
        make_mixture([sets[k] for k in which], findings)
