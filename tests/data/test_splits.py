import gzip
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cxrjax.data.records import Record, Records
from cxrjax.data.splits import SPLITS, check_leakage, make_split, save_split
from cxrjax.errors import CxrError
from tfds_builders.chestxray14 import nih


def table(owners, official=None):
    """Records of the patients listed, one image each entry."""
    official = official or ["test" if owner % 4 == 0 else "train_val" for owner in owners]
    return Records.from_records(
        [
            Record(f"{k:05d}.png", f"p{owner}", f"p{owner}_{k}", "PA", math.nan, "F", "x", (0,), split)
            for k, (owner, split) in enumerate(zip(owners, official, strict=True))
        ],
        ("Mass",),
        dataset="d",
    )


HUNDRED = table([k // 3 for k in range(300)])
populations = st.lists(st.integers(0, 30), min_size=30, max_size=120).filter(lambda owners: len(set(owners)) >= 12)


def patients(records, rows):
    return set(records.patient[rows].tolist())


@given(populations, st.integers(0, 2**32 - 1))
def test_random_splits_are_disjoint_by_patient_and_complete(owners, seed):
    records = table(owners)
    split = make_split(records, "random", seed=seed)
    assert tuple(split.rows) == SPLITS
    assert sorted(np.concatenate(list(split.rows.values())).tolist()) == list(range(len(records)))
    counts = [len(patients(records, rows)) for rows in split.rows.values()]
    total = len(set(owners))
    assert sum(counts) == total
    np.testing.assert_allclose(counts, np.array([0.7, 0.1, 0.2]) * total, atol=1.001)
    assert all(rows.dtype == np.int32 and (np.diff(rows) > 0).all() for rows in split.rows.values())


def test_a_split_is_a_function_of_its_seed():
    one, same, other = (make_split(HUNDRED, "random", seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert all((one.rows[name] == same.rows[name]).all() for name in SPLITS)


def test_random_without_validation():
    split = make_split(HUNDRED, "random", fractions=(0.5, 0, 0.5))
    assert {name: len(patients(HUNDRED, rows)) for name, rows in split.rows.items()} == {"train": 50, "test": 50}


@pytest.mark.parametrize("fractions", [(0.5, 0.2), (0.5, 0.2, 0.2), (1.2, -0.4, 0.2)])
def test_fractions_must_sum_to_one(fractions):
    with pytest.raises(CxrError, match="must be three non-negative numbers that sum to 1"):
        make_split(HUNDRED, "random", fractions=fractions)


def test_official_keeps_the_test_split_and_draws_validation_by_patient():
    split = make_split(HUNDRED, "official", seed=3)
    np.testing.assert_array_equal(split.rows["test"], np.flatnonzero(HUNDRED.official == "test"))
    counts = {name: len(patients(HUNDRED, rows)) for name, rows in split.rows.items()}
    assert counts == {"train": 66, "validation": 9, "test": 25}  # 75 x .7 / .8 is 65.6


def test_official_uses_given_splits():
    official = ["train", "train", "validation", "test", "train", "validation"]
    split = make_split(table([1, 1, 2, 3, 4, 5], official), "official", seed=7)
    assert {name: rows.tolist() for name, rows in split.rows.items()} == {
        "train": [0, 1, 4], "validation": [2, 5], "test": [3],
    }  # fmt: skip
    with pytest.raises(CxrError, match="the official split leaves no image for test; 3 images"):
        make_split(table([1, 2, 3], ["train", "validation", "train"]), "official")
    with pytest.raises(CxrError, match=r"patients in two splits \(1\): p1 \(train and test\)"):
        make_split(table([1, 1, 2], ["train", "test", "validation"]), "official")


def test_official_without_validation():
    split = make_split(HUNDRED, "official", fractions=(0.8, 0, 0.2))
    assert {name: len(patients(HUNDRED, rows)) for name, rows in split.rows.items()} == {"train": 75, "test": 25}


def test_official_requires_official_splits():
    with pytest.raises(CxrError, match=r"1 images of d are in no official split, such as 00002\.png"):
        make_split(table([1, 2, 3, 4], ["train_val", "test", "", "test"]), "official")


@given(populations, st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 4), st.integers(0, 4))
def test_small_has_the_exact_sizes(owners, seed, train, validation, test):
    records = table(owners)
    sizes = {"train": train, "validation": validation, "test": test}
    assume(sum(sizes.values()) + 2 * max(Counter(owners).values()) <= len(owners))  # a cut patient's rest is not used
    split = make_split(records, "small", seed=seed, sizes=sizes)
    assert {name: len(rows) for name, rows in split.rows.items()} == {name: n for name, n in sizes.items() if n}
    check_leakage(records, split.rows)


def test_small_takes_three_numbers_and_reports_missing_images():
    assert [len(rows) for rows in make_split(HUNDRED, "small", sizes=(40, 4, 7)).rows.values()] == [40, 4, 7]
    with pytest.raises(CxrError, match="needs 400 images, but only 300 exist"):
        make_split(HUNDRED, "small", sizes=(200, 100, 100))
    with pytest.raises(CxrError, match=r"needs split\.sizes"):
        make_split(HUNDRED, "small")


# --- stratified splits and folds


def labelled(patients=2000, seed=0):
    """Patients of 1 to 12 images with labels from common to rare that cluster in patients."""
    rng = np.random.default_rng(seed)
    rate = np.array([0.3, 0.1, 0.02, 0.005])
    tendency = rng.random((patients, 4)) < rate * 2
    records = []
    for patient in range(patients):
        for image in range(min(int(rng.geometric(0.4)), 12)):
            labels = tuple((tendency[patient] & (rng.random(4) < 0.5)).astype(int).tolist())
            id = f"{patient}_{image}.png"
            records.append(Record(id, f"p{patient}", id, "PA", math.nan, "F", "x", labels))
    return Records.from_records(records, ("A", "B", "C", "D"), dataset="d")


CLUSTERED = labelled()


def fractions_in(records, rows):
    """Fraction of each finding's positive images, and of all images."""
    positive = records.labels == 1
    return np.append(positive[rows].sum(0) / positive.sum(0), len(rows) / len(records))


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.5, 0.25, 0.25), (0.9, 0, 0.1)])
def test_stratified_splits_have_their_fraction_of_every_finding(fractions):
    split = make_split(CLUSTERED, "stratified", fractions=fractions)
    expected = {name: fraction for name, fraction in zip(SPLITS, fractions, strict=True) if fraction}
    assert sorted(np.concatenate(list(split.rows.values())).tolist()) == list(range(len(CLUSTERED)))
    for name, fraction in expected.items():
        actual = fractions_in(CLUSTERED, split.rows[name])
        np.testing.assert_allclose(actual[[0, 1, 2, 4]], fraction, atol=0.01)  # the rarest: to whole patients
        assert abs(actual[3] - fraction) * (CLUSTERED.labels[:, 3] == 1).sum() < 2.5
        assert abs(len(patients(CLUSTERED, split.rows[name])) / 2000 - fraction) < 0.02
    assert tuple(split.rows) == tuple(expected)


