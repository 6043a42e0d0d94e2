"""MIMIC-CXR-JPG from a folder with its layout, file names and headers."""

import gzip
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cxrjax.cli.main import main
from cxrjax.data.records import open_records
from cxrjax.data.splits import make_split
from cxrjax.errors import CxrError
from cxrjax.findings import CHEXPERT14
from tfds_builders.mimic_cxr_jpg.mimic_cxr_jpg_dataset_builder import Builder
from tfds_builders.prepare import prepare

LABELS = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
SPLIT = "dicom_id,study_id,subject_id,split"

A, B, C, D, E, F = (f"{k}{k}aa4e21-2d25b1e5-d77c8c12-2fd5f4aa-{k}0a5c8d1" for k in "023456")  # as long as dicom_ids are
IMAGES = {  # id: study, subject, split, view
    A: ("50414267", "10000032", "train", "PA"),
    B: ("50414267", "10000032", "train", "LATERAL"),
    C: ("53189527", "10000032", "train", "AP"),
    D: ("50000014", "10000980", "validate", "AP"),
    E: ("50010466", "19999987", "test", ""),
    F: ("58708861", "10000764", "train", "PA"),
}
CHEXPERT = [
    "10000032,50414267,,,,,,,,,1.0,,,,,",
    "10000032,53189527,1.0,0.0,-1.0,,,,,,,,,,,1.0",
    "10000980,50000014,,,,1.0,,,,,,-1.0,,,,",
    "19999987,50010466,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,,0.0,0.0,0.0,0.0,0.0",
]  # 58708861 has no row
NEGBIO = ["10000032,50414267,,1.0,,,,,,,,,,,,", *CHEXPERT[1:], "10000764,58708861,,,,,,,,,1.0,,,,,"]


