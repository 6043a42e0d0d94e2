"""Images under another name: found by their content, and kept in one part."""

import hashlib
import math

import numpy as np
import pytest

from cxrjax.data.records import Record, Records
from cxrjax.data.splits import make_split, find_shared_images


def table(images, patients, official="train_val"):
    """Records of these images (by content, "" unknown) of these patients."""
    digests = [hashlib.sha256(str(image).encode()).hexdigest() if image != "" else "" for image in images]
    records = [
        Record(f"{k}.png", f"p{patient}", "", "PA", math.nan, "F", "x", (k % 2,), official, sha256=digest)
        for k, (patient, digest) in enumerate(zip(patients, digests, strict=True))
    ]
    return Records.from_records(records, ("A",), dataset="x")


def test_patients_who_share_an_image_are_one_also_by_way_of_others():
    records = table(images=[1, 2, 2, 3, 3, 4, "", ""], patients=[0, 0, 1, 1, 2, 3, 4, 5])
    assert records.patient_groups.tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_without_duplicates_people_are_patients():
    records = table(images=range(6), patients=[2, 1, 2, 0, 1, 0])
    assert records.patient_groups.tolist() == [2, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("name", ["random", "stratified", "folds", "small"])
@pytest.mark.parametrize("seed", range(5))
def test_drawn_parts_keep_an_image_in_one_part(name, seed):
    rng = np.random.default_rng(seed)
    records = table(images=rng.integers(0, 900, 300), patients=np.arange(300) // 2)
    split = make_split(records, name, seed=seed, sizes=(20, 10, 10), fractions=(0.6, 0.2, 0.2))
    assert find_shared_images(records, split.rows) == []


def test_given_parts_name_what_they_share(tmp_path, capsys):
    records = table(images=[7, 8, 9, 7], patients=[0, 1, 2, 3])
    file = tmp_path / "split.csv"
    file.write_text("id,split\n0.png,train\n1.png,validation\n2.png,test\n3.png,test\n")
    make_split(records, "files", files=file)
    assert "0.png (train) = 3.png (test)" in " ".join(capsys.readouterr().err.split())
