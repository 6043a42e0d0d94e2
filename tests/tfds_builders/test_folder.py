"""A user's radiographs in class folders, the six classes, and the notes about them."""

import gzip
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from user_images import has_note, image_bytes, prepare_and_open, write_images

from cxrjax.cli.main import main
from cxrjax.data.records import open_records
from cxrjax.data.splits import make_split
from cxrjax.errors import CxrError
from cxrjax.findings import SIX_CLASS

# --- folders


FOLDERS = (
    "train/sick/a.png", "train/sick/deep/b.jpg", "train/well/c.png", "Validation/sick/d.JPEG", "Validation/well/e.png",
    "test/well/a.png", "test/odd/f.png",
)  # fmt: skip


@pytest.fixture
def folders(tmp_path) -> Path:
    return write_images(tmp_path / "mine", *FOLDERS)


def test_folders_are_splits_and_classes(folders, tmp_path):
    prepared, records = prepare_and_open("folder", tmp_path, source=folders)
    assert records.findings == ("odd", "sick", "well")
    assert records.id.tolist() == [
        "Validation/sick/d.JPEG", "Validation/well/e.png", "test/odd/f.png", "test/well/a.png", "train/sick/a.png",
        "train/sick/deep/b.jpg", "train/well/c.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(records.labels.argmax(1), [1, 2, 0, 2, 1, 1, 2])
    np.testing.assert_array_equal(records.labels.sum(1), 1)
    assert records.labels.min() == 0
    assert records.official.tolist() == ["validation"] * 2 + ["test"] * 2 + ["train"] * 3
    assert records.exclusive
    assert set(records.source.tolist()) == {"mine"}
    assert records.patient.tolist() == records.id.tolist()
    assert has_note(prepared, "7 images have no patient id, so each counts as its own patient")
    assert len(prepared.notes) == 1
    split = make_split(records, "official")
    assert {name: len(rows) for name, rows in split.rows.items()} == {"train": 3, "validation": 2, "test": 2}


def test_validation_is_drawn_from_training_without_its_folder(tmp_path):
    names = [f"{split}/{kind}/{k}.png" for split in ("train", "test") for kind in ("x", "y") for k in range(6)]
    _, records = prepare_and_open("folder", tmp_path, source=write_images(tmp_path / "mine", *names))
    split = make_split(records, "official", fractions=(0.5, 0.25, 0.25))
    assert {name: len(rows) for name, rows in split.rows.items()} == {"train": 8, "validation": 4, "test": 12}


def test_classes_without_splits(tmp_path):
    _, records = prepare_and_open(
        "folder", tmp_path, source=write_images(tmp_path / "mine", "sick/a.png", "well/b.png", "well/c.png")
    )
    assert records.findings == ("sick", "well")
    assert set(records.official.tolist()) == {""}
    with pytest.raises(CxrError, match="3 images of folder are in no official split"):
        make_split(records, "official")


METADATA = (
    "filename,patientid,finding,view,sex,age,source,notes\n"
    "a.png,7,sick,PA,F,40,Here,\nb.jpg,7,sick,AP,male,,,\"two\nlines\"\nc.png,8,well,,,,,\nd.JPEG,9,sick,,,,There,\n"
    "e.png,10,well,,,,,\nf.png,,,,,,,\n"
)  # fmt: skip


def test_metadata_beside_the_folders(folders, tmp_path):
    (folders / "metadata.csv").write_text(METADATA)
    prepared, records = prepare_and_open("folder", tmp_path, source=folders)
    row = {id: k for k, id in enumerate(records.id.tolist())}
    first, second = row["train/sick/a.png"], row["train/sick/deep/b.jpg"]
    assert records.patient[[first, second]].tolist() == ["7", "7"]
    assert records.view[[first, second]].tolist() == ["PA", "AP"]
    assert records.sex[[first, second]].tolist() == ["F", "M"]
    assert records.age[first] == 40
    assert math.isnan(records.age[second])
    assert records.source[[first, second, row["Validation/sick/d.JPEG"]]].tolist() == ["Here", "mine", "There"]
    assert has_note(prepared, "1 images have no patient id")
    assert has_note(
        prepared, "the given splits leak, so split.name=official will be refused: patients in two splits (1): 7 ("
    )
    with pytest.raises(CxrError, match=r"patients in two splits \(1\): 7 \(train and test\)"):
        make_split(records, "official")
    split = make_split(records, "random", fractions=(0.5, 0.25, 0.25), seed=2)
    assert sum(map(len, split.rows.values())) == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filename", "file", "metadata.csv lacks the column filename; it has file, patientid"),
        (",40,", ",forty,", r"metadata.csv, line 2: age 'forty' is not a number of years"),
        ("c.png,8", "a.png,8", r"metadata.csv, line 5: a.png has a second row; keep one"),
        (",male,", ",man,", r"metadata.csv, line 4: sex 'man' is not M, F or empty"),
    ],
)
def test_invalid_metadata_is_named(folders, tmp_path, old, new, message):
    (folders / "metadata.csv").write_text(METADATA.replace(old, new))
    with pytest.raises(CxrError, match=message):
        prepare_and_open("folder", tmp_path, source=folders)


