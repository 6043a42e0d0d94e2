"""NIH's files: real ones against csv and PIL, and unusual and broken ones."""

import csv
import gzip
import hashlib
import io
import math
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cxrjax.data.records import Box, open_records
from cxrjax.errors import CxrError
from cxrjax.findings import NIH14
from tfds_builders.chestxray14 import download, nih
from tfds_builders.chestxray14.chestxray14_dataset_builder import Builder, select
from tfds_builders.prepare import prepare
from tfds_builders.prepare_warnings import note_counts

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    "00000001_000.png,Cardiomegaly,0,1,057Y,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143",
    "00000002_000.png,No Finding,0,2,011M,F,AP,2500,2048,0.168,0.168",
    "00000003_000.png,Infiltration,0,3,040Y,F,PA,2500,2048,0.168,0.168",
    "00000004_000.png,Pleural_Thickening|Hernia,0,4,414Y,M,PA,2500,2048,0.168,0.168",
]
NAMES = [row.split(",")[0] for row in ROWS]
BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000003_000.png,Infiltrate,256,512,128,64,,,\n"


def picture(seed=0, side=48, mode="L") -> bytes:
    noise = np.random.default_rng(seed).normal(128, 60, (side, side)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0)).convert(mode).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def source(tmp_path) -> Path:
    """Five images in two folders, plain tables, and lists without a final newline."""
    folder = tmp_path / "nih"
    for k, name in enumerate(NAMES):
        path = folder / f"images_{1 + k // 3:03d}/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(k))
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    (folder / "train_val_list.txt").write_text("\n".join(NAMES[:4]))
    (folder / "test_list.txt").write_text(NAMES[4])
    (folder / "BBox_List_2017.csv").write_text(BOXES)
    return folder


def run(source, tmp_path, **options):
    prepared = prepare("chestxray14", source=source, data_dir=tmp_path / "D", size=224, **options)
    return prepared, open_records(tmp_path / "D", "chestxray14", "224")


def nothing_is_left(tmp_path):
    return not list((tmp_path / "D").glob("chestxray14/*/*[0-9].[0-9]*"))