def jpeg(seed) -> bytes:
    noise = np.random.default_rng(seed).normal(128, 60, (60, 50)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (7, 7), 0)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write(folder: Path, kind: str, lines: list[str], packed: bool = True) -> None:
    data = ("\n".join(lines) + "\n").encode()
    for old in folder.glob(f"mimic-cxr-2.0.0-{kind}.csv*"):
        old.unlink()
    name = f"mimic-cxr-2.0.0-{kind}.csv"
    (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """An archive in PhysioNet's layout with six images, which are all that is published."""
    monkeypatch.setattr(
        Builder, "PUBLISHED_COUNTS", {"images": 6, "patients": 4, "train": 4, "validation": 1, "test": 1}
    )
    folder = tmp_path / "mimic-cxr-jpg-2.0.0"
    for k, (id, (study, subject, _, _)) in enumerate(IMAGES.items()):
        path = folder / f"files/p{subject[:2]}/p{subject}/s{study}/{id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(k))
        (path.parent / "index.html").write_text("left by wget")
    write(
        folder,
        "split",
        [SPLIT, *(f"{id},{study},{subject},{split}" for id, (study, subject, split, _) in IMAGES.items())],
    )
    write(folder, "chexpert", [LABELS, *CHEXPERT])
    write(folder, "negbio", [LABELS, *NEGBIO])
    rest = "60,50,21800506,213014.531,CHEST (PA AND LAT),postero-anterior,Erect"
    rows = [
        f"{id},{subject},{study},CHEST (PA AND LAT),{view},{rest}" for id, (study, subject, _, view) in IMAGES.items()
    ]
    write(folder, "metadata", [METADATA, *rows])
    return folder


def run(source, tmp_path, size: int | None = 224, **options):
    prepared = prepare("mimic_cxr_jpg", source=source, data_dir=tmp_path / "D", size=size, **options)
    return prepared, open_records(tmp_path / "D", "mimic_cxr_jpg", str(size or "native"))


def nothing_is_left(tmp_path):
    return not list((tmp_path / "D").glob("mimic_cxr_jpg/*/*[0-9].[0-9]*"))


def test_records_from_the_tables(source, tmp_path, capsys):
    prepared, records = run(source, tmp_path)
    assert (prepared.images, prepared.patients, prepared.missing, prepared.unlisted) == (6, 4, [], [])
    assert records.findings == CHEXPERT14
    assert records.id.tolist() == [*IMAGES]
    assert records.study.tolist() == [study for study, *_ in IMAGES.values()]
    assert records.patient.tolist() == [subject for _, subject, _, _ in IMAGES.values()]
    assert records.view.tolist() == ["PA", "LATERAL", "AP", "AP", "", "PA"]
    assert records.official.tolist() == ["train", "train", "train", "validation", "test", "train"]
    assert set(records.source.tolist()) == {"MIMIC-CXR-JPG"}
    assert np.isnan(records.age).all()
    assert set(records.sex.tolist()) == {""}
    silent = [-2] * 14
    no_finding = [*silent[:8], 1, *silent[9:]]
    np.testing.assert_array_equal(
        records.labels,
        [
            no_finding,
            no_finding,
            [1, 0, -1, *silent[:10], 1],
            [*silent[:3], 1, *silent[:5], -1, *silent[:4]],
            [0] * 8 + [-2] + [0] * 5,
            silent,
        ],
    )
    note = "no chexpert labels for 1 studies, such as 58708861: all their findings are not mentioned"
    assert prepared.notes == [note]
    assert note in capsys.readouterr().err


def test_official_split(source, tmp_path):
    _, records = run(source, tmp_path)
    split = make_split(records, "official", seed=4)
    assert {name: rows.tolist() for name, rows in split.rows.items()} == {
        "train": [0, 1, 2, 5], "validation": [3], "test": [4],
    }  # fmt: skip


def test_negbio_labels(source, tmp_path):
    prepared, records = run(source, tmp_path, labels="negbio")
    assert not prepared.notes
    cardiomegaly, none = CHEXPERT14.index("Cardiomegaly"), CHEXPERT14.index("No Finding")
    assert records.labels[[0, 1], cardiomegaly].tolist() == [1, 1]
    assert records.labels[[0, 5], none].tolist() == [-2, 1]
    with pytest.raises(CxrError, match="was prepared with labels negbio, not chexpert; delete"):
        run(source, tmp_path)
    again, _ = run(source, tmp_path, labels="negbio")
    assert again.reused
    with pytest.raises(CxrError, match="labels 'vista' are not in MIMIC-CXR-JPG; choose chexpert or negbio"):
        run(source, tmp_path, labels="vista")


def edit_table(source, kind, edit, packed=True):
    path = source / f"mimic-cxr-2.0.0-{kind}.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    write(source, kind, edit(lines), packed)


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("metadata", lambda lines: [",".join([*(w := line.split(","))[:9], "extra", *w[9:]]) for line in lines]),
        ("split", lambda lines: [",".join(reversed(line.split(","))) for line in lines]),
        ("chexpert", lambda lines: [line.replace("1.0", "1") for line in lines]),
        ("chexpert", lambda lines: ["\ufeff" + lines[0], *(line + "\r" for line in lines[1:])]),
        ("metadata", lambda lines: [line.replace("CHEST (PA AND LAT)", '"CHEST, PA\n AND LAT"') for line in lines]),
    ],
    ids=["additional column", "another order", "whole numbers", "byte order mark", "quoted line break"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_copies_of_the_tables(source, tmp_path, kind, edit, packed):
    expected = [(r.id, r.view, r.labels, r.official) for r in Builder(source=source).select().records]
    edit_table(source, kind, edit, packed)
    assert [(r.id, r.view, r.labels, r.official) for r in Builder(source=source).select().records] == expected


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("split", "split", "fold", r"split.csv.gz lacks the column split; it has dicom_id, study_id, subject_id, fold"),
        ("split", "validate", "holdout", r"split.csv.gz, line 5: unknown split 'holdout'"),
        ("split", B, A, r"image 00aa.* has two rows, lines 2 and 3; keep one"),
        ("chexpert", "Edema", "Oedema", r"chexpert.csv.gz lacks the column Edema"),
        (
            "chexpert",
            "1.0,0.0,-1.0",
            "1.0,2.0,-1.0",
            r"chexpert.csv.gz, line 3: Cardiomegaly is '2.0'; a label is 1, 0",
        ),
        ("chexpert", "53189527,1.0", "53189527,yes", r"line 3: Atelectasis is 'yes'"),
        ("chexpert", "50000014", "53189527", r"line 4: study 53189527 has a second row; keep one"),
        ("metadata", B, A, r"metadata.csv.gz, line 3: image 00aa.* has a second row; keep one"),
        ("metadata", "ViewPosition", "View", r"metadata.csv.gz lacks the column ViewPosition"),
        (
            "split",
            "10000980,validate",
            "10000032,validate",
            r"patients in two splits \(1\): 10000032 \(validation and train",
        ),
    ],
)
def test_invalid_table_is_an_error_that_names_the_row(source, tmp_path, kind, old, new, message):
    text = gzip.decompress((source / f"mimic-cxr-2.0.0-{kind}.csv.gz").read_bytes()).decode()
    assert old in text
    edit_table(source, kind, lambda lines: "\n".join(lines).replace(old, new, 1).split("\n"))
    with pytest.raises(CxrError, match=message):
        run(source, tmp_path)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("kind", ["split", "metadata", "chexpert"])
def test_missing_table_is_an_error(source, tmp_path, kind):
    (source / f"mimic-cxr-2.0.0-{kind}.csv.gz").unlink()
    page = "https://physionet.org/content/mimic-cxr-jpg/"
    with pytest.raises(CxrError, match=rf"no mimic-cxr-2.0.0-{kind}.csv.gz anywhere below .*; get it from {page}"):
        run(source, tmp_path)


