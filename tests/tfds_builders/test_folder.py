"""A user's own radiographs: folders of classes, and the six classes; and what is said of them."""

import gzip
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from user_images import fill, picture, run, said

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
    return fill(tmp_path / "mine", *FOLDERS)


def test_folders_are_parts_and_classes(folders, tmp_path):
    prepared, records = run("folder", tmp_path, source=folders)
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
    assert said(prepared, "7 images have no known patient, each counts as a patient of its own")
    assert len(prepared.notes) == 1
    split = make_split(records, "official")
    assert {name: len(rows) for name, rows in split.rows.items()} == {"train": 3, "validation": 2, "test": 2}


def test_without_a_validation_folder_it_is_drawn_of_training(tmp_path):
    names = [f"{part}/{kind}/{k}.png" for part in ("train", "test") for kind in ("x", "y") for k in range(6)]
    _, records = run("folder", tmp_path, source=fill(tmp_path / "mine", *names))
    split = make_split(records, "official", fractions=(0.5, 0.25, 0.25))
    assert {name: len(rows) for name, rows in split.rows.items()} == {"train": 8, "validation": 4, "test": 12}


def test_classes_without_parts(tmp_path):
    _, records = run("folder", tmp_path, source=fill(tmp_path / "mine", "sick/a.png", "well/b.png", "well/c.png"))
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
    prepared, records = run("folder", tmp_path, source=folders)
    row = {id: k for k, id in enumerate(records.id.tolist())}
    first, second = row["train/sick/a.png"], row["train/sick/deep/b.jpg"]
    assert records.patient[[first, second]].tolist() == ["7", "7"]
    assert records.view[[first, second]].tolist() == ["PA", "AP"]
    assert records.sex[[first, second]].tolist() == ["F", "M"]
    assert records.age[first] == 40
    assert math.isnan(records.age[second])
    assert records.source[[first, second, row["Validation/sick/d.JPEG"]]].tolist() == ["Here", "mine", "There"]
    assert said(prepared, "1 images have no known patient")
    assert said(prepared, "the given parts leak, split.name=official will be refused: patients in two splits (1): 7 (")
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
def test_wrong_metadata_is_named(folders, tmp_path, old, new, message):
    (folders / "metadata.csv").write_text(METADATA.replace(old, new))
    with pytest.raises(CxrError, match=message):
        run("folder", tmp_path, source=folders)


def test_the_same_file_twice_is_said(folders, tmp_path):
    shutil.copy(folders / "train/sick/a.png", folders / "test/odd/copy.png")
    prepared, _ = run("folder", tmp_path, source=folders)
    assert said(prepared, "1 images are the same file as another patient's (train/sick/a.png = test/odd/copy.png)")
    (folders / "metadata.csv").write_text("filename,patient\na.png,1\ncopy.png,1\n")
    prepared, _ = run("folder", tmp_path / "again", source=folders)
    assert not said(prepared, "same file"), "one patient's images stay together"


def test_files_that_are_no_images_are_counted(folders, tmp_path):
    (folders / "train/sick/readme.txt").write_text("")
    (folders / "train/sick/.hidden").write_text("")
    prepared, records = run("folder", tmp_path, source=folders)
    assert len(records) == 7
    assert said(prepared, "1 files are left out, their names are no image's: such as")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"0 classes \(none\); --source is a folder of train, validation and test"),
        (["train/sick/a.png"], r"1 classes \(sick\)"),
        (["train/x/a.png", "test/y/a.png", "extra/x/a.png"], "extra is none of train, validation and test, which are"),
        (["val/x/a.png", "valid/y/a.png"], "val and .*valid are both the validation part; keep one"),
        (["train/x/a.png", "train/y/a.png", "train/b.png"], r"1 images below .* not in the table: train/b.png"),
        (["x/a.txt", "y/b.txt"], "no image in the class folders of .*; images end in .png, .jpg"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, message):
    source = tmp_path / "mine"
    source.mkdir()
    with pytest.raises(CxrError, match=message):
        run("folder", tmp_path, source=fill(source, *names))


def test_no_source(tmp_path):
    with pytest.raises(CxrError, match="--source is missing"):
        run("folder", tmp_path)
    with pytest.raises(CxrError, match="nowhere does not exist"):
        run("folder", tmp_path, source=tmp_path / "nowhere")


def test_several_data_sets_have_names(folders, tmp_path):
    prepared, records = run("folder", tmp_path, source=folders, name="ward_3", called="ward_3")
    assert records.dataset == "ward_3"
    assert prepared.directory.parts[-3:] == ("ward_3", "32", "1.0.0")
    run("folder", tmp_path, source=folders)
    with pytest.raises(CxrError, match="data set name 'Ward 3': give small letters"):
        run("folder", tmp_path, source=folders, name="Ward 3")


