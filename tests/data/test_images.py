"""Decoding against PIL, resizing against exact area sums, warps against SciPy in float64."""

import contextlib
import io
import struct

import cv2
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cxrjax.data.images import Augment, Transform, decode, encode, is_plain_grey, resize
from cxrjax.errors import CxrError


def smooth_image(rows=48, columns=64, seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(rows, columns))
    field = scipy.ndimage.gaussian_filter(noise, 3)
    return np.uint8(255 * (field - field.min()) / np.ptp(field))


def pil_encode(image, format="PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


# --- decoding


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_of_every_colour_type_decodes_to_grey(mode):
    image = Image.fromarray(smooth_image()).convert(mode)
    decoded = decode(pil_encode(image), "x.png")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_agrees_with_pil(mode, progressive):
    data = pil_encode(Image.fromarray(smooth_image()).convert(mode), "JPEG", quality=95, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"), int)
    assert np.abs(decode(data, "x.jpg") - expected).max() <= 1


def test_format_is_detected_from_the_content():
    image = smooth_image()
    np.testing.assert_array_equal(decode(pil_encode(image), "mislabelled.jpg"), image)


def test_every_kind_of_nih_file(shared):
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
        (smooth_image(), "PNG", True),
        (smooth_image(), "JPEG", True),
        (Image.fromarray(smooth_image()).convert("RGB"), "PNG", False),
        (Image.fromarray(smooth_image()).convert("RGB"), "JPEG", False),
        (Image.fromarray(smooth_image()).convert("P"), "PNG", False),
        (Image.fromarray(smooth_image()).convert("1"), "PNG", False),
    ],
)
def test_plain_files_are_8_bit_grey(image, format, plain):
    assert is_plain_grey(pil_encode(image, format)) == plain