def test_records_from_the_table(source, tmp_path):
    prepared, records = run(source, tmp_path)
    assert (prepared.images, prepared.patients, prepared.missing, prepared.unlisted) == (5, 4, [], [])
    assert records.id.tolist() == NAMES
    assert records.patient.tolist() == ["00000001", "00000001", "00000002", "00000003", "00000004"]
    assert records.study.tolist()[:3] == ["00000001_000", "00000001_001", "00000002_000"]
    np.testing.assert_allclose(records.age, [57, 58, 11 / 12, 40, math.nan], rtol=1e-6)
    assert records.view.tolist() == ["PA", "PA", "AP", "PA", "PA"]
    assert records.sex.tolist() == ["M", "M", "F", "F", "M"]
    assert records.official.tolist() == ["train_val"] * 4 + ["test"]
    positive = [[f for f, label in zip(NIH14, row, strict=True) if label == 1] for row in records.labels]
    assert positive == [
        ["Cardiomegaly"], ["Cardiomegaly", "Emphysema"], [], ["Infiltration"], ["Pleural_Thickening", "Hernia"],
    ]  # fmt: skip
    assert set(records.labels.ravel().tolist()) == {0, 1}
    assert records.boxes(3) == [Box("Infiltration", 0.25, 0.5, 0.125, 0.0625)]
    mask = records.mask(3, "Infiltration", 16)
    assert mask is not None
    assert np.argwhere(mask).tolist() == [[8, 4], [8, 5]]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("Patient Gender", "Patient Sex"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", ",\n"),
    ],
    ids=["renamed column", "byte order mark", "trailing comma"],
)
@pytest.mark.parametrize("name", ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "Data_Entry_2017.csv.gz"])
def test_copies_of_the_table(source, edit, name):
    path = source / "Data_Entry_2017_v2020.csv"
    expected = nih.read_table(source).fingerprint
    data = edit(path.read_text()).encode()
    path.unlink()
    (source / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert nih.read_table(source).fingerprint == expected


def test_newer_table_is_read_and_boxes_are_optional(source):
    (source / "Data_Entry_2017.csv").write_text(HEADER + "\n")
    (source / "BBox_List_2017.csv").unlink()
    table = nih.read_table(source)
    assert len(table) == 5
    assert table.mask(3, "Infiltration", 16) is None


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "Data_Entry_2017_v2020.csv",
            "Patient Age",
            "Age",
            r"lacks the column Patient Age; it has Image Index, Finding",
        ),
        ("Data_Entry_2017_v2020.csv", "Gender", "Gen", r"lacks the column Patient Gender; it has"),
        ("Data_Entry_2017_v2020.csv", "|Hernia", "|Hernie", r"line 6 \(00000004_000.png\): unknown finding 'Hernie'"),
        ("Data_Entry_2017_v2020.csv", "Cardiomegaly|Emph", "No Finding|Emph", r"line 3 .*unknown finding 'No Finding'"),
        ("Data_Entry_2017_v2020.csv", "011M", "young", r"line 4 \(00000002_000.png\): age 'young' is not"),
        ("Data_Entry_2017_v2020.csv", ",0,2,", ",0,x,", r"line 4 \(00000002_000.png\): patient or follow-up"),
        ("Data_Entry_2017_v2020.csv", NAMES[1], NAMES[0], r"00000001_000.png has two rows, lines 2 and 3; keep one"),
        ("test_list.txt", NAMES[4], NAMES[0], r"00000001_000.png is in train_val_list.txt and in test_list.txt"),
        (
            "BBox_List_2017.csv",
            "Infiltrate",
            "Infiltrates",
            r"BBox_List_2017.csv, line 2: unknown finding 'Infiltrates'",
        ),
        ("BBox_List_2017.csv", "256,512", "1000,512", r"line 2: the box is outside the image of 1024 x 1024"),
        ("BBox_List_2017.csv", "256", "", r"line 2: expected an image, a finding and x, y, w, h"),
    ],
)
def test_invalid_table_is_an_error_that_names_the_row(source, tmp_path, file, old, new, message):
    path = source / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CxrError, match=message):
        run(source, tmp_path)
    assert nothing_is_left(tmp_path)


def test_image_in_neither_list_has_no_official_split(source):
    (source / "train_val_list.txt").write_text("\n".join([NAMES[0], *NAMES[2:4]]))
    assert nih.read_table(source).official.tolist() == ["train_val", "", "train_val", "train_val", "test"]


def test_patient_in_both_official_lists_is_named(source, tmp_path):
    (source / "train_val_list.txt").write_text("\n".join([NAMES[0], *NAMES[2:4]]))
    (source / "test_list.txt").write_text("\n".join([NAMES[1], NAMES[4]]))
    with pytest.raises(CxrError, match=r"patients in two splits \(1\): 00000001 \(train_val and test\)"):
        run(source, tmp_path)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("Data_Entry_2017_v2020.csv", "no label table below .*; get Data_Entry_2017_v2020.csv from https://nihcc"),
        ("train_val_list.txt", "no train_val_list.txt below .*; get it from https://nihcc"),
        ("test_list.txt", "no test_list.txt below"),
        ("images_*", "no .png image anywhere below .*; get images_001"),
    ],
)
def test_incomplete_source_is_an_error(source, tmp_path, missing, message):
    for path in list(source.glob(missing)):
        path.rename(tmp_path / path.name)
    with pytest.raises(CxrError, match=message):
        run(source, tmp_path)
    assert nothing_is_left(tmp_path)