def test_each_image_is_tested_in_one_fold_and_folds_are_balanced():
    splits = [make_split(CLUSTERED, "folds", folds=5, fold=k, fractions=(0.72, 0.08, 0.2)) for k in range(5)]
    tested = np.concatenate([split.rows["test"] for split in splits])
    assert sorted(tested.tolist()) == list(range(len(CLUSTERED)))
    assert len({split.fingerprint for split in splits}) == 5
    for split in splits:
        np.testing.assert_allclose(fractions_in(CLUSTERED, split.rows["test"])[[0, 1, 2, 4]], 0.2, atol=0.01)
        np.testing.assert_allclose(fractions_in(CLUSTERED, split.rows["validation"])[[0, 1, 2, 4]], 0.08, atol=0.01)
        assert sum(map(len, split.rows.values())) == len(CLUSTERED)


@pytest.mark.parametrize("name", ["stratified", "folds"])
def test_stratified_splits_are_functions_of_seed_and_records(name):
    one, same, other = (make_split(CLUSTERED, name, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@given(populations, st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_folds_keep_patients_together(owners, seed, folds):
    records = table(owners)
    tested, refusal = [], ""
    for fold in range(folds):
        try:
            split = make_split(records, "folds", seed=seed, folds=folds, fold=fold)
        except CxrError as refused:
            refusal = str(refused)
            break
        check_leakage(records, split.rows)
        tested += split.rows["test"].tolist()
    if refusal:  # one patient has more images than a fold, and is all that is not tested
        assert "leaves no image for" in refusal
        assert max(np.bincount(owners)) * folds > len(owners)
    else:
        assert sorted(tested) == list(range(len(records)))


@pytest.mark.parametrize("name", ["random", "stratified", "folds"])
def test_subset_fraction_keeps_whole_patients(name):
    half = make_split(CLUSTERED, name, subset_fraction=0.5, seed=3)
    used = np.concatenate(list(half.rows.values()))
    assert len(patients(CLUSTERED, used)) == 1000
    assert len(used) == np.isin(CLUSTERED.patient, list(patients(CLUSTERED, used))).sum(), "whole patients"
    others = make_split(CLUSTERED, name, subset_fraction=0.5, seed=4)
    assert patients(CLUSTERED, used) != patients(CLUSTERED, np.concatenate(list(others.rows.values())))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "folds", "fold": 5}, "no fold 5 of 5; use at least 2 folds and count them from 0"),
        ({"name": "folds", "fold": -1}, "no fold -1 of 5"),
        ({"name": "folds", "folds": 1}, "no fold 0 of 1"),
        ({"name": "folds", "folds": 400}, "the folds split leaves no image for test; 300 images"),
        ({"name": "random", "subset_fraction": 0}, "subset_fraction is 0; give a number above 0 and up to 1"),
        ({"name": "stratified", "subset_fraction": 1.5}, "subset_fraction is 1.5"),
        ({"name": "official", "subset_fraction": 0.5}, "the official split uses all patients"),
    ],
)
def test_numbers_out_of_range(call, message):
    with pytest.raises(CxrError, match=message):
        [make_split(HUNDRED, **{"fold": k, **call}) for k in range(101 if call.get("folds") == 400 else 1)]