def test_rotated_jpeg_is_not_plain():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not is_plain_grey(pil_encode(smooth_image(), "JPEG", exif=exif))
    assert not is_plain_grey(bytes(200))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = pil_encode(smooth_image(), "JPEG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_allclose(decode(data, "x.jpg"), expected, atol=1)


def test_coloured_mark_is_accepted_and_photograph_is_an_error():
    picture = np.repeat(smooth_image()[..., None], 3, axis=2)
    picture[2:5, 2:8] = (255, 0, 0)
    decoded = decode(pil_encode(picture), "x.png")
    assert np.abs(decoded - np.asarray(Image.fromarray(picture).convert("L"), int)).max() <= 1
    picture[:24] = (200, 30, 30)
    with pytest.raises(CxrError, match=r"photo\.png: a colour image \(50%"):
        decode(pil_encode(picture), "photo.png")


def png_of_16_bits():
    return pil_encode(Image.fromarray(smooth_image().astype(np.uint16) * 257))


def transparent():
    image = Image.fromarray(smooth_image()).convert("RGBA")
    image.putalpha(Image.fromarray(smooth_image(seed=1)))
    return pil_encode(image)


def jpeg_of_12_bits():
    data = bytearray(pil_encode(smooth_image(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"Image Index,Finding Labels\n" * 9, "not a PNG, JPEG or DICOM image"),
        (pil_encode(smooth_image(), "TIFF"), "a TIFF file"),
        (pil_encode(smooth_image(), "BMP"), "a BMP file"),
        (bytes(128) + b"DICM" + bytes(200), "a DICOM file without an image"),
        (png_of_16_bits(), "16-bit PNG"),
        (jpeg_of_12_bits(), "12-bit JPEG"),
        (pil_encode(Image.fromarray(smooth_image()).convert("CMYK"), "JPEG"), "CMYK"),
        (transparent(), "transparent"),
    ],
)
def test_unsupported_image_is_an_error_that_names_it(data, message):
    with pytest.raises(CxrError, match=f"^bad/image.png: .*{message}"):
        decode(data, "bad/image.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_every_truncation_is_detected(format):
    data = pil_encode(smooth_image(), format)
    for length in range(len(data)):
        with pytest.raises(CxrError, match=r"^cut\.png: "):
            decode(data[:length], "cut.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_file_padded_with_zeros_is_truncated(format):
    data = pil_encode(smooth_image(), format)
    for length in (len(data) // 3, len(data) // 2, len(data) - 14):
        with pytest.raises(CxrError, match=r"^cut\.png: "):
            decode(data[:length].ljust(len(data), b"\0"), "cut.png")


def test_thumbnail_does_not_hide_truncation():
    thumbnail = pil_encode(smooth_image(8, 8), "JPEG")
    data = pil_encode(smooth_image(), "JPEG", comment=thumbnail)
    assert decode(data, "whole.jpg").shape == (48, 64)
    with pytest.raises(CxrError, match="truncated"):
        decode(data[:-40], "cut.jpg")


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_damaged_png_never_decodes_to_another_image(position, change):
    data = bytearray(pil_encode(smooth_image(12, 12)))
    data[position % len(data)] ^= change
    with contextlib.suppress(CxrError):
        decoded = decode(bytes(data), "x.png")
        np.testing.assert_array_equal(decoded, smooth_image(12, 12))


def test_png_without_all_rows_is_an_error():
    data = pil_encode(smooth_image(200, 300))
    start = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, start)
    header = np.frombuffer(data[:start], np.uint8).copy()
    missing = header.tobytes() + data[start + 12 + length :]
    with pytest.raises(CxrError, match="damaged"):
        decode(missing, "x.png")


# --- encoding


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_png_round_trip_is_lossless(rows, columns, seed):
    image = np.random.default_rng(seed).integers(0, 256, (rows, columns), np.uint8)
    data = encode(image)
    np.testing.assert_array_equal(decode(data, "x"), image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_jpeg_is_grey_and_close():
    data = encode(smooth_image(), "jpeg")
    assert Image.open(io.BytesIO(data)).mode == "L"
    assert np.abs(decode(data, "x") - smooth_image().astype(int)).mean() < 1


def test_only_grey_bytes_are_encoded():
    for image in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8)):
        with pytest.raises(CxrError, match="grey uint8"):
            encode(image)
    with pytest.raises(CxrError, match="unknown image format 'tiff'"):
        encode(smooth_image(), "tiff")


# --- resizing


def area_mean(image, rows, columns) -> np.ndarray:
    """Compute exact means over the areas of the new pixels by interpolating the cumulative sum."""
    for axis, size in ((0, rows), (1, columns)):
        image = np.moveaxis(np.asarray(image, np.float64), axis, 0)
        total = np.concatenate([np.zeros_like(image[:1]), np.cumsum(image, axis=0)])
        edges = np.linspace(0, len(image), size + 1)
        at_edges = np.apply_along_axis(lambda t, e=edges: np.interp(e, np.arange(len(t)), t), 0, total)
        image = np.moveaxis(np.diff(at_edges, axis=0) * size / len(image), 0, axis)
    return image


@pytest.mark.parametrize("size", [24, 17, (48, 31), (11, 64), (1, 1)])
def test_shrinking_is_the_area_mean(size):
    image = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    resized = resize(image, size)
    assert resized.shape == (rows, columns)
    assert np.abs(resized - area_mean(image, rows, columns)).max() <= 0.51


@pytest.mark.parametrize("size", [(96, 128), (100, 91)])
def test_growing_is_linear(size):
    image = smooth_image()
    at = [np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1) for n, m in zip(size, image.shape, strict=True)]
    expected = scipy.ndimage.map_coordinates(image.astype(float), np.meshgrid(*at, indexing="ij"), order=1)
    assert np.abs(resize(image, size) - expected).max() <= 1


def test_shrinking_axis_is_antialiased_while_the_other_grows():
    stripes = np.zeros((40, 64), np.uint8)
    stripes[::2] = 255
    assert np.abs(resize(stripes, (20, 128)) - 127.5).max() <= 0.5
    stripes = np.zeros((64, 40), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, (128, 20)) - 127.5).max() <= 0.5


def test_same_size_returns_the_same_image():
    image = smooth_image(32, 32)
    np.testing.assert_array_equal(resize(image, 32), image)


# --- augmentation

EVERYTHING = Augment(flip=0.5, rotation=15, shift=0.1, zoom=0.1, shear=0.1, brightness=0.2)


def scipy_transform(image, transform) -> np.ndarray:
    """Apply the transform in float64 with SciPy, each step as its own 3x3 matrix."""
    rows, columns = image.shape
    centre = np.array([[1, 0, (columns - 1) / 2], [0, 1, (rows - 1) / 2], [0, 0, 1.0]])
    shift = np.array([[1, 0, transform.shift[0] * columns], [0, 1, transform.shift[1] * rows], [0, 0, 1.0]])
    angle = np.deg2rad(transform.rotation)
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    zoom = np.diag([transform.zoom, transform.zoom, 1])
    shear = np.array([[1, np.tan(transform.shear), 0], [0, 1, 0], [0, 0, 1.0]])
    mirror = np.diag([-1.0 if transform.flip else 1.0, 1, 1])
    back = np.linalg.inv(shift @ centre @ turn @ zoom @ shear @ mirror @ np.linalg.inv(centre))
    swap = np.eye(3)[[1, 0, 2]]  # SciPy counts rows first
    return scipy.ndimage.affine_transform(image.astype(np.float64), swap @ back @ swap, order=1, mode="grid-constant")


