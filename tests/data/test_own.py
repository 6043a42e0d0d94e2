"""A user's own radiographs: folders of classes, the six classes, tables; and what is said of them."""

import gzip
import io
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cxrjax.cli import main
from cxrjax.data.prepare import prepare
from cxrjax.data.records import open_records
from cxrjax.data.splits import make_split
from cxrjax.errors import CxrError
from cxrjax.findings import SIX_CLASS


def picture(seed=0, format="PNG", mode="L") -> bytes:
    noise = np.random.default_rng(seed).normal(128, 60, (40, 40)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0)).convert(mode).save(stream, format)
    return stream.getvalue()


def fill(folder: Path, *names: str) -> Path:
    """Write a different image under each name; the same in the same test."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(name.encode()) + 1000 * len(list(folder.rglob("*")))
        path.write_bytes(picture(seed, "JPEG" if name.endswith(("jpg", "jpeg")) else "PNG"))
    return folder


def run(dataset, tmp_path, called=None, size=32, **options):
    prepared = prepare(dataset, data_dir=tmp_path / "D", size=size, **options)
    return prepared, open_records(tmp_path / "D", called or dataset, str(size or "native"))


def said(prepared, text):
    return any(text in note for note in prepared.notes)


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
    assert {part: len(rows) for part, rows in split.parts.items()} == {"train": 3, "validation": 2, "test": 2}


def test_without_a_validation_folder_it_is_drawn_of_training(tmp_path):
    names = [f"{part}/{kind}/{k}.png" for part in ("train", "test") for kind in ("x", "y") for k in range(6)]
    _, records = run("folder", tmp_path, source=fill(tmp_path / "mine", *names))
    split = make_split(records, "official", fractions=(0.5, 0.25, 0.25))
    assert {part: len(rows) for part, rows in split.parts.items()} == {"train": 8, "validation": 4, "test": 12}


def test_classes_without_parts(tmp_path):
    _, records = run("folder", tmp_path, source=fill(tmp_path / "mine", "sick/a.png", "well/b.png", "well/c.png"))
    assert records.findings == ("sick", "well")
    assert set(records.official.tolist()) == {""}
    with pytest.raises(CxrError, match="3 images of folder are in no official part"):
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
    assert said(prepared, "the given parts leak, split.name=official will be refused: patients in two parts (1): 7 (")
    with pytest.raises(CxrError, match=r"patients in two parts \(1\): 7 \(train and test\)"):
        make_split(records, "official")
    split = make_split(records, "random", fractions=(0.5, 0.25, 0.25), seed=2)
    assert sum(map(len, split.parts.values())) == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filename", "file", "metadata.csv lacks the column filename; it has file, patientid"),
        (",40,", ",forty,", r"metadata.csv, line 2: age 'forty' is not a number of years"),
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
    assert said(prepared, "patients in two parts (1): 00000005 (train and test)")
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


# --- tables


TABLE = (
    "path,Mass,Nodule,who,view,age,part\n"
    "a.png,1,0,p1,PA,50,train\nsub/b.jpg,-1,,p1,AP,,train\nc.png,0,1.0,p2,,,test\nd.png,,-1.0,,,61.5,val\n"
)  # fmt: skip
LISTED = {"image_column": "path", "label_columns": ("Mass", "Nodule"), "patient_column": "who"}


@pytest.fixture
def listed(tmp_path) -> Path:
    """A table beside its images."""
    fill(tmp_path / "listed", "a.png", "sub/b.jpg", "c.png", "d.png", "not listed.png")
    (tmp_path / "listed/labels.csv").write_text(TABLE)
    return tmp_path / "listed/labels.csv"


def test_a_table_of_findings(listed, tmp_path):
    prepared, records = run("table", tmp_path, table=listed, **LISTED)
    assert records.findings == ("Mass", "Nodule")
    assert records.id.tolist() == ["a.png", "sub/b.jpg", "c.png", "d.png"]
    np.testing.assert_array_equal(records.labels, [[1, 0], [-1, -2], [0, 1], [-2, -1]])
    assert records.patient.tolist() == ["p1", "p1", "p2", "d.png"]
    assert records.view.tolist() == ["PA", "AP", "", ""]
    np.testing.assert_array_equal(records.age, [50, math.nan, math.nan, 61.5])
    assert records.official.tolist() == ["train", "train", "test", "validation"]
    assert set(records.source.tolist()) == {"listed"}
    assert not records.exclusive
    assert [note for note in prepared.notes if "no known patient" not in note] == []
    assert said(prepared, "1 images have no known patient")
    expected = cv2.resize(np.asarray(Image.open(listed.parent / "a.png")), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(records.image(0).astype(float) - expected).mean() < 1.5


def test_the_images_may_lie_elsewhere(listed, tmp_path):
    table = tmp_path / "labels.csv.gz"
    table.write_bytes(gzip.compress(listed.read_bytes()))
    _, records = run("table", tmp_path, table=table, source=listed.parent, **LISTED)
    assert len(records) == 4


def test_a_table_of_exclusive_classes(listed, tmp_path):
    listed.write_text("file,kind,from\na.png,sick,A\nsub/b.jpg,well,B\nc.png,sick,A\n")
    text = listed.read_text().replace("from", "source")
    listed.write_text(text)
    prepared, records = run("table", tmp_path, table=listed, image_column="file", class_column="kind")
    assert records.findings == ("sick", "well")
    np.testing.assert_array_equal(records.labels, [[1, 0], [0, 1], [1, 0]])
    assert records.exclusive
    assert records.source.tolist() == ["A", "B", "A"]
    assert said(prepared, "every image of sick comes from A, and no image of another class does")
    assert said(prepared, "3 images have no known patient")


def test_the_covid_collections_own_table(shared, tmp_path):
    table = shared / "data/covid/metadata.csv"
    columns = {"image_column": "filename", "class_column": "finding", "patient_column": "patientid"}
    prepared, records = run("table", tmp_path, table=table, name="covid", called="covid", **columns)
    assert len(records) == len(table.read_text().splitlines()) - 1
    assert records.findings == ("COVID-19", "No Finding", "Pneumocystis")
    assert {"PA", "AP", "AP Supine"} == set(records.view.tolist())
    assert said(
        prepared, "every image of Pneumocystis comes from https://radiopaedia.org/cases/pneumocystis-pneumonia-1"
    )
    assert not said(prepared, "no known patient")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Nodule", "Nodul", "labels.csv lacks the column Nodule; it has path, Mass, Nodul, who"),
        ("c.png,0", "c.png,2", r"labels.csv, line 4: Mass is '2'; a label is 1, 0, -1 \(uncertain\) or empty"),
        ("c.png", "a.png", "image a.png has two rows, lines 2 and 4"),
        ("c.png", "", "line 4: path is empty; it names the image"),
        ("61.5", "old", "line 5: age 'old' is not a number"),
        (",test", ",holdout", "line 4: unknown part 'holdout'; parts are train, validation and test"),
        ("d.png", "e.png", r"1 of the table's 4 images are not below .*: e.png; .*--allow-missing"),
    ],
)
def test_a_wrong_table_names_the_row(listed, tmp_path, old, new, message):
    assert old in TABLE
    listed.write_text(TABLE.replace(old, new, 1))
    with pytest.raises(CxrError, match=message):
        run("table", tmp_path, table=listed, **LISTED)


def test_a_missing_image_can_be_let_pass(listed, tmp_path):
    (listed.parent / "c.png").unlink()
    prepared, records = run("table", tmp_path, table=listed, allow_missing=True, **LISTED)
    assert prepared.missing == ["c.png"]
    assert len(records) == 3


def test_a_table_whose_images_are_elsewhere(listed, tmp_path):
    with pytest.raises(
        CxrError, match=r"none of the 4 images of the table is below .*: a.png, sub/b.jpg, c.png, d.png"
    ):
        run("table", tmp_path, table=listed, source=tmp_path, **LISTED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "path"}, "needs --table, --image-column, and --label-columns or --class-column"),
        ({"label_columns": ("Mass",)}, "needs --table, --image-column, and --label-columns or --class-column"),
        ({**LISTED, "class_column": "who"}, "give --label-columns or --class-column"),
        (
            {"image_column": "path", "class_column": "who"},
            "labels.csv, line 5: who is empty; every image needs a class",
        ),
        ({**LISTED, "labels": "negbio"}, "table has no option 'labels'; its options are name, table, image_column"),
    ],
)
def test_wrong_options(listed, tmp_path, options, message):
    with pytest.raises(CxrError, match=message):
        run("table", tmp_path, table=listed, **options)


def test_changed_labels_are_noticed(listed, tmp_path):
    run("table", tmp_path, table=listed, **LISTED)
    assert run("table", tmp_path, table=listed, **LISTED)[0].reused
    listed.write_text(TABLE.replace("a.png,1,0", "a.png,1,1"))
    with pytest.raises(CxrError, match="was prepared with another label_Nodule than the source has now; delete"):
        run("table", tmp_path, table=listed, **LISTED)
    with pytest.raises(CxrError, match="was prepared with findings Mass, Nodule"):
        run("table", tmp_path, table=listed, **LISTED | {"label_columns": ("Nodule",)})


def test_from_the_command_line(listed, folders, tmp_path, capsys):
    words = ["--data-dir", str(tmp_path / "D"), "--size", "32", "--json", "-"]
    columns = ["--image-column", "path", "--label-columns", "Mass,Nodule", "--patient-column", "who"]
    assert main(["prepare", "table", "--table", str(listed), *columns, *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["patients"] == 3
    assert "no known patient" in err
    assert main(["prepare", "folder", "--source", str(folders), "--name", "ward", *words]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(open_records(tmp_path / "D", "ward", "32"))
    assert main(["prepare", "table", *words]) == 1
    assert "needs --table" in capsys.readouterr().err
