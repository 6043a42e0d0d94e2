"""Square images by stretching or padding, with their boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cxrjax.cli.main import main
from cxrjax.data.images import pad_to_square, resize, square_margins
from cxrjax.data.records import Box, open_records
from cxrjax.errors import CxrError
from tfds_builders.prepare import prepare, prepare_sizes
from tfds_builders.sources import _pad_box

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@given(st.integers(1, 60), st.integers(1, 60))
def test_padding_agrees_with_pil(rows, columns):
    image = np.random.default_rng(rows * columns).integers(1, 256, (rows, columns), np.uint8)
    padded = pad_to_square(image)
    side, top, left = square_margins(rows, columns)
    frame = (left, top, side - columns - left, side - rows - top)
    np.testing.assert_array_equal(padded, np.asarray(ImageOps.expand(Image.fromarray(image), frame, 0)))
    assert padded.shape == (max(rows, columns),) * 2
    assert max(abs(frame[0] - frame[2]), abs(frame[1] - frame[3])) <= 1


@given(st.integers(8, 60), st.integers(8, 60), st.tuples(*[st.floats(0, 1)] * 4))
def test_padded_box_encloses_the_same_pixels(rows, columns, at):
    left, right = sorted(int(u * (columns - 1)) for u in at[:2])
    top, bottom = sorted(int(u * (rows - 1)) for u in at[2:])
    image = np.zeros((rows, columns), np.uint8)
    image[top : bottom + 1, left : right + 1] = 255
    box = Box("Mass", left / columns, top / rows, (right + 1 - left) / columns, (bottom + 1 - top) / rows)
    moved, padded = _pad_box(box, columns, rows), pad_to_square(image)
    where = np.argwhere(padded)
    (y, x), (bottom, right) = where.min(0), where.max(0) + 1
    np.testing.assert_allclose(
        np.array([moved.x, moved.y, moved.x + moved.w, moved.y + moved.h]) * len(padded),
        [x, y, right, bottom],
        atol=1e-9,
    )


@pytest.fixture
def source(tmp_path):
    """One image of 40 rows and 60 columns with a white square of 12 px and its box."""
    folder = tmp_path / "nih"
    folder.mkdir()
    image = np.full((40, 60), 90, np.uint8)
    image[8:20, 30:42] = 255
    Image.fromarray(image).save(folder / "00000001_000.png")
    (folder / "Data_Entry_2017_v2020.csv").write_text(
        f"{HEADER}\n00000001_000.png,Mass,0,1,57,M,PA,2682,2749,0.143,0.143\n"
    )
    (folder / "train_val_list.txt").write_text("00000001_000.png")
    (folder / "test_list.txt").write_text("")
    x, y, w, h = 30 / 60, 8 / 40, 12 / 60, 12 / 40
    box = ",".join(str(1024 * side) for side in (x, y, w, h))
    (folder / "BBox_List_2017.csv").write_text(
        f"Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Mass,{box},,,\n"
    )
    return folder


def run(source, data, size=256, **options):
    prepared = prepare("chestxray14", source=source, data_dir=data, size=size, **options)
    return prepared, open_records(data, "chestxray14", str(size or "native"))


@pytest.mark.parametrize("aspect", ["stretch", "pad"])
def test_stored_box_is_at_the_finding(source, tmp_path, aspect):
    _, records = run(source, tmp_path / "D", aspect=aspect)
    white, mask = records.image(0) > 170, records.mask(0, "Mass", 256)
    assert mask is not None
    assert (white & mask).sum() / (white | mask).sum() > 0.9
    original = np.asarray(Image.open(source / "00000001_000.png"))
    expected = resize(pad_to_square(original) if aspect == "pad" else original, 256)
    assert np.abs(records.image(0).astype(int) - expected).mean() < 1
    assert (records.image(0)[:30].max() < 8) == (aspect == "pad"), "black margin"


def test_aspect_changes_the_fingerprint(source, tmp_path):
    stretched, _ = run(source, tmp_path / "a")
    padded, records = run(source, tmp_path / "b", aspect="pad")
    assert stretched.fingerprint != padded.fingerprint
    assert records.options["aspect"] == "pad"
    assert run(source, tmp_path / "c", aspect="stretch")[0].fingerprint == stretched.fingerprint
    with pytest.raises(CxrError, match="was prepared with aspect pad, not stretch; delete"):
        run(source, tmp_path / "b")
    with pytest.raises(CxrError, match="was prepared with aspect stretch, not pad; delete"):
        run(source, tmp_path / "a", aspect="pad")
    assert run(source, tmp_path / "b", aspect="pad")[0].reused


def test_aspect_changes_the_fingerprint_without_boxes(source, tmp_path):
    (source / "BBox_List_2017.csv").unlink()
    assert run(source, tmp_path / "a")[0].fingerprint != run(source, tmp_path / "b", aspect="pad")[0].fingerprint


def test_native_images_keep_their_aspect(source, tmp_path):
    native, padded = prepare_sizes("chestxray14", (None, 224), source=source, data_dir=tmp_path / "a", aspect="pad")
    assert native.fingerprint == run(source, tmp_path / "b", None)[0].fingerprint
    assert open_records(tmp_path / "a", "chestxray14", "native").image(0).shape == (40, 60)
    assert padded.fingerprint == run(source, tmp_path / "c", 224, aspect="pad")[0].fingerprint


def test_from_the_command_line(source, tmp_path, capsys):
    arguments = ["prepare", "chestxray14", "--source", str(source), "--data-dir", str(tmp_path / "D"), "--size", "2048"]
    assert main([*arguments, "--aspect", "pad"]) == 0
    assert open_records(tmp_path / "D", "chestxray14", "2048").options["aspect"] == "pad"
    with pytest.raises(CxrError, match="unknown aspect 'crop'; choose stretch or pad"):
        run(source, tmp_path / "D", aspect="crop")
    with pytest.raises(CxrError, match="cxr_phantom has no option 'aspect'"):
        prepare("cxr_phantom", data_dir=tmp_path, aspect="pad")
