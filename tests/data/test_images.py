"""Decoding against PIL, resizing against exact area sums, warps against SciPy in float64."""

import contextlib
import io
import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cxrjax.data.images import Augment, Warp, decode, encode, is_plain_grey, resize
from cxrjax.errors import CxrError


def smooth(rows=48, columns=64, seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(rows, columns))
    field = scipy.ndimage.gaussian_filter(noise, 3)
    return np.uint8(255 * (field - field.min()) / np.ptp(field))


def packed(image, format="PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


# --- decoding


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_of_every_colour_type_is_its_grey(mode):
    image = Image.fromarray(smooth()).convert(mode)
    decoded = decode(packed(image), "x.png")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_what_pil_decodes(mode, progressive):
    data = packed(Image.fromarray(smooth()).convert(mode), "JPEG", quality=95, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"), int)
    assert np.abs(decode(data, "x.jpg") - expected).max() <= 1


def test_the_content_decides_and_not_the_name():
    image = smooth()
    np.testing.assert_array_equal(decode(packed(image), "mislabelled.jpg"), image)


def test_every_kind_of_genuine_nih_file(shared):
    rgba = 0
    for path in sorted((shared / "data/nih/images").glob("*.png")):
        with Image.open(path) as picture:
            if picture.mode != "L" or path.name.endswith("97_000.png"):
                rgba += picture.mode == "RGBA"
                np.testing.assert_array_equal(decode(path.read_bytes(), path.name), np.asarray(picture.convert("L")))
    assert rgba == 6


def test_genuine_jpegs(shared):
    for path in sorted((shared / "data/covid").glob("*.jpg"))[:4]:
        with Image.open(path) as picture:
            expected = np.asarray(picture, int)
        assert np.abs(decode(path.read_bytes(), path.name) - expected).max() <= 1


@pytest.mark.parametrize(
    ("image", "format", "plain"),
    [
        (smooth(), "PNG", True),
        (smooth(), "JPEG", True),
        (Image.fromarray(smooth()).convert("RGB"), "PNG", False),
        (Image.fromarray(smooth()).convert("RGB"), "JPEG", False),
        (Image.fromarray(smooth()).convert("P"), "PNG", False),
        (Image.fromarray(smooth()).convert("1"), "PNG", False),
    ],
)
def test_plain_files_are_8_bit_grey(image, format, plain):
    assert is_plain_grey(packed(image, format)) == plain


def test_a_turned_jpeg_is_not_plain():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not is_plain_grey(packed(smooth(), "JPEG", exif=exif))
    assert not is_plain_grey(bytes(200))


def test_an_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = packed(smooth(), "JPEG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_allclose(decode(data, "x.jpg"), expected, atol=1)


def test_a_coloured_mark_is_let_pass_and_a_photograph_is_not():
    picture = np.repeat(smooth()[..., None], 3, axis=2)
    picture[2:5, 2:8] = (255, 0, 0)
    decoded = decode(packed(picture), "x.png")
    assert np.abs(decoded - np.asarray(Image.fromarray(picture).convert("L"), int)).max() <= 1
    picture[:24] = (200, 30, 30)
    with pytest.raises(CxrError, match=r"photo\.png: a colour picture \(50%"):
        decode(packed(picture), "photo.png")


def png_of_16_bits():
    return packed(Image.fromarray(smooth().astype(np.uint16) * 257))


def transparent():
    image = Image.fromarray(smooth()).convert("RGBA")
    image.putalpha(Image.fromarray(smooth(seed=1)))
    return packed(image)


def jpeg_of_12_bits():
    data = bytearray(packed(smooth(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"Image Index,Finding Labels\n" * 9, "not a PNG, JPEG or DICOM image"),
        (packed(smooth(), "TIFF"), "a TIFF file"),
        (packed(smooth(), "BMP"), "a BMP file"),
        (bytes(128) + b"DICM" + bytes(200), "a DICOM file without an image"),
        (png_of_16_bits(), "16-bit PNG"),
        (jpeg_of_12_bits(), "12-bit JPEG"),
        (packed(Image.fromarray(smooth()).convert("CMYK"), "JPEG"), "CMYK"),
        (transparent(), "transparent"),
    ],
)
def test_what_is_no_8_bit_grey_image_is_refused_by_name(data, message):
    with pytest.raises(CxrError, match=f"^bad/image.png: .*{message}"):
        decode(data, "bad/image.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_no_truncation_goes_unnoticed(format):
    data = packed(smooth(), format)
    for length in range(len(data)):
        with pytest.raises(CxrError, match=r"^cut\.png: "):
            decode(data[:length], "cut.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_file_filled_up_with_zeros_is_cut_off(format):
    data = packed(smooth(), format)
    for length in (len(data) // 3, len(data) // 2, len(data) - 14):
        with pytest.raises(CxrError, match=r"^cut\.png: "):
            decode(data[:length].ljust(len(data), b"\0"), "cut.png")


def test_a_thumbnail_does_not_hide_a_truncation():
    thumbnail = packed(smooth(8, 8), "JPEG")
    data = packed(smooth(), "JPEG", comment=thumbnail)
    assert decode(data, "whole.jpg").shape == (48, 64)
    with pytest.raises(CxrError, match="cut off"):
        decode(data[:-40], "cut.jpg")


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_png_is_never_another_picture(position, change):
    data = bytearray(packed(smooth(12, 12)))
    data[position % len(data)] ^= change
    with contextlib.suppress(CxrError):
        decoded = decode(bytes(data), "x.png")
        np.testing.assert_array_equal(decoded, smooth(12, 12))


def test_a_png_that_lacks_rows_is_refused():
    data = packed(smooth(200, 300))
    start = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, start)
    header = np.frombuffer(data[:start], np.uint8).copy()
    missing = header.tobytes() + data[start + 12 + length :]
    with pytest.raises(CxrError, match="damaged"):
        decode(missing, "x.png")


# --- encoding


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_png_is_lossless_there_and_back(rows, columns, seed):
    image = np.random.default_rng(seed).integers(0, 256, (rows, columns), np.uint8)
    data = encode(image)
    np.testing.assert_array_equal(decode(data, "x"), image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_jpeg_is_grey_and_near():
    data = encode(smooth(), "jpeg")
    assert Image.open(io.BytesIO(data)).mode == "L"
    assert np.abs(decode(data, "x") - smooth().astype(int)).mean() < 1
    assert len(encode(smooth(), "jpeg", quality=50)) < len(data)


def test_only_grey_bytes_are_encoded():
    for image in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8)):
        with pytest.raises(CxrError, match="grey uint8"):
            encode(image)
    with pytest.raises(CxrError, match="unknown image format 'tiff'"):
        encode(smooth(), "tiff")


# --- resizing


def area_mean(image, rows, columns) -> np.ndarray:
    """Exact means over the areas of the new pixels, by interpolating the cumulative sum."""
    for axis, size in ((0, rows), (1, columns)):
        image = np.moveaxis(np.asarray(image, np.float64), axis, 0)
        total = np.concatenate([np.zeros_like(image[:1]), np.cumsum(image, axis=0)])
        edges = np.linspace(0, len(image), size + 1)
        at_edges = np.apply_along_axis(lambda t, e=edges: np.interp(e, np.arange(len(t)), t), 0, total)
        image = np.moveaxis(np.diff(at_edges, axis=0) * size / len(image), 0, axis)
    return image


@pytest.mark.parametrize("size", [24, 17, (48, 31), (11, 64), (1, 1)])
def test_shrinking_is_the_mean_over_areas(size):
    image = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    resized = resize(image, size)
    assert resized.shape == (rows, columns)
    assert np.abs(resized - area_mean(image, rows, columns)).max() <= 0.51


@pytest.mark.parametrize("size", [(96, 128), (100, 91)])
def test_growing_is_linear(size):
    image = smooth()
    at = [np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1) for n, m in zip(size, image.shape, strict=True)]
    expected = scipy.ndimage.map_coordinates(image.astype(float), np.meshgrid(*at, indexing="ij"), order=1)
    assert np.abs(resize(image, size) - expected).max() <= 1


def test_an_axis_that_shrinks_is_antialiased_while_the_other_grows():
    stripes = np.zeros((40, 64), np.uint8)
    stripes[::2] = 255
    assert np.abs(resize(stripes, (20, 128)) - 127.5).max() <= 0.5
    stripes = np.zeros((64, 40), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, (128, 20)) - 127.5).max() <= 0.5


def test_the_same_size_is_the_same_image():
    image = smooth(32, 32)
    np.testing.assert_array_equal(resize(image, 32), image)


# --- augmentation

EVERYTHING = Augment(flip=0.5, rotation=15, shift=0.1, zoom=0.1, shear=0.1, brightness=0.2)


def by_scipy(image, warp) -> np.ndarray:
    """The warp in float64: every step a 3x3 matrix written out by itself, applied by SciPy."""
    rows, columns = image.shape
    centre = np.array([[1, 0, (columns - 1) / 2], [0, 1, (rows - 1) / 2], [0, 0, 1.0]])
    shift = np.array([[1, 0, warp.shift[0] * columns], [0, 1, warp.shift[1] * rows], [0, 0, 1.0]])
    angle = np.deg2rad(warp.rotation)
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    zoom = np.diag([warp.zoom, warp.zoom, 1])
    shear = np.array([[1, np.tan(warp.shear), 0], [0, 1, 0], [0, 0, 1.0]])
    mirror = np.diag([-1.0 if warp.flip else 1.0, 1, 1])
    back = np.linalg.inv(shift @ centre @ turn @ zoom @ shear @ mirror @ np.linalg.inv(centre))
    swap = np.eye(3)[[1, 0, 2]]  # SciPy counts rows first
    return scipy.ndimage.affine_transform(image.astype(np.float64), swap @ back @ swap, order=1, mode="grid-constant")


def test_nothing_drawn_leaves_the_image_as_it_is():
    image = smooth()
    np.testing.assert_array_equal(Warp().image(image), image)
    np.testing.assert_array_equal(Augment().apply(smooth(32, 32), np.random.default_rng(0), 32), smooth(32, 32))


def test_a_flip_is_a_mirror_also_inside_a_warp():
    image = smooth()
    np.testing.assert_array_equal(Warp(flip=True).image(image), image[:, ::-1])
    warped = cv2.warpAffine(image, Warp(flip=True).matrix(*image.shape), image.shape[::-1])
    np.testing.assert_array_equal(warped, image[:, ::-1])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_are_counter_clockwise_turns(turns):
    image = smooth(48, 48)
    turned = Warp(rotation=90.0 * turns).image(image)
    assert np.abs(turned - np.rot90(image, turns).astype(int)).max() <= 1


def test_a_shift_by_whole_pixels_is_exact_and_leaves_black():
    image = smooth(40, 80) | 1
    shifted = Warp(shift=(3 / 80, -5 / 40)).image(image)
    np.testing.assert_array_equal(shifted[:-5, 3:], image[5:, :-3])
    assert not shifted[-5:].any()
    assert not shifted[:, :3].any()


def test_zoom_keeps_the_centre_and_magnifies():
    image = np.zeros((65, 65), np.uint8)
    image[16:49, 16:49] = 200
    assert Warp(zoom=1.5).image(image).sum() / image.sum() == pytest.approx(1.5**2, rel=0.05)
    assert Warp(zoom=1.5).image(image)[32, 32] == 200


def test_brightness_is_a_factor_that_saturates():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    bright = Warp(brightness=1.3).image(image)
    np.testing.assert_allclose(bright, np.minimum(image * 1.3, 255), atol=0.501)


@pytest.mark.parametrize(
    "warp",
    [
        Warp(rotation=11.3),
        Warp(shear=-0.17),
        Warp(zoom=0.87),
        Warp(shift=(0.0432, -0.081)),
        Warp(flip=True, rotation=-13, shift=(-0.05, 0.07), zoom=1.09, shear=0.1),
    ],
)
def test_a_warp_is_the_affine_map_in_float64(warp):
    image = smooth(90, 120)
    inside = by_scipy(np.full_like(image, 255), warp) > 254.999
    error = np.abs(warp.image(image) - by_scipy(image, warp))[inside]
    assert error.max() <= 1
    assert error.mean() < 0.4


def test_a_mask_moves_with_its_image():
    image = np.zeros((96, 96), np.uint8)
    image[30:60, 20:70] = 255
    warp = Warp(flip=True, rotation=12, shift=(0.05, 0.02), zoom=1.1, shear=0.05, brightness=0.5)
    mask = warp.mask(image > 0)
    moved = replace(warp, brightness=1.0).image(image) > 127
    assert mask.dtype == bool
    assert (mask & moved).sum() / (mask | moved).sum() > 0.98


def test_shrinking_before_the_warp_is_antialiased():
    stripes = np.zeros((128, 128), np.uint8)
    stripes[::2] = 255
    result = Augment(rotation=5).apply(stripes, np.random.default_rng(0), 32)[8:-8, 8:-8]
    assert np.ptp(result.astype(int)) <= 2


@given(st.integers(0, 2**32 - 1), st.sampled_from([(20, 33), (48, 48), (7, 5)]))
@settings(max_examples=50, deadline=None)
def test_an_augmented_image_has_its_size_and_follows_from_its_seed(seed, shape):
    image = smooth(*shape)
    first, second = (EVERYTHING.apply(image, np.random.default_rng(seed), 24) for _ in range(2))
    assert first.shape == (24, 24)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_draws_stay_in_their_ranges(seed):
    warp = EVERYTHING.draw(np.random.default_rng(seed))
    assert abs(warp.rotation) <= 15
    assert max(map(abs, warp.shift)) <= 0.1
    assert 0.9 <= warp.zoom <= 1.1
    assert abs(warp.shear) <= 0.1
    assert 0.8 <= warp.brightness <= 1.2


def test_flips_come_as_often_as_asked():
    rng = np.random.default_rng(0)
    assert np.mean([Augment(flip=0.3).draw(rng).flip for _ in range(4000)]) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("bad", [{"flip": 1.5}, {"rotation": -1}, {"zoom": 1}, {"shear": 2}, {"shift": 1.0}])
def test_an_impossible_range_is_refused_by_key(bad):
    with pytest.raises(CxrError, match=f"augment.{next(iter(bad))} is"):
        Augment(**bad)