def test_what_was_prepared_before_is_compared_with_the_source_of_now(folders, tmp_path):
    assert not run("folder", tmp_path, source=folders)[0].reused
    again, _ = run("folder", tmp_path, source=folders)
    assert again.reused
    assert said(again, "no known patient")
    (folders / "metadata.csv").write_text("filename,patient\na.png,7\n")
    with pytest.raises(CxrError, match="was prepared with another patient than the source has now; delete"):
        run("folder", tmp_path, source=folders)
    (folders / "metadata.csv").unlink()
    (folders / "test/odd/f.png").rename(folders / "test/odd/g.png")
    with pytest.raises(CxrError, match="was prepared from 7 images, not the 7 of"):
        run("folder", tmp_path, source=folders)
    (folders / "test/odd").rename(folders / "test/zany")
    (folders / "test/zany/g.png").rename(folders / "test/zany/f.png")
    with pytest.raises(CxrError, match="was prepared"):
        run("folder", tmp_path, source=folders)


def test_native_images_of_every_kind(tmp_path):
    source = fill(tmp_path / "mine", "x/a.png", "x/b.jpg", "y/c.png")
    (source / "y/c.png").write_bytes(picture(5, mode="RGB"))
    _, records = run("folder", tmp_path, source=source, size=None)
    stored = [records.image_bytes(row) for row in range(3)]
    assert stored[0] == (source / "x/a.png").read_bytes()
    assert stored[1] == (source / "x/b.jpg").read_bytes()
    np.testing.assert_array_equal(records.image(2), np.asarray(Image.open(io.BytesIO(picture(5)))))


def test_a_dicom_file_is_an_image_like_any_other(tmp_path):
    from pydicom.data import get_testdata_file

    source = fill(tmp_path / "mine", "x/a.png", "y/b.png")
    scan = get_testdata_file("MR_small.dcm", download=False)
    assert isinstance(scan, str)
    shutil.copy(scan, source / "y/scan.dcm")
    _, records = run("folder", tmp_path, source=source, size=64)
    pixels = records.image(2)
    assert records.id[2] == "y/scan.dcm"
    assert pixels.shape == (64, 64)
    assert np.ptp(pixels) > 150


# --- six classes


def test_the_six_classes(tmp_path):
    source = fill(
        tmp_path / "six", "train/Covid-19/x.jpg", "train/Covid-19/y.jpg", "train/No-Findings/00000005_003.png",
        "train/no findings/00000006_000.png", "test/Pneumonia/00000005_004.png",
        "validation/Effusions/00000007_000.png",
    )  # fmt: skip
    (source / "metadata.csv").write_text("filename,patientid,view,url\nx.jpg,221,AP Supine,https://example.org/covid\n")
    prepared, records = run("six_class", tmp_path, source=source)
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
    assert said(
        prepared, "every image of Covid-19 comes from https://example.org/covid, not NIH, and no image of another"
    )
    assert said(prepared, "patients in two splits (1): 00000005 (train and test)")
    assert said(prepared, "1 images have no known patient")


def test_a_seventh_class_is_refused(tmp_path):
    source = fill(tmp_path / "six", "train/Covid-19/x.jpg", "train/Mass/y.jpg")
    with pytest.raises(CxrError, match="Mass is none of the six classes; they are Covid-19, Effusions"):
        run("six_class", tmp_path, source=source)


def test_genuine_images_of_six_classes(shared, tmp_path):
    """NIH's and the COVID collection's own files, sorted into folders as the mixture has them."""
    source = tmp_path / "six"
    table = gzip.decompress((shared / "data/nih/Data_Entry_2017_v2020.csv.gz").read_bytes()).decode().splitlines()
    finding = {line.split(",")[0]: line.split(",")[1] for line in table}
    folder = {
        "Effusion": "Effusions", "Infiltration": "Infiltration", "No Finding": "No-Findings", "Pneumonia": "Pneumonia",
        "Pneumothorax": "Pneumothorax",
    }  # fmt: skip
    taken: dict[str, int] = {}
    for path in sorted((shared / "data/nih/images").iterdir()):
        name = folder.get(finding[path.name])
        if name and taken.setdefault(name, 0) < 2:
            part = ("train", "test")[taken[name]]
            taken[name] += 1
            (source / part / name).mkdir(parents=True)
            (source / part / name / path.name).symlink_to(path)
    covid = (shared / "data/covid/metadata.csv").read_text()
    for line in covid.splitlines()[1:8]:
        name, _, disease = line.split(",")[:3]
        if disease == "COVID-19":
            (source / "train/Covid-19").mkdir(parents=True, exist_ok=True)
            (source / "train/Covid-19" / name).symlink_to(shared / "data/covid" / name)
    (source / "metadata.csv").write_text(covid)
    prepared, records = run("six_class", tmp_path, source=source, size=64)
    assert set(taken) == set(folder.values())
    origin = "https://github.com/ml-workgroup/covid-19-image-repository"
    is_covid = records.labels[:, 0] == 1
    assert set(records.source[is_covid].tolist()) == {origin}
    assert set(records.source[~is_covid].tolist()) == {"NIH ChestX-ray14"}
    assert said(prepared, f"every image of Covid-19 comes from {origin}")
    assert not said(prepared, "no known patient")
    assert set(records.patient[is_covid].tolist()) <= {"263", "221", "254", "249", "230"}


def test_from_the_command_line(folders, tmp_path, capsys):
    words = ["--data-dir", str(tmp_path / "D"), "--size", "32", "--json", "-"]
    assert main(["prepare", "folder", "--source", str(folders), "--name", "ward", *words]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(open_records(tmp_path / "D", "ward", "32"))