def test_missing_or_packed_source_is_an_error(source, tmp_path):
    with pytest.raises(CxrError, match=r"source folder .*nowhere does not exist"):
        run(source / "nowhere", tmp_path)
    for folder in list(source.glob("images_*")):
        folder.rename(tmp_path / folder.name)
    (source / "images_001.tar.gz").write_bytes(b"")
    with pytest.raises(CxrError, match=r"no .png image anywhere below .*; unpack images_001.tar.gz there"):
        run(source, tmp_path)


def remove(source, names):
    for name in names:
        next(source.rglob(name)).unlink()


def test_source_with_few_images_is_a_subset(source, tmp_path, capsys):
    remove(source, NAMES[:3])
    prepared, records = run(source, tmp_path)
    assert prepared.missing == NAMES[:3]
    assert records.id.tolist() == NAMES[3:]
    assert "subset: 2 of the 5 images in the table are prepared, 3 are not in the source" in capsys.readouterr().err
    assert prepared.notes


def test_missing_images_are_an_error(source, tmp_path):
    remove(source, NAMES[1:3])
    message = r"2 of the table's 5 images are not below .*: 00000001_001.png, 00000002_000.png; .*--allow-missing"
    with pytest.raises(CxrError, match=message):
        run(source, tmp_path)
    assert nothing_is_left(tmp_path)
    prepared, records = run(source, tmp_path, allow_missing=True)
    assert prepared.missing == NAMES[1:3]
    assert records.id.tolist() == [NAMES[0], *NAMES[3:]]


def test_unlisted_image_is_an_error(source, tmp_path):
    (source / "scan.png").write_bytes(picture())
    with pytest.raises(CxrError, match=r"1 images below .* are not in the table: scan.png; .*--allow-missing"):
        run(source, tmp_path)
    prepared, records = run(source, tmp_path, allow_missing=True)
    assert prepared.unlisted == ["scan.png"]
    assert len(records) == 5


def test_duplicate_file_name_is_an_error(source, tmp_path):
    (source / NAMES[0]).write_bytes(picture())
    with pytest.raises(CxrError, match=r"image 00000001_000.png exists twice, .* and .*; keep one"):
        run(source, tmp_path)


def test_images_of_another_archive(source, tmp_path):
    for path in list(source.rglob("*.png")):
        path.rename(path.with_name("x" + path.name))
    with pytest.raises(CxrError, match=r"none of the 5 images below .* is in the label table, such as x00000001_000"):
        run(source, tmp_path, allow_missing=True)