def test_default_transform_is_the_identity():
    image = smooth_image()
    np.testing.assert_array_equal(Transform().apply(image), image)
    np.testing.assert_array_equal(
        Augment().sample(np.random.default_rng(0)).apply(smooth_image(32, 32)), smooth_image(32, 32)
    )


def test_flip_is_a_mirror_also_inside_a_warp():
    image = smooth_image()
    np.testing.assert_array_equal(Transform(flip=True).apply(image), image[:, ::-1])
    warped = cv2.warpAffine(image, Transform(flip=True).matrix(*image.shape), image.shape[::-1])
    np.testing.assert_array_equal(warped, image[:, ::-1])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_are_counter_clockwise_turns(turns):
    image = smooth_image(48, 48)
    turned = Transform(rotation=90.0 * turns).apply(image)
    assert np.abs(turned - np.rot90(image, turns).astype(int)).max() <= 1


def test_shift_by_whole_pixels_is_exact_and_fills_with_black():
    image = smooth_image(40, 80) | 1
    shifted = Transform(shift=(3 / 80, -5 / 40)).apply(image)
    np.testing.assert_array_equal(shifted[:-5, 3:], image[5:, :-3])
    assert not shifted[-5:].any()
    assert not shifted[:, :3].any()


def test_zoom_keeps_the_centre_and_magnifies():
    image = np.zeros((65, 65), np.uint8)
    image[16:49, 16:49] = 200
    assert Transform(zoom=1.5).apply(image).sum() / image.sum() == pytest.approx(1.5**2, rel=0.05)
    assert Transform(zoom=1.5).apply(image)[32, 32] == 200


def test_brightness_is_a_saturating_factor():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    bright = Transform(brightness=1.3).apply(image)
    np.testing.assert_allclose(bright, np.minimum(image * 1.3, 255), atol=0.501)


@pytest.mark.parametrize(
    "transform",
    [
        Transform(rotation=11.3),
        Transform(shear=-0.17),
        Transform(zoom=0.87),
        Transform(shift=(0.0432, -0.081)),
        Transform(flip=True, rotation=-13, shift=(-0.05, 0.07), zoom=1.09, shear=0.1),
    ],
)
def test_transform_agrees_with_scipy_in_float64(transform):
    image = smooth_image(90, 120)
    inside = scipy_transform(np.full_like(image, 255), transform) > 254.999
    error = np.abs(transform.apply(image) - scipy_transform(image, transform))[inside]
    assert error.max() <= 1
    assert error.mean() < 0.4


def test_shrinking_before_the_warp_is_antialiased():
    stripes = np.zeros((128, 128), np.uint8)
    stripes[::2] = 255
    result = Augment(rotation=5).sample(np.random.default_rng(0)).apply(resize(stripes, 32))[8:-8, 8:-8]
    assert np.ptp(result.astype(int)) <= 2


@given(st.integers(0, 2**32 - 1), st.sampled_from([(20, 33), (48, 48), (7, 5)]))
@settings(max_examples=50, deadline=None)
def test_augmented_image_has_its_size_and_is_reproducible(seed, shape):
    image = smooth_image(*shape)
    first, second = (EVERYTHING.sample(np.random.default_rng(seed)).apply(resize(image, 24)) for _ in range(2))
    assert first.shape == (24, 24)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_samples_stay_in_their_ranges(seed):
    transform = EVERYTHING.sample(np.random.default_rng(seed))
    assert abs(transform.rotation) <= 15
    assert max(map(abs, transform.shift)) <= 0.1
    assert 0.9 <= transform.zoom <= 1.1
    assert abs(transform.shear) <= 0.1
    assert 0.8 <= transform.brightness <= 1.2


def test_flip_probability():
    rng = np.random.default_rng(0)
    assert np.mean([Augment(flip=0.3).sample(rng).flip for _ in range(4000)]) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("bad", [{"flip": 1.5}, {"rotation": -1}, {"zoom": 1}, {"shear": 2}, {"shift": 1.0}])
def test_invalid_range_is_an_error_that_names_the_key(bad):
    with pytest.raises(CxrError, match=f"augment.{next(iter(bad))} is"):
        Augment(**bad)
