"""Identical images under different ids are found by content and kept in one split."""

import hashlib
import math

import numpy as np
import pytest

from cxrjax.data.records import Record, Records
from cxrjax.data.splits import find_shared_images, make_split


def table(images, patients, official="train_val"):
    """Make records from image contents ("" is unknown) and patients."""
    digests = [hashlib.sha256(str(image).encode()).hexdigest() if image != "" else "" for image in images]
    records = [
        Record(f"{k}.png", f"p{patient}", "", "PA", math.nan, "F", "x", (k % 2,), official, sha256=digest)
        for k, (patient, digest) in enumerate(zip(patients, digests, strict=True))
    ]
    return Records.from_records(records, ("A",), dataset="x")


def test_patients_who_share_images_are_one_group_transitively():
    records = table(images=[1, 2, 2, 3, 3, 4, "", ""], patients=[0, 0, 1, 1, 2, 3, 4, 5])
    assert records.patient_groups.tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_patient_groups_are_patients_without_duplicates():
    records = table(images=range(6), patients=[2, 1, 2, 0, 1, 0])
    assert records.patient_groups.tolist() == [2, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("name", ["random", "stratified", "folds", "small"])
@pytest.mark.parametrize("seed", range(5))
def test_random_splits_keep_identical_images_in_one_split(name, seed):
    rng = np.random.default_rng(seed)
    records = table(images=rng.integers(0, 900, 300), patients=np.arange(300) // 2)
    split = make_split(records, name, seed=seed, sizes=(20, 10, 10), fractions=(0.6, 0.2, 0.2))
    assert find_shared_images(records, split.rows) == []


def test_given_splits_report_shared_images(tmp_path, capsys):
    records = table(images=[7, 8, 9, 7], patients=[0, 1, 2, 3])
    file = tmp_path / "split.csv"
    file.write_text("id,split\n0.png,train\n1.png,validation\n2.png,test\n3.png,test\n")
    make_split(records, "files", files=file)
    assert "0.png (train) = 3.png (test)" in " ".join(capsys.readouterr().err.split())
