"""Scaled decoding approximates decoding the whole image and averaging."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from cxrjax.data.images import _shrink, decode, decode_resized, encode, resize
from cxrjax.data.phantom import render, sample_population
from cxrjax.errors import CxrError


@pytest.fixture(scope="module")
def radiograph():
    """A phantom radiograph of 1000 x 900 px with noise."""
    return np.ascontiguousarray(render(sample_population(patients=9, seed=0)[0], 1000)[:, :900])


def test_scaled_jpeg_is_close_to_the_area_mean(radiograph):
    data = encode(radiograph, "jpeg")
    whole = Image.fromarray(decode(data, "x"))
    for size in (50, 100, 112, 113, 200, 225, 300, 450, 512, 900):
        area = resize(np.asarray(whole), size).astype(int)
        scaled = decode_resized(data, "x", size)
        assert scaled.dtype == np.uint8
        assert scaled.shape == (size, size)
        assert np.abs(area - scaled).mean() < 1.3
        bilinear = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR), int)
        assert np.abs(area - scaled).mean() < 1.5 * np.abs(area - bilinear).mean()


@pytest.mark.parametrize(
    ("format", "shape", "size"),
    [("png", (100, 90), 64), ("jpeg", (100, 90), 1000), ("jpeg", (64, 64), 64), ("jpeg", (200, 60), 64),
     ("jpeg", (130, 70), 64)],
    ids=["a PNG", "to be enlarged", "of that size", "smaller one way", "twice as long"],
)  # fmt: skip
def test_other_images_are_decoded_whole(radiograph, format, shape, size):
    data = encode(cv2.resize(radiograph, shape), format)
    np.testing.assert_array_equal(decode_resized(data, "x", size), resize(decode(data, "x"), size))


@pytest.mark.parametrize("side", [66, 80, 90, 101])
def test_shrinking_keeps_the_mean_and_does_not_alias(side):
    noise = np.random.default_rng(0).normal(128, 40, (side, side)).clip(0, 255).astype(np.uint8)
    area, quick = resize(noise, 64).astype(float), _shrink(noise.copy(), 64).astype(float)
    assert abs(area.mean() - quick.mean()) < 0.6
    assert quick.std() == pytest.approx(area.std(), rel=0.2)  # without smoothing, 101 px give 1.32 times the area's
    assert np.corrcoef(area.ravel(), quick.ravel())[0, 1] > 0.92


def test_colour_and_rotated_files_are_decoded_whole(radiograph):
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(radiograph).save(turned, "JPEG", quality=95, exif=exif)
    colour = io.BytesIO()
    Image.fromarray(radiograph).convert("RGB").save(colour, "JPEG", quality=95)
    for data in (turned.getvalue(), colour.getvalue()):
        np.testing.assert_array_equal(decode_resized(data, "x", 100), resize(decode(data, "x"), 100))
    up = resize(radiograph, 100).astype(int)
    assert np.abs(decode_resized(turned.getvalue(), "x", 100) - np.rot90(up, -1)).mean() < 1


def test_damage_is_named(radiograph):
    data = encode(radiograph, "jpeg")
    for broken in (data[:2000], b"", data[:200] + data[-300:-2]):
        with pytest.raises(CxrError, match=r"^image 7: "):
            decode_resized(broken, "image 7", 100)
