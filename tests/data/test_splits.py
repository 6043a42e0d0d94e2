import gzip
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cxrjax.data.records import Record, Records
from cxrjax.data.splits import PARTS, check_leakage, make_split, save
from cxrjax.errors import CxrError
from tfds_builders.chestxray14 import nih


def table(owners, official=None):
    """Records of the patients listed, one image each entry."""
    official = official or ["test" if owner % 4 == 0 else "train_val" for owner in owners]
    return Records.of(
        [
            Record(f"{k:05d}.png", f"p{owner}", f"p{owner}_{k}", "PA", math.nan, "F", "x", (0,), part)
            for k, (owner, part) in enumerate(zip(owners, official, strict=True))
        ],
        ("Mass",),
        dataset="d",
    )


HUNDRED = table([k // 3 for k in range(300)])
populations = st.lists(st.integers(0, 30), min_size=30, max_size=120).filter(lambda owners: len(set(owners)) >= 12)


def patients(records, rows):
    return set(records.patient[rows].tolist())


@given(populations, st.integers(0, 2**32 - 1))
def test_random_parts_are_disjoint_by_patient_and_complete(owners, seed):
    records = table(owners)
    split = make_split(records, "random", seed=seed)
    assert tuple(split.parts) == PARTS
    assert sorted(np.concatenate(list(split.parts.values())).tolist()) == list(range(len(records)))
    counts = [len(patients(records, rows)) for rows in split.parts.values()]
    total = len(set(owners))
    assert sum(counts) == total
    np.testing.assert_allclose(counts, np.array([0.7, 0.1, 0.2]) * total, atol=1.001)
    assert all(rows.dtype == np.int32 and (np.diff(rows) > 0).all() for rows in split.parts.values())


def test_a_split_is_a_function_of_its_seed():
    one, same, other = (make_split(HUNDRED, "random", seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert all((one.parts[part] == same.parts[part]).all() for part in PARTS)


def test_random_without_validation():
    split = make_split(HUNDRED, "random", fractions=(0.5, 0, 0.5))
    assert {part: len(patients(HUNDRED, rows)) for part, rows in split.parts.items()} == {"train": 50, "test": 50}


@pytest.mark.parametrize("fractions", [(0.5, 0.2), (0.5, 0.2, 0.2), (1.2, -0.4, 0.2)])
def test_fractions_must_add_up(fractions):
    with pytest.raises(CxrError, match="must be three, not negative, and add up to 1"):
        make_split(HUNDRED, "random", fractions=fractions)


def test_official_keeps_the_test_part_and_draws_validation_by_patient():
    split = make_split(HUNDRED, "official", seed=3)
    np.testing.assert_array_equal(split.parts["test"], np.flatnonzero(HUNDRED.official == "test"))
    counts = {part: len(patients(HUNDRED, rows)) for part, rows in split.parts.items()}
    assert counts == {"train": 66, "validation": 9, "test": 25}  # 75 x .7 / .8 is 65.6


def test_official_needs_official_parts():
    with pytest.raises(CxrError, match=r"1 images of d are in no official part, the first is 00002\.png"):
        make_split(table([1, 2, 3, 4], ["train_val", "test", "", "test"]), "official")


@given(populations, st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 4), st.integers(0, 4))
def test_small_gives_the_sizes_exactly(owners, seed, train, validation, test):
    records = table(owners)
    sizes = {"train": train, "validation": validation, "test": test}
    assume(sum(sizes.values()) + 2 * max(Counter(owners).values()) <= len(owners))  # a cut patient's rest is not used
    split = make_split(records, "small", seed=seed, sizes=sizes)
    assert {part: len(rows) for part, rows in split.parts.items()} == {part: n for part, n in sizes.items() if n}
    check_leakage(records, split.parts)


def test_small_takes_three_numbers_and_says_what_it_lacks():
    assert [len(rows) for rows in make_split(HUNDRED, "small", sizes=(40, 4, 7)).parts.values()] == [40, 4, 7]
    with pytest.raises(CxrError, match="asks for 400 images and 300 are there"):
        make_split(HUNDRED, "small", sizes=(200, 100, 100))
    with pytest.raises(CxrError, match="needs sizes"):
        make_split(HUNDRED, "small")


def test_leaking_patients_are_named():
    with pytest.raises(CxrError, match=r"patients in two parts \(2\): p0 \(train and test\), p1 \(train and test\);"):
        check_leakage(HUNDRED, {"train": np.arange(5), "test": np.array([1, 5, 8])})
    with pytest.raises(CxrError, match=r"p12 \(a and b\) and 95 more; keep"):
        check_leakage(HUNDRED, {"a": np.arange(0, 300, 3), "b": np.arange(1, 300, 3)})
    check_leakage(HUNDRED, {"train": np.arange(6), "test": np.arange(6, 9)})


def test_a_saved_split_is_read_again(tmp_path):
    split = make_split(HUNDRED, "random", seed=5)
    save(split, HUNDRED, tmp_path / "split.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["split.csv"]
    again = make_split(HUNDRED, "files", files=tmp_path / "split.csv")
    assert again.fingerprint == split.fingerprint
    assert all((again.parts[part] == split.parts[part]).all() for part in PARTS)


def test_a_changed_file_no_longer_carries_the_fingerprint(tmp_path):
    path = tmp_path / "split.csv"
    save(make_split(HUNDRED, "random", seed=5), HUNDRED, path)
    first, *rows = path.read_text().splitlines(keepends=True)
    path.write_text(first + "".join(rows[:-1]))
    with pytest.raises(CxrError, match="was changed since it was saved; delete its first line"):
        make_split(HUNDRED, "files", files=path)
    path.write_text("".join(rows[:-1]))
    split = make_split(HUNDRED, "files", files=path)
    assert sum(map(len, split.parts.values())) == len(rows) - 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,part\n00000.png,train\n00001.png,test\n", r"patients in two parts \(1\): p0 \(train and test\)"),
        ("id,part\n00000.png,train\n00000.png,test\n", "image 00000.png is in train and in test"),
        ("id,part\n00000.png,train\nx.png,train\n", "image x.png is not among the 300 prepared records"),
        (
            "id,part\n00000.png,train\n00009.png,holdout\n",
            "line 3: unknown part 'holdout'; parts are train, validation",
        ),
        ("name,fold\n00000.png,train\n", "needs the columns id and part; it has name, fold"),
        ("", "needs the columns id and part; it has none"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_row(tmp_path, text, message):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(CxrError, match=message):
        make_split(HUNDRED, "files", files=tmp_path / "own.csv")


def test_lists_per_part(tmp_path):
    (tmp_path / "train.txt").write_text("00000.png\n00001.png\nnot_prepared.png")  # no final newline
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"00009.png 0 1 0\n"))
    split = make_split(HUNDRED, "files", files={"train": tmp_path / "train.txt", "test": tmp_path / "test.txt.gz"})
    assert {part: rows.tolist() for part, rows in split.parts.items()} == {"train": [0, 1], "test": [9]}
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"00009 0 1 0\n"))
    with pytest.raises(CxrError, match="none of the images listed for test is among the 300 prepared"):
        make_split(HUNDRED, "files", files={"train": tmp_path / "train.txt", "test": tmp_path / "test.txt.gz"})
    with pytest.raises(CxrError, match=r"none\.txt cannot be read"):
        make_split(HUNDRED, "files", files=[tmp_path / "none.txt"])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CxrError, match="unknown split 'kfold'; choose one of official, random, small, files"):
        make_split(HUNDRED, "kfold")
    with pytest.raises(CxrError, match="needs files"):
        make_split(HUNDRED, "files")


@pytest.fixture(scope="module")
def whole(shared):
    """All 112,120 rows of ChestX-ray14, without images."""
    return nih.table(shared / "data/nih")


def test_the_official_split_of_chestxray14(whole):
    assert len(whole) == 112_120
    assert len(np.unique(whole.patient)) == 30_805
    split = make_split(whole, "official")
    counts = {part: len(rows) for part, rows in split.parts.items()}
    assert counts["test"] == 25_596
    assert counts["train"] + counts["validation"] == 86_524
    assert counts["validation"] == pytest.approx(86_524 / 8, rel=0.05)


def test_the_arnoweng_split_of_chestxray14(whole, shared):
    lists = [shared / f"data/nih/arnoweng_{part}_list.txt.gz" for part in ("train", "val", "test")]
    split = make_split(whole, "files", files=lists)
    assert [len(rows) for rows in split.parts.values()] == [78_468, 11_219, 22_433]
    assert [len(patients(whole, rows)) for rows in split.parts.values()] == [21_528, 3_090, 6_187]