def test_duplicate_file_is_reported(folders, tmp_path):
    shutil.copy(folders / "train/sick/a.png", folders / "test/odd/copy.png")
    prepared, _ = prepare_and_open("folder", tmp_path, source=folders)
    assert has_note(prepared, "1 images are the same file as another patient's (train/sick/a.png = test/odd/copy.png)")
    (folders / "metadata.csv").write_text("filename,patient\na.png,1\ncopy.png,1\n")
    prepared, _ = prepare_and_open("folder", tmp_path / "again", source=folders)
    assert not has_note(prepared, "same file"), "duplicates of one patient are harmless"


def test_other_files_are_counted(folders, tmp_path):
    (folders / "train/sick/readme.txt").write_text("")
    (folders / "train/sick/.hidden").write_text("")
    prepared, records = prepare_and_open("folder", tmp_path, source=folders)
    assert len(records) == 7
    assert has_note(prepared, "1 files are skipped because of their suffix, such as")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"0 classes \(none\); --source must have folders train, validation and test"),
        (["train/sick/a.png"], r"1 classes \(sick\)"),
        (["train/x/a.png", "test/y/a.png", "extra/x/a.png"], "extra is not train, validation or test"),
        (["val/x/a.png", "valid/y/a.png"], "val and .*valid are both the validation split; keep one"),
        (["train/x/a.png", "train/y/a.png", "train/b.png"], r"1 images below .* not in the table: train/b.png"),
        (["x/a.txt", "y/b.txt"], "no image in the class folders of .*; images end in .png, .jpg"),
    ],
)
def test_unusable_folders_are_errors(tmp_path, names, message):
    source = tmp_path / "mine"
    source.mkdir()
    with pytest.raises(CxrError, match=message):
        prepare_and_open("folder", tmp_path, source=write_images(source, *names))


def test_missing_source_is_an_error(tmp_path):
    with pytest.raises(CxrError, match="--source is missing"):
        prepare_and_open("folder", tmp_path)
    with pytest.raises(CxrError, match="nowhere does not exist"):
        prepare_and_open("folder", tmp_path, source=tmp_path / "nowhere")


def test_data_set_name(folders, tmp_path):
    prepared, records = prepare_and_open("folder", tmp_path, source=folders, name="ward_3")
    assert records.dataset == "ward_3"
    assert prepared.directory.parts[-3:] == ("ward_3", "32", "1.0.0")
    prepare_and_open("folder", tmp_path, source=folders)
    with pytest.raises(CxrError, match="data set name 'Ward 3': use lower-case letters"):
        prepare_and_open("folder", tmp_path, source=folders, name="Ward 3")


def test_prepared_data_is_compared_with_the_source(folders, tmp_path):
    assert not prepare_and_open("folder", tmp_path, source=folders)[0].reused
    again, _ = prepare_and_open("folder", tmp_path, source=folders)
    assert again.reused
    assert has_note(again, "no patient id")
    (folders / "metadata.csv").write_text("filename,patient\na.png,7\n")
    with pytest.raises(CxrError, match="was prepared with another patient than the source has now; delete"):
        prepare_and_open("folder", tmp_path, source=folders)
    (folders / "metadata.csv").unlink()
    (folders / "test/odd/f.png").rename(folders / "test/odd/g.png")
    with pytest.raises(CxrError, match="was prepared from 7 images, not the 7 of"):
        prepare_and_open("folder", tmp_path, source=folders)
    (folders / "test/odd").rename(folders / "test/zany")
    (folders / "test/zany/g.png").rename(folders / "test/zany/f.png")
    with pytest.raises(CxrError, match="was prepared"):
        prepare_and_open("folder", tmp_path, source=folders)


def test_native_images_of_every_format(tmp_path):
    source = write_images(tmp_path / "mine", "x/a.png", "x/b.jpg", "y/c.png")
    (source / "y/c.png").write_bytes(image_bytes(5, mode="RGB"))
    _, records = prepare_and_open("folder", tmp_path, source=source, size=None)
    stored = [records.image_bytes(row) for row in range(3)]
    assert stored[0] == (source / "x/a.png").read_bytes()
    assert stored[1] == (source / "x/b.jpg").read_bytes()
    np.testing.assert_array_equal(records.image(2), np.asarray(Image.open(io.BytesIO(image_bytes(5)))))


