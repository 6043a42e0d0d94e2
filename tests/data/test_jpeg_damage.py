"""JPEGs with missing data are errors; libjpeg would fill them with grey."""

import io

import cv2
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from cxrjax.data.images import decode, encode
from cxrjax.errors import CxrError
from tfds_builders.prepare import prepare

END = b"\xff\xd9"


def radiograph(rows=120, columns=100, seed=0):
    noise = np.random.default_rng(seed).normal(size=(rows, columns))
    field = scipy.ndimage.gaussian_filter(noise, 4) + 0.01 * noise
    return np.uint8(255 * (field - field.min()) / np.ptp(field))


def jpeg(mode="L", **options):
    stream = io.BytesIO()
    Image.fromarray(radiograph()).convert(mode).save(stream, "JPEG", **{"quality": 90, **options})
    return stream.getvalue()


def scan(data):
    """Return where the compressed data begins, after the header of the first scan."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


KINDS = {
    "grey": {},
    "colour": {"mode": "RGB"},
    "subsampled": {"mode": "RGB", "subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_intact_files_agree_with_opencv(kind):
    data = jpeg(**KINDS[kind])
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decode(data, "x"), cv2.cvtColor(expected, cv2.COLOR_BGR2GRAY))


@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_cut_anywhere_with_an_end_marker_is_an_error(kind):
    data = jpeg(**KINDS[kind])
    between = {at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc4", b"\xff\xda")}
    if kind == "progressive":  # a cut between two scans leaves a valid, coarser image
        assert len(between) < 15
        between |= {at + 1 for at in between}  # a marker may start with fill bytes
    else:
        assert max(between) < scan(data)
    for at in set(range(scan(data), len(data) - 3)) - between:
        with pytest.raises(CxrError, match=r"^files/p10/cut\.jpg: .*(damaged|truncated)"):
            decode(data[:at] + END, "files/p10/cut.jpg")


@pytest.mark.parametrize("kind", ["grey", "colour", "subsampled", "restarts"])
def test_missing_piece_of_a_baseline_file_is_an_error(kind):
    data = jpeg(**KINDS[kind])
    for at in range(scan(data), len(data) - 200, 7):
        with pytest.raises(CxrError, match=r"^lacks\.jpg: (the JPEG is damaged|a colour image)"):
            decode(data[:at] + data[at + 150 :], "lacks.jpg")


def test_piece_overwritten_with_zeros_is_an_error():
    data = jpeg()
    for at in range(scan(data), len(data) - 600, 29):
        with pytest.raises(CxrError, match=r"^x: the JPEG is damaged"):
            decode(data[:at] + bytes(512) + data[at + 512 :], "x")


def test_changed_bytes_are_detected_or_decode_to_an_image():
    """Most changes of one byte leave valid Huffman codes; the result is an image or a `CxrError`, nothing else."""
    data, rng, detected = jpeg(), np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(scan(data), len(data) - 2)] ^= int(rng.integers(1, 256))
        try:
            assert decode(bytes(changed), "x").shape == (120, 100)
        except CxrError:
            detected += 1
    assert 60 < detected < 240


def test_rotated_jpeg_is_checked_and_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(exif=exif)
    assert decode(data, "x").shape == (100, 120)
    with pytest.raises(CxrError, match=r"^x: the JPEG is damaged \(Corrupt JPEG data: premature end"):
        decode(data[: (scan(data) + len(data)) // 2] + END, "x")


def test_encoded_images_are_intact():
    for seed in range(5):
        decode(encode(radiograph(seed=seed), "jpeg"), "x")


def test_prepare_names_a_damaged_file(tmp_path):
    for name in ("normal/a.jpg", "sick/b.jpg"):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).write_bytes(jpeg())
    data = jpeg()
    (tmp_path / "source/sick/b.jpg").write_bytes(data[: len(data) // 2] + END)
    with pytest.raises(CxrError, match=r"source/sick/b\.jpg: the JPEG is damaged .*; fetch the file again"):
        prepare("folder", source=tmp_path / "source", data_dir=tmp_path / "D", size=32)
    with pytest.raises(CxrError, match=r"source/sick/b\.jpg: the JPEG is damaged"):
        prepare("folder", source=tmp_path / "source", data_dir=tmp_path / "D")
    assert not list((tmp_path / "D").glob("folder/*/*[0-9].[0-9]*"))