def test_leaking_patients_are_named():
    with pytest.raises(CxrError, match=r"patients in two splits \(2\): p0 \(train and test\), p1 \(train and test\);"):
        check_leakage(HUNDRED, {"train": np.arange(5), "test": np.array([1, 5, 8])})
    with pytest.raises(CxrError, match=r"p12 \(a and b\) and 95 more; put"):
        check_leakage(HUNDRED, {"a": np.arange(0, 300, 3), "b": np.arange(1, 300, 3)})
    check_leakage(HUNDRED, {"train": np.arange(6), "test": np.arange(6, 9)})


def test_saved_split_is_read_back(tmp_path):
    split = make_split(HUNDRED, "random", seed=5)
    save_split(split, HUNDRED, tmp_path / "split.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["split.csv"]
    again = make_split(HUNDRED, "files", files=tmp_path / "split.csv")
    assert again.fingerprint == split.fingerprint
    assert all((again.rows[name] == split.rows[name]).all() for name in SPLITS)


def test_edited_file_is_refused_by_its_fingerprint(tmp_path):
    path = tmp_path / "split.csv"
    save_split(make_split(HUNDRED, "random", seed=5), HUNDRED, path)
    first, *rows = path.read_text().splitlines(keepends=True)
    path.write_text(first + "".join(rows[:-1]))
    with pytest.raises(CxrError, match="was edited after it was saved; delete its first line"):
        make_split(HUNDRED, "files", files=path)
    path.write_text("".join(rows[:-1]))
    split = make_split(HUNDRED, "files", files=path)
    assert sum(map(len, split.rows.values())) == len(rows) - 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,split\n00000.png,train\n00001.png,test\n", r"patients in two splits \(1\): p0 \(train and test\)"),
        ("id,split\n00000.png,train\n00000.png,test\n", "image 00000.png is in train and in test"),
        ("id,split\n00000.png,train\nx.png,train\n", "image x.png is not among the 300 prepared records"),
        (
            "id,split\n00000.png,train\n00009.png,holdout\n",
            "line 3: unknown split 'holdout'; use train, validation",
        ),
        ("name,fold\n00000.png,train\n", "needs the columns id and split; it has name, fold"),
        ("", "needs the columns id and split; it has none"),
    ],
)
def test_invalid_file_is_an_error_that_names_the_row(tmp_path, text, message):
    (tmp_path / "user.csv").write_text(text)
    with pytest.raises(CxrError, match=message):
        make_split(HUNDRED, "files", files=tmp_path / "user.csv")


