"""DICOM files: pydicom's test files, and synthetic ones with grey levels computed by hand from PS3.3."""

import io
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit

from cxrjax.data.images import decode
from cxrjax.errors import CxrError

STORED = np.array([[0, 100, 1000], [2047, 2048, 4095]], np.uint16)


def make_dicom(pixels=STORED, *, bits=12, syntax=ExplicitVRLittleEndian, data=None, **elements) -> bytes:
    """Make a file with an image and further elements."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"  # digital X-ray, for presentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    little = syntax != ExplicitVRBigEndian
    image = FileDataset("", {}, bytes(128), meta, is_implicit_VR=False, is_little_endian=little)
    image.Modality, image.PhotometricInterpretation, image.SamplesPerPixel = "DX", "MONOCHROME2", 1
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated = 8 * pixels.itemsize
    image.BitsStored, image.HighBit, image.PixelRepresentation = bits, bits - 1, int(pixels.dtype.kind == "i")
    ordered = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">"))
    image.PixelData = data or ordered.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in elements.items():
        setattr(image, name, value)
    stream = io.BytesIO()
    image.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def lut(data, first, bits, order="") -> list[Dataset]:
    """Make the sequence of a LUT, with entries as numbers, or as 16-bit words in a byte order."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(data), first, bits])
    item.add_new("LUTData", *(("OW", np.array(data, f"{order}u2").tobytes()) if order else ("US", data)))
    return [item]


def grey(*args, **kwargs):
    return decode(make_dicom(*args, **kwargs), "x.dcm")


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        # smallest and largest value of the image: 255 x / 4095
        ({}, [[0, 6, 62], [127, 128, 255]]),
        # PS3.3 C.11.2.1.2.1, c = 1000, w = 2000: 255 ((x - 999.5) / 1999 + 0.5)
        ({"WindowCenter": 1000, "WindowWidth": 2000}, [[0, 13, 128], [255, 255, 255]]),
        # linear exact: 255 ((x - 1000) / 2000 + 0.5)
        ({"WindowCenter": 1000, "WindowWidth": 2000, "VOILUTFunction": "LINEAR_EXACT"}, [[0, 13, 128], [255] * 3]),
        # sigmoid: 255 / (1 + exp(-4 (x - 1000) / 2000))
        ({"WindowCenter": 1000, "WindowWidth": 2000, "VOILUTFunction": "SIGMOID"}, [[30, 36, 128], [227, 227, 254]]),
        # the first of two windows
        ({"WindowCenter": [1000, 50], "WindowWidth": [2000, 10]}, [[0, 13, 128], [255, 255, 255]]),
        # after rescaling: x / 2 - 100 in a window from -100 to 900
        (
            {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": 400, "WindowWidth": 1000},
            [[0, 13, 128], [255, 255, 255]],
        ),
        # a window wider than the data does not stretch them
        ({"WindowCenter": 8192, "WindowWidth": 16384}, [[0, 2, 16], [32, 32, 64]]),
        # without padding (4095): 255 x / 2048
        ({"PixelPaddingValue": 4095}, [[0, 12, 125], [255, 255, 255]]),
        ({"PixelPaddingValue": 2048, "PixelPaddingRangeLimit": 4095}, [[0, 12, 125], [255, 255, 255]]),
    ],
)
def test_grey_levels_by_hand(elements, expected):
    actual = grey(**elements)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(grey(PhotometricInterpretation="MONOCHROME1", **elements), 255 - actual)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32])
def test_full_range_of_a_type(dtype):
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    pixels = np.linspace(least, most, 256).reshape(16, 16).astype(dtype)
    np.testing.assert_array_equal(grey(pixels, bits=8 * pixels.itemsize).ravel(), np.arange(256))


def test_signed_values():
    pixels = np.array([[-2048, -1024, 0], [512, 1024, 2047]], np.int16)
    np.testing.assert_array_equal(grey(pixels), [[0, 64, 128], [159, 191, 255]])  # 255 (x + 2048) / 4095
    window = grey(pixels, WindowCenter=0, WindowWidth=2049)  # 255 ((x + 0.5) / 2048 + 0.5)
    np.testing.assert_array_equal(window, [[0, 0, 128], [191, 255, 255]])


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize(
    ("syntax", "order"),
    [
        (ExplicitVRLittleEndian, ""),
        (ExplicitVRLittleEndian, "<"),
        (ExplicitVRBigEndian, ""),
        (ExplicitVRBigEndian, ">"),
    ],
)
def test_voi_luts(bits, syntax, order):
    top = 2**bits - 1
    data = [round(top * (k / 3000) ** 0.5) for k in range(3001)]
    actual = grey(VOILUTSequence=lut(data, 100, bits, order), syntax=syntax, WindowCenter=5, WindowWidth=2)
    expected = [[0, 0, 255 * 0.3**0.5], [255 * (1947 / 3000) ** 0.5, 255 * (1948 / 3000) ** 0.5, 255]]
    np.testing.assert_allclose(actual, expected, atol=0.6)
    if bits == 12:
        image = pydicom.dcmread(io.BytesIO(make_dicom(VOILUTSequence=lut(data, 100, bits))))
        reference = apply_voi_lut(image.pixel_array, image)
        np.testing.assert_array_equal(actual, np.rint(reference / 4095 * 255))