def broken(kind: str) -> bytes:
    data = picture(1)
    stream = io.BytesIO()
    if kind == "16 bits":
        Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48)).save(stream, "PNG")
        return stream.getvalue()
    if kind == "CMYK":
        Image.new("CMYK", (48, 48)).save(stream, "JPEG")
        return stream.getvalue()
    return {"empty": b"", "truncated": data[: len(data) // 2], "no image": b"<!DOCTYPE html>" * 20}[kind]


@pytest.mark.parametrize("kind", ["empty", "truncated", "16 bits", "CMYK", "no image"])
def test_broken_image_is_named_and_nothing_is_left(source, tmp_path, kind):
    next(source.rglob(NAMES[3])).write_bytes(broken(kind))
    with pytest.raises(CxrError, match=r"images_002/images/00000003_000\.png: "):
        run(source, tmp_path, workers=3)
    assert nothing_is_left(tmp_path)


def test_unreadable_image_is_named(source, tmp_path):
    path = next(source.rglob(NAMES[2]))
    path.unlink()
    path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(CxrError, match=r"00000002_000\.png: cannot be read: No such file"):
        run(source, tmp_path)


def test_native_keeps_grey_bytes_and_converts_rgba_losslessly(source, tmp_path):
    for name, mode in ((NAMES[1], "RGBA"), (NAMES[2], "P")):
        next(source.rglob(name)).write_bytes(picture(7, mode=mode))
    prepare("chestxray14", source=source, data_dir=tmp_path / "D")
    records = open_records(tmp_path / "D", "chestxray14", "native")
    for row, name in enumerate(NAMES):
        data = next(source.rglob(name)).read_bytes()
        stored = records.image_bytes(row)
        assert (stored == data) == (row not in (1, 2))
        assert stored.startswith(b"\x89PNG")
        np.testing.assert_array_equal(records.image(row), np.asarray(Image.open(io.BytesIO(data)).convert("L")))


# --- 240 real images


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    prepared = prepare("chestxray14", source=shared / "data/nih", data_dir=folder, size=256)
    return prepared, open_records(folder, "chestxray14", "256")


def test_real_subset_is_complete(real, shared):
    prepared, records = real
    assert (prepared.images, prepared.patients) == (240, 240)
    assert len(prepared.missing) == 112_120 - 240
    assert (records.official == "test").sum() == 63
    assert sum(bool(records.boxes(row)) for row in range(240)) == 12
    on_disk = {path.name for path in (shared / "data/nih/images").iterdir()}
    with gzip.open(shared / "data/nih/Data_Entry_2017_v2020.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["Image Index"] in on_disk]
    assert records.id.tolist() == [row["Image Index"] for row in rows]
    np.testing.assert_array_equal(
        records.labels, [[finding in row["Finding Labels"].split("|") for finding in NIH14] for row in rows]
    )
    np.testing.assert_array_equal(records.age, [float(row["Patient Age"]) for row in rows])
    assert (records.labels == 1).any(0).all(), "all 14 findings"


def test_published_table_has_the_published_counts(real, shared):
    prepared, _ = real
    assert not any("published" in note for note in prepared.notes)
    table = nih.read_table(shared / "data/nih")
    assert note_counts(table, 0, Builder.PUBLISHED_COUNTS) == []
    assert note_counts(table, 1, Builder.PUBLISHED_COUNTS) == [
        "the table lists 112,121 images, the published one 112,120"
    ]


def test_real_images_agree_with_pil(real, shared):
    _, records = real
    rgba = 0
    for row in range(240):
        with Image.open(shared / "data/nih/images" / records.id[row]) as picture:
            rgba += picture.mode == "RGBA"
            if row % 8 and picture.mode == "L":
                continue
            expected = np.asarray(picture.convert("L").reduce(4), np.float64)
        error = np.abs(records.image(row) - expected)
        assert error.mean() < 1.5, records.id[row]
    assert rgba == 6


def test_real_boxes_are_those_of_the_file(real, shared):
    _, records = real
    row_of = {id: row for row, id in enumerate(records.id.tolist())}
    with (shared / "data/nih/BBox_List_2017.csv").open() as file:
        boxes = [line[:6] for line in csv.reader(file) if line[0] in row_of]
    assert len(boxes) == sum(len(records.boxes(row)) for row in range(240))
    for id, finding, *pixels in boxes:
        finding = finding.replace("Infiltrate", "Infiltration")
        sides = [[b.x, b.y, b.w, b.h] for b in records.boxes(row_of[id]) if b.finding == finding]
        assert any(np.allclose(np.float64(pixels) / 1024, side, atol=1e-6) for side in sides)


def test_tfds_reads_prepared_data(real):
    prepared, records = real
    data = Builder(data_dir=prepared.directory.parents[2], config="256").as_data_source("all")
    assert len(data) == 240
    row = next(row for row in range(240) if records.boxes(row))
    example = data[row]
    assert example["id"].decode() == records.id[row]
    np.testing.assert_array_equal(example["labels"], records.labels[row])
    np.testing.assert_array_equal(example["image"][..., 0], records.image(row))
    box = records.boxes(row)[0]
    np.testing.assert_allclose(example["boxes"]["bbox"][0], [box.y, box.x, box.y + box.h, box.x + box.w], atol=1e-6)
    assert NIH14[example["boxes"]["finding"][0]] == box.finding


# --- downloading


class FakeDownloads:
    """Fake download manager that reads a folder."""

    def __init__(self, folder: Path):
        self.folder, self.requested = folder, []

    def download(self, url: str) -> Path:
        name = next(name for name, address in download.urls().items() if address == url)
        self.requested.append(name)
        path = self.folder / name
        if not path.exists():
            raise ConnectionError(f"HTTP 404 for {url}")
        return path


@pytest.fixture
def site(source, tmp_path, monkeypatch) -> FakeDownloads:
    """NIH's site, with two archives instead of twelve."""
    folder = tmp_path / "site"
    folder.mkdir()
    archives = {}
    for number in (1, 2):
        name = f"images_{number:03d}.tar.gz"
        with tarfile.open(folder / name, "w:gz") as tar:
            tar.add(source / f"images_{number:03d}/images", "images")
        archives[name] = (f"key{number}", hashlib.md5((folder / name).read_bytes()).hexdigest())
    for name in download.TABLES:
        (source / name).rename(folder / name)
    monkeypatch.setattr(download, "ARCHIVES", archives)
    return FakeDownloads(folder)


def test_download_gives_the_same_as_a_folder(site, source):
    selection = select(download.fetch(site), "the download", allow_missing=False)
    assert [record.id for record in selection.records] == NAMES
    assert set(site.requested) == {*download.TABLES, "images_001.tar.gz", "images_002.tar.gz"}
    assert selection.paths[NAMES[0]].read_bytes() == next(source.rglob(NAMES[0])).read_bytes()
    unpacked = site.folder / "images_001.tar.gz.unpacked"
    stamp = unpacked.stat().st_mtime_ns
    download.fetch(site)
    assert unpacked.stat().st_mtime_ns == stamp, "unpacked once"


def test_without_a_source_the_builder_downloads(site, tmp_path, monkeypatch):
    monkeypatch.setattr(Builder, "_make_download_manager", lambda self, **_: site)
    site.downloaded_size = 0
    prepared = prepare("chestxray14", data_dir=tmp_path / "D", size=224)
    assert prepared.images == 5


def test_failed_download_says_what_to_download_by_hand(site):
    (site.folder / "images_002.tar.gz").unlink()
    with pytest.raises(
        CxrError, match=r"^images_002.tar.gz of ChestX-ray14: HTTP 404 .*by hand from https://nihcc.app"
    ):
        download.fetch(site)


@pytest.mark.parametrize(("damage", "message"), [(False, "MD5 differs"), (True, "cannot be unpacked")])
def test_wrong_archive_is_named_and_leaves_nothing(site, monkeypatch, damage, message):
    path = site.folder / "images_002.tar.gz"
    path.write_bytes(path.read_bytes()[:-100])
    if damage:  # as if published in this state
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(download.ARCHIVES, path.name, ("key2", digest))
    with pytest.raises(CxrError, match=f"images_002.tar.gz of ChestX-ray14: .*{message}"):
        download.fetch(site)
    assert not list(site.folder.glob("images_002.tar.gz.unpacked*"))


def test_urls_and_checksums_are_complete(shared):
    urls = download.urls()
    assert len(urls) == len(set(urls.values())) == 16
    assert all(
        url.startswith(("https://nihcc.box.com/shared/static/", "https://nihcc.app.box.com/")) for url in urls.values()
    )
    known = Builder.url_infos
    assert known is not None
    for name in download.TABLES:
        path = shared / "data/nih" / name
        data = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        data = data.replace(b"Patient Gender", b"Patient Sex", 1)  # as NIH's site has it today
        assert known[urls[name]].checksum == hashlib.sha256(data).hexdigest()
        assert known[urls[name]].size == len(data)


def test_is_a_standard_tfds_builder(tmp_path):
    builder = tfds.builder("chestxray14/512", data_dir=tmp_path)
    assert isinstance(builder, Builder)
    assert builder.info.description.startswith("ChestX-ray14 of the NIH Clinical Center")
    assert "wang2017chestxray" in builder.info.citation
    assert list(Builder.builder_configs) == ["native", "2048", "1024", "512", "256", "224"]