def test_lists_of_ids_per_split(tmp_path):
    (tmp_path / "train.txt").write_text("00000.png\n00001.png\nnot_prepared.png")  # no final newline
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"00009.png 0 1 0\n"))
    split = make_split(HUNDRED, "files", files={"train": tmp_path / "train.txt", "test": tmp_path / "test.txt.gz"})
    assert {name: rows.tolist() for name, rows in split.rows.items()} == {"train": [0, 1], "test": [9]}
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"00009 0 1 0\n"))
    with pytest.raises(CxrError, match="none of the images listed for test is among the 300 prepared"):
        make_split(HUNDRED, "files", files={"train": tmp_path / "train.txt", "test": tmp_path / "test.txt.gz"})
    with pytest.raises(CxrError, match=r"none\.txt cannot be read"):
        make_split(HUNDRED, "files", files=[tmp_path / "none.txt"])


def test_unknown_strategy_lists_the_choices():
    with pytest.raises(
        CxrError, match="unknown split 'kfold'; choose one of official, random, stratified, folds, small, files"
    ):
        make_split(HUNDRED, "kfold")
    with pytest.raises(CxrError, match=r"needs split\.files"):
        make_split(HUNDRED, "files")


def test_stratified_by_image_reports_leaking_patients(capsys):
    records = labelled(300)
    split = make_split(records, "stratified", by="image")
    assert sorted(np.concatenate(list(split.rows.values()))) == list(range(len(records)))
    split_of = np.full(len(records), "", object)
    for name, rows in split.rows.items():
        split_of[rows] = name
    leaking = sum(len(set(split_of[records.patient == patient])) > 1 for patient in set(records.patient.tolist()))
    assert leaking > 0
    assert f"leakage: {leaking:,} of 300 patients" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CxrError, match="a random split by image does not exist"):
        make_split(records, "random", by="image")


@pytest.fixture(scope="module")
def whole(shared):
    """All 112,120 rows of ChestX-ray14, without images."""
    return nih.read_table(shared / "data/nih")


def test_the_official_split_of_chestxray14(whole):
    assert len(whole) == 112_120
    assert len(np.unique(whole.patient)) == 30_805
    split = make_split(whole, "official")
    counts = {name: len(rows) for name, rows in split.rows.items()}
    assert counts["test"] == 25_596
    assert counts["train"] + counts["validation"] == 86_524
    assert counts["validation"] == pytest.approx(86_524 / 8, rel=0.05)


def test_the_arnoweng_split_of_chestxray14(whole, shared):
    lists = [shared / f"data/nih/arnoweng_{name}_list.txt.gz" for name in ("train", "val", "test")]
    split = make_split(whole, "files", files=lists)
    assert [len(rows) for rows in split.rows.values()] == [78_468, 11_219, 22_433]
    assert [len(patients(whole, rows)) for rows in split.rows.values()] == [21_528, 3_090, 6_187]
    row_of = {id: row for row, id in enumerate(whole.id.tolist())}
    for path in lists:  # the lists carry their authors' labels
        with gzip.open(path, "rt") as file:
            names, labels = zip(*((line.split()[0], line.split()[1:]) for line in file), strict=True)
        ours = whole.labels[[row_of[name] for name in names]]
        assert np.mean(ours != np.array(labels, int)) < 2e-4, "NIH has corrected 0.01 % of the labels since"


def test_stratified_chestxray14(whole):
    split = make_split(whole, "stratified", seed=1)
    for name, fraction in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        np.testing.assert_allclose(fractions_in(whole, split.rows[name]), fraction, atol=0.005)
        assert abs(len(patients(whole, split.rows[name])) / 30_805 - fraction) < 0.005
    half = make_split(whole, "stratified", subset_fraction=0.5)
    used = np.concatenate(list(half.rows.values()))
    assert len(patients(whole, used)) == round(30_805 / 2)
    total = (whole.labels[used] == 1).sum(0)
    np.testing.assert_allclose((whole.labels[half.rows["test"]] == 1).sum(0) / total, 0.2, atol=0.01)
    for fold in (0, 4):
        test = make_split(whole, "folds", fold=fold).rows["test"]
        np.testing.assert_allclose(fractions_in(whole, test), 0.2, atol=0.005)