def test_newest_table_is_read(source):
    data = (source / "mimic-cxr-2.0.0-negbio.csv.gz").read_bytes()
    (source / "mimic-cxr-2.1.0-chexpert.csv.gz").write_bytes(data)
    assert not Builder(source=source).select().notes


def image(source, id) -> Path:
    return next(source.rglob(f"{id}.jpg"))


def test_missing_images_are_an_error(source, tmp_path):
    image(source, D).unlink()
    with pytest.raises(CxrError, match=r"1 of the table's 6 images are not below .*: 44aa.*--allow-missing"):
        run(source, tmp_path)
    assert nothing_is_left(tmp_path)
    prepared, records = run(source, tmp_path, allow_missing=True)
    assert prepared.missing == [D]
    assert len(records) == 5


def test_source_with_few_images_is_a_subset(source, tmp_path, capsys):
    for id in (C, D, E, F):
        image(source, id).unlink()
    prepared, records = run(source, tmp_path)
    assert records.id.tolist() == [A, B]
    assert prepared.notes == ["subset: 2 of the 6 images in the table are prepared, 4 are not in the source"], (
        "all existing images have labels"
    )


def test_unlisted_image_is_an_error(source, tmp_path):
    (source / "files/scan.jpg").write_bytes(jpeg(9))
    with pytest.raises(CxrError, match=r"1 images below .* are not in the table: scan; .*--allow-missing"):
        run(source, tmp_path)


def test_image_without_metadata_has_no_view(source, tmp_path):
    edit_table(source, "metadata", lambda lines: lines[:-1])
    prepared, records = run(source, tmp_path)
    assert records.view[5] == ""
    assert "no metadata for 1 images: their view is unknown" in prepared.notes


def test_image_of_another_size_is_reported(source, tmp_path):
    edit_table(
        source, "metadata", lambda lines: [line.replace("60,50", "3056,2544") if B in line else line for line in lines]
    )
    prepared, _ = run(source, tmp_path)
    note = f"1 images have another size than the table says: {B} is 50 x 60 px, not 2544 x 3056"
    assert note in prepared.notes
    assert note in run(source, tmp_path)[0].notes, "also for prepared data"
    edit_table(source, "metadata", lambda lines: [line.replace("60,50", "60,") for line in lines])
    with pytest.raises(CxrError, match=r"metadata.csv.gz, line 2: Rows and Columns are '60' and ''"):
        run(source, tmp_path)


def test_unpublished_counts_are_reported(source, tmp_path, monkeypatch):
    monkeypatch.undo()
    prepared, _ = run(source, tmp_path)
    assert (
        "this is not the whole published data set: 6 images (published: 377,110), 4 patients (published: 65,379), "
        "4 train (published: 368,960), 1 validation (published: 2,991), 1 test (published: 5,159)"
    ) in prepared.notes
    image(source, D).unlink()
    prepared, _ = run(source, tmp_path / "less", allow_missing=True)
    assert "the table lists 6 images, the published one 377,110" in prepared.notes


def test_missing_source_is_an_error(tmp_path, capsys):
    assert main(["prepare", "mimic_cxr_jpg", "--data-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "https://physionet.org/content/mimic-cxr-jpg/" in error
    assert "--source" in error


def test_from_the_command_line(source, tmp_path, capsys):
    arguments = [
        "prepare",
        "mimic_cxr_jpg",
        "--source",
        str(source),
        "--data-dir",
        str(tmp_path / "D"),
        "--size",
        "256",
    ]
    assert main([*arguments, "--labels", "negbio", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert open_records(tmp_path / "D", "mimic_cxr_jpg", "256").options["labels"] == "negbio"
    assert [path.name for path in (tmp_path / "D").iterdir()] == ["mimic_cxr_jpg"], "no folder for downloads"


def test_native_keeps_the_published_bytes_and_tfds_reads_them(source, tmp_path):
    prepared, records = run(source, tmp_path, size=None)
    data = Builder(source=source, data_dir=prepared.directory.parents[2], config="native").as_data_source("all")
    for row, id in enumerate(IMAGES):
        assert records.image_bytes(row) == image(source, id).read_bytes()
        np.testing.assert_allclose(data[row]["image"][..., 0], records.image(row), atol=1)
        np.testing.assert_array_equal(data[row]["labels"], records.labels[row])


def test_is_a_standard_tfds_builder(source, tmp_path):
    builder = tfds.builder("mimic_cxr_jpg/512", data_dir=tmp_path, source=source)
    assert isinstance(builder, Builder)
    assert builder.info.description.startswith("MIMIC-CXR-JPG of the MIT")
    assert "johnson2019mimic" in builder.info.citation
    assert list(Builder.builder_configs) == ["native", "2048", "1024", "512", "256", "224"]
