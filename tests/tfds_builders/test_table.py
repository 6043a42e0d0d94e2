"""Radiographs listed in a user's table."""

import gzip
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from user_images import has_note, prepare_and_open, write_images

from cxrjax.cli.main import main
from cxrjax.errors import CxrError

TABLE = (
    "path,Mass,Nodule,who,view,age,split\n"
    "a.png,1,0,p1,PA,50,train\nsub/b.jpg,-1,,p1,AP,,train\nc.png,0,1.0,p2,,,test\nd.png,,-1.0,,,61.5,val\n"
)  # fmt: skip
LISTED = {"image_column": "path", "label_columns": ("Mass", "Nodule"), "patient_column": "who"}


@pytest.fixture
def listed(tmp_path) -> Path:
    """A table next to its images."""
    write_images(tmp_path / "listed", "a.png", "sub/b.jpg", "c.png", "d.png", "not listed.png")
    (tmp_path / "listed/labels.csv").write_text(TABLE)
    return tmp_path / "listed/labels.csv"


def test_table_of_findings(listed, tmp_path):
    prepared, records = prepare_and_open("table", tmp_path, table=listed, **LISTED)
    assert records.findings == ("Mass", "Nodule")
    assert records.id.tolist() == ["a.png", "sub/b.jpg", "c.png", "d.png"]
    np.testing.assert_array_equal(records.labels, [[1, 0], [-1, -2], [0, 1], [-2, -1]])
    assert records.patient.tolist() == ["p1", "p1", "p2", "d.png"]
    assert records.view.tolist() == ["PA", "AP", "", ""]
    np.testing.assert_array_equal(records.age, [50, math.nan, math.nan, 61.5])
    assert records.official.tolist() == ["train", "train", "test", "validation"]
    assert set(records.source.tolist()) == {"listed"}
    assert not records.exclusive
    assert [note for note in prepared.notes if "no patient id" not in note] == []
    assert has_note(prepared, "1 images have no patient id")
    expected = cv2.resize(np.asarray(Image.open(listed.parent / "a.png")), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(records.image(0).astype(float) - expected).mean() < 1.5


def test_images_may_be_elsewhere(listed, tmp_path):
    table = tmp_path / "labels.csv.gz"
    table.write_bytes(gzip.compress(listed.read_bytes()))
    _, records = prepare_and_open("table", tmp_path, table=table, source=listed.parent, **LISTED)
    assert len(records) == 4


def test_table_of_exclusive_classes(listed, tmp_path):
    listed.write_text("file,kind,from\na.png,sick,A\nsub/b.jpg,well,B\nc.png,sick,A\n")
    text = listed.read_text().replace("from", "source")
    listed.write_text(text)
    prepared, records = prepare_and_open("table", tmp_path, table=listed, image_column="file", class_column="kind")
    assert records.findings == ("sick", "well")
    np.testing.assert_array_equal(records.labels, [[1, 0], [0, 1], [1, 0]])
    assert records.exclusive
    assert records.source.tolist() == ["A", "B", "A"]
    assert has_note(prepared, "every image of sick comes from A, and no image of another class does")
    assert has_note(prepared, "3 images have no patient id")


def test_covid_collection(shared, tmp_path):
    table = shared / "data/covid/metadata.csv"
    columns = {"image_column": "filename", "class_column": "finding", "patient_column": "patientid"}
    prepared, records = prepare_and_open("table", tmp_path, table=table, name="covid", **columns)
    assert len(records) == len(table.read_text().splitlines()) - 1
    assert records.findings == ("COVID-19", "No Finding", "Pneumocystis")
    assert {"PA", "AP", "AP Supine"} == set(records.view.tolist())
    assert has_note(
        prepared, "every image of Pneumocystis comes from https://radiopaedia.org/cases/pneumocystis-pneumonia-1"
    )
    assert not has_note(prepared, "no patient id")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Nodule", "Nodul", "labels.csv lacks the column Nodule; it has path, Mass, Nodul, who"),
        ("c.png,0", "c.png,2", r"labels.csv, line 4: Mass is '2'; a label is 1, 0, -1 \(uncertain\) or empty"),
        ("c.png", "a.png", "image a.png has two rows, lines 2 and 4"),
        ("c.png", "", "line 4: path is empty; give the image's path"),
        ("61.5", "old", "line 5: age 'old' is not a number"),
        (",test", ",holdout", "line 4: unknown split 'holdout'; use train, validation or test"),
        ("d.png", "e.png", r"1 of the table's 4 images are not below .*: e.png; .*--allow-missing"),
    ],
)
def test_invalid_table_names_the_row(listed, tmp_path, old, new, message):
    assert old in TABLE
    listed.write_text(TABLE.replace(old, new, 1))
    with pytest.raises(CxrError, match=message):
        prepare_and_open("table", tmp_path, table=listed, **LISTED)


def test_allow_missing_skips_an_image(listed, tmp_path):
    (listed.parent / "c.png").unlink()
    prepared, records = prepare_and_open("table", tmp_path, table=listed, allow_missing=True, **LISTED)
    assert prepared.missing == ["c.png"]
    assert len(records) == 3


def test_no_image_of_the_table_exists(listed, tmp_path):
    with pytest.raises(
        CxrError, match=r"none of the 4 images of the table is below .*: a.png, sub/b.jpg, c.png, d.png"
    ):
        prepare_and_open("table", tmp_path, table=listed, source=tmp_path, **LISTED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "path"}, "needs --table, --image-column, and --label-columns or --class-column"),
        ({"label_columns": ("Mass",)}, "needs --table, --image-column, and --label-columns or --class-column"),
        ({**LISTED, "class_column": "who"}, "give either --label-columns or --class-column"),
        (
            {"image_column": "path", "class_column": "who"},
            "labels.csv, line 5: who is empty; every image needs a class",
        ),
        (
            {**LISTED, "labels": "negbio"},
            "table has no option 'labels'; its options are aspect, name, table, image_column",
        ),
    ],
)
def test_invalid_options_are_errors(listed, tmp_path, options, message):
    with pytest.raises(CxrError, match=message):
        prepare_and_open("table", tmp_path, table=listed, **options)


def test_changed_labels_are_an_error(listed, tmp_path):
    prepare_and_open("table", tmp_path, table=listed, **LISTED)
    assert prepare_and_open("table", tmp_path, table=listed, **LISTED)[0].reused
    listed.write_text(TABLE.replace("a.png,1,0", "a.png,1,1"))
    with pytest.raises(CxrError, match="was prepared with another label_Nodule than the source has now; delete"):
        prepare_and_open("table", tmp_path, table=listed, **LISTED)
    with pytest.raises(CxrError, match="was prepared with findings Mass, Nodule"):
        prepare_and_open("table", tmp_path, table=listed, **LISTED | {"label_columns": ("Nodule",)})


def test_from_the_command_line(listed, tmp_path, capsys):
    arguments = ["--data-dir", str(tmp_path / "D"), "--size", "32", "--json", "-"]
    columns = ["--image-column", "path", "--label-columns", "Mass,Nodule", "--patient-column", "who"]
    assert main(["prepare", "table", "--table", str(listed), *columns, *arguments]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["patients"] == 3
    assert "no patient id" in err
    assert main(["prepare", "table", *arguments]) == 1
    assert "needs --table" in capsys.readouterr().err