def test_dicom_file_is_prepared(tmp_path):
    from pydicom.data import get_testdata_file

    source = write_images(tmp_path / "mine", "x/a.png", "y/b.png")
    scan = get_testdata_file("MR_small.dcm", download=False)
    assert isinstance(scan, str)
    shutil.copy(scan, source / "y/scan.dcm")
    _, records = prepare_and_open("folder", tmp_path, source=source, size=64)
    pixels = records.image(2)
    assert records.id[2] == "y/scan.dcm"
    assert pixels.shape == (64, 64)
    assert np.ptp(pixels) > 150


# --- six classes


def test_the_six_classes(tmp_path):
    source = write_images(
        tmp_path / "six", "train/Covid-19/x.jpg", "train/Covid-19/y.jpg", "train/No-Findings/00000005_003.png",
        "train/no findings/00000006_000.png", "test/Pneumonia/00000005_004.png",
        "validation/Effusions/00000007_000.png",
    )  # fmt: skip
    (source / "metadata.csv").write_text("filename,patientid,view,url\nx.jpg,221,AP Supine,https://example.org/covid\n")
    prepared, records = prepare_and_open("six_class", tmp_path, source=source)
    assert records.findings == SIX_CLASS
    row = {Path(id).name: k for k, id in enumerate(records.id.tolist())}
    order = [row[name] for name in ("x.jpg", "y.jpg", "00000005_003.png", "00000006_000.png", "00000005_004.png")]
    assert [SIX_CLASS[k] for k in records.labels[order].argmax(1)] == [
        "Covid-19", "Covid-19", "No-Findings", "No-Findings", "Pneumonia",
    ]  # fmt: skip
    nih = "NIH ChestX-ray14"
    assert records.source[order].tolist() == ["https://example.org/covid", "not NIH", nih, nih, nih]
    assert records.patient[order].tolist() == ["221", "train/Covid-19/y.jpg", "00000005", "00000006", "00000005"]
    assert records.study[order[2]] == "00000005_003"
    assert records.view[order[0]] == "AP Supine"
    assert has_note(
        prepared, "every image of Covid-19 comes from https://example.org/covid, not NIH, and no image of another"
    )
    assert has_note(prepared, "patients in two splits (1): 00000005 (train and test)")
    assert has_note(prepared, "1 images have no patient id")


def test_seventh_class_is_an_error(tmp_path):
    source = write_images(tmp_path / "six", "train/Covid-19/x.jpg", "train/Mass/y.jpg")
    with pytest.raises(CxrError, match="Mass is not one of the six classes Covid-19, Effusions"):
        prepare_and_open("six_class", tmp_path, source=source)


def test_real_images_of_six_classes(shared, tmp_path):
    """Files of NIH and the COVID collection, sorted into class folders."""
    source = tmp_path / "six"
    table = gzip.decompress((shared / "data/nih/Data_Entry_2017_v2020.csv.gz").read_bytes()).decode().splitlines()
    finding = {line.split(",")[0]: line.split(",")[1] for line in table}
    folder = {
        "Effusion": "Effusions", "Infiltration": "Infiltration", "No Finding": "No-Findings", "Pneumonia": "Pneumonia",
        "Pneumothorax": "Pneumothorax",
    }  # fmt: skip
    counts: dict[str, int] = {}
    for path in sorted((shared / "data/nih/images").iterdir()):
        name = folder.get(finding[path.name])
        if name and counts.setdefault(name, 0) < 2:
            split = ("train", "test")[counts[name]]
            counts[name] += 1
            (source / split / name).mkdir(parents=True)
            (source / split / name / path.name).symlink_to(path)
    covid = (shared / "data/covid/metadata.csv").read_text()
    for line in covid.splitlines()[1:8]:
        name, _, disease = line.split(",")[:3]
        if disease == "COVID-19":
            (source / "train/Covid-19").mkdir(parents=True, exist_ok=True)
            (source / "train/Covid-19" / name).symlink_to(shared / "data/covid" / name)
    (source / "metadata.csv").write_text(covid)
    prepared, records = prepare_and_open("six_class", tmp_path, source=source, size=64)
    assert set(counts) == set(folder.values())
    covid_source = "https://github.com/ml-workgroup/covid-19-image-repository"
    is_covid = records.labels[:, 0] == 1
    assert set(records.source[is_covid].tolist()) == {covid_source}
    assert set(records.source[~is_covid].tolist()) == {"NIH ChestX-ray14"}
    assert has_note(prepared, f"every image of Covid-19 comes from {covid_source}")
    assert not has_note(prepared, "no patient id")
    assert set(records.patient[is_covid].tolist()) <= {"263", "221", "254", "249", "230"}


def test_from_the_command_line(folders, tmp_path, capsys):
    arguments = ["--data-dir", str(tmp_path / "D"), "--size", "32", "--json", "-"]
    assert main(["prepare", "folder", "--source", str(folders), "--name", "ward", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(open_records(tmp_path / "D", "ward", "32"))