def test_modality_lut_is_applied_before_the_window():
    data = list(range(4096))[::-1]  # densities: 4095 - x
    modality = lut(data, 0, 12)
    modality[0].ModalityLUTType = "OD"
    actual = grey(ModalityLUTSequence=modality, WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_array_equal(actual, 255 - grey(WindowCenter=2048, WindowWidth=4096))


def test_eight_bits_are_kept():
    pixels = np.random.default_rng(0).integers(40, 90, (5, 7), np.uint8)
    np.testing.assert_array_equal(grey(pixels, bits=8), pixels)
    np.testing.assert_array_equal(grey(pixels, bits=8, PhotometricInterpretation="MONOCHROME1"), 255 - pixels)


def test_constant_image():
    np.testing.assert_array_equal(grey(np.full((2, 2), 700, np.uint16)), np.zeros((2, 2)))
    np.testing.assert_array_equal(grey(np.full((2, 2), 700, np.uint16), PixelPaddingValue=700), np.zeros((2, 2)))


def test_compressed_radiograph():
    pixels = np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    data = make_dicom(pixels, bits=8, syntax=JPEGBaseline8Bit, data=encapsulate([stream.getvalue()]))
    np.testing.assert_array_equal(decode(data, "x.dcm"), np.asarray(Image.open(stream)))


# --- pydicom's test files


def read_test_file(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
    ],
)  # fmt: skip
def test_one_image_in_six_encodings(name):
    image = pydicom.dcmread(io.BytesIO(read_test_file("MR_small.dcm")))
    pixels = image.pixel_array.astype(float)
    window = np.clip((pixels - 599.5) / 1599 + 0.5, 0, 1)  # centre 600, width 1600
    np.testing.assert_array_equal(decode(read_test_file(name), name), np.rint(255 * window))


def test_rescaled_ct_without_a_window():
    image = pydicom.dcmread(io.BytesIO(read_test_file("CT_small.dcm")))
    values = apply_modality_lut(image.pixel_array, image)
    expected = np.rint(255 * (values - values.min()) / np.ptp(values))
    np.testing.assert_array_equal(decode(read_test_file("CT_small.dcm"), "x"), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SC_rgb_small_odd.dcm", r"x: a DICOM image in colour \(RGB\)"),
        ("rtdose.dcm", "x: a DICOM file with 15 frames; give one image per file"),
        ("test-SR.dcm", r"x: a DICOM file without an image \(SR\)"),
        ("MR_truncated.dcm", r"x: the DICOM file is damaged \(The number of bytes of pixel data is less"),
        ("JPGExtended.dcm", r"x: DICOM pixels in JPEG Extended .* cannot be decoded .*install pylibjpeg\[all\]"),
        ("MR_small_jpeg_ls_lossless.dcm", r"pixels in JPEG-LS Lossless Image Compression cannot .* pylibjpeg"),
    ],
)
def test_unsupported_file_is_an_error_that_names_it(name, message):
    with pytest.raises(CxrError, match=message):
        decode(read_test_file(name), "x")


@pytest.mark.parametrize("lost", [2, 12, 40, 200])
def test_truncated_file_is_an_error(lost):
    with pytest.raises(CxrError, match=r"x: (the DICOM file is damaged|a DICOM file without an image)"):
        decode(make_dicom()[:-lost], "x")


def test_invalid_window_is_an_error():
    with pytest.raises(CxrError, match=r"x: the DICOM file is damaged \(The \(0028,1051\) Window Width must be"):
        decode(make_dicom(WindowCenter=5, WindowWidth=0), "x")


def test_missing_pydicom_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    data = bytes(128) + b"DICM" + bytes(64)
    with pytest.raises(CxrError, match=r"x\.dcm: a DICOM file, which needs the package pydicom: .*--extra dicom"):
        decode(data, "x.dcm")
