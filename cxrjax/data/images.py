"""Image decoding and encoding (PNG, JPEG), resizing, and augmentation by a single warp, all on grey uint8."""

import math
import struct
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg  # pyright: ignore[reportMissingImports]
from jaxtyping import UInt8

from cxrjax.data import dicom
from cxrjax.errors import CxrError

Grey = UInt8[np.ndarray, "H W"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
DICOM_SIGNATURE = b"DICM"  # after a preamble of 128 bytes
COLOUR_LEVELS, COLOUR_FRACTION = 16, 0.01
"""A pixel is coloured if its channels differ by more than this; at most this fraction of an image may be."""
SCALED_DECODE_MARGIN = 1.2
"""How much larger than the target a scaled JPEG is decoded at least; closer to it, two filters in a row would blur."""
JPEG_QUALITY = 95  # the mean error on radiographs is below one grey level
SMOOTHING_LIMIT = 1.6
"""Largest reduction for which three smoothing taps approximate the area mean."""

cv2.setNumThreads(0)  # the loader has its own threads; OpenCV's pool would compete with them


def decode(data: bytes, name: str) -> Grey:
    """Decode an 8-bit PNG or JPEG radiograph, or a DICOM file, to grey.

    The format is detected from the content, not from the file's extension. A colour file must show a grey image
    (coloured marks on up to 1 % of the pixels are accepted) and is converted to luminance. An opaque alpha channel is
    dropped. EXIF orientation is applied. See `dicom.decode` for DICOM files.

    PNG has checksums. JPEG has none, so every libjpeg-turbo warning is an error here. This finds missing data at the
    end of a file and missing pieces of a baseline JPEG. It cannot find damage that leaves valid Huffman codes: most
    changes of single bytes, some missing pieces of progressive files, and a progressive file cut between two scans.

    `name` is that of the file or record, for error messages. In the result 0 is black.

    Raises:
      CxrError: the data is empty, truncated or damaged, in another format, deeper than 8 bits (except DICOM), CMYK,
        transparent, or a colour photograph.
    """
    if not data:
        raise CxrError(f"{name}: the file is empty (0 bytes); fetch it again")
    if data[128:132] == DICOM_SIGNATURE:
        return dicom.decode(data, name)
    transparency = False
    if data.startswith(PNG_SIGNATURE):
        transparency = _check_png(data, name)
    elif data.startswith(JPEG_SIGNATURE):
        grey = _check_jpeg(data, name)
        image = _decode_jpeg_strictly(data, name, grey)
        if not _has_exif(data):
            return image[..., 0] if grey else _to_luminance(image, name)
    else:
        raise CxrError(
            f"{name}: {_describe_format(data)}, not a PNG, JPEG or DICOM image; convert it to 8-bit grey PNG"
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYCOLOR)
    except cv2.error as error:
        raise CxrError(
            f"{name}: cannot be decoded ({error.err}); fetch it again or convert it to 8-bit grey PNG"
        ) from error
    if image is None:
        raise CxrError(f"{name}: the image data is damaged; fetch the file again")
    if transparency:
        _check_opaque(data, name)
    return image if image.ndim == 2 else _to_luminance(image, name)


def decode_resized(data: bytes, name: str, size: int) -> Grey:
    """Decode an image at size x size px: an approximation of `resize(decode(data, name), size)`, fast for large JPEGs.

    A grey JPEG is decoded at a half, a quarter or an eighth of its size (the smallest that is at least 1.2 times
    `size`), then smoothed and interpolated. On radiographs the result differs from the area mean of the whole image by
    about one grey level, as antialiased bilinear resizing does. All other images are decoded whole.

    Raises:
      CxrError: see `decode`.
    """
    if data.startswith(JPEG_SIGNATURE):
        try:
            if is_plain_grey(data):
                least = math.ceil(SCALED_DECODE_MARGIN * size)
                image = simplejpeg.decode_jpeg(data, "GRAY", min_height=least, min_width=least, min_factor=2)
                return _shrink(image[..., 0], size)
        except (CxrError, ValueError):
            pass  # `decode` reports the error
    return resize(decode(data, name), size)


def is_plain_grey(data: bytes) -> bool:
    """Return whether a file can be stored as it is: an 8-bit grey PNG, or a grey JPEG without EXIF data."""
    if data.startswith(PNG_SIGNATURE):
        return data[24:26] == b"\x08\x00"  # the header's bit depth and colour type
    return data.startswith(JPEG_SIGNATURE) and _check_jpeg(data, "") and not _has_exif(data)


def encode(image: Grey, format: str = "png") -> bytes:
    """Encode a grey image as "png" (lossless) or "jpeg".

    Raises:
      CxrError: the image is not uint8[H, W], or the format is unknown.
    """
    if image.dtype != np.uint8 or image.ndim != 2 or image.size == 0:
        raise CxrError(f"cannot encode {image.dtype}{list(image.shape)}; give a grey uint8[H, W] image")
    if format == "png":
        return cv2.imencode(".png", image)[1].tobytes()
    if format == "jpeg":
        return cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))[1].tobytes()
    raise CxrError(f"unknown image format {format!r}; use 'png' or 'jpeg'")


def resize(image: Grey, size: int | tuple[int, int]) -> Grey:
    """Resize to a square, without keeping the aspect ratio, or to `(rows, columns)`.

    An axis that shrinks is averaged over pixel areas (no aliasing); an axis that grows is interpolated linearly. An
    image that already has the size is returned unchanged.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    shrunk = (min(image.shape[0], rows), min(image.shape[1], columns))
    if image.shape != shrunk:
        image = np.asarray(cv2.resize(image, shrunk[::-1], interpolation=cv2.INTER_AREA))
    if image.shape != (rows, columns):
        image = np.asarray(cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR))
    return image


def _shrink(image: Grey, size: int) -> Grey:
    """Approximate `resize` at a third of its cost: smooth `image` in place, then interpolate linearly.

    The three taps on each axis and the interpolation's triangle together have the variance of the area mean.
    """
    ratios = [side / size for side in image.shape]
    if min(ratios) < 1 or not 1 < max(ratios) < SMOOTHING_LIMIT:
        return resize(image, size)
    rows, columns = (np.array([tap, 1 - 2 * tap, tap]) for tap in ((ratio**2 - 1) / 24 for ratio in ratios))
    cv2.sepFilter2D(image, -1, columns, rows, dst=image, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR))


def pad_to_square(image: Grey) -> UInt8[np.ndarray, "side side"]:
    """Centre the image in a black square; see `square_margins`."""
    rows, columns = image.shape
    side, top, left = square_margins(rows, columns)
    return np.asarray(
        cv2.copyMakeBorder(image, top, side - rows - top, left, side - columns - left, cv2.BORDER_CONSTANT, value=0)
    )


def square_margins(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the side of the padded square and the padding above and left of the image; an odd pixel goes after it."""
    side = max(rows, columns)
    return side, (side - rows) // 2, (side - columns) // 2


@dataclass(frozen=True)
class Transform:
    """One augmentation: flip, shear, zoom and rotate about the centre of the image, shift, then scale the brightness.

    Attributes:
      flip: mirror left and right.
      rotation: degrees, counter-clockwise.
      shift: right and down, as fractions of width and height.
      zoom: magnification; 1 keeps the scale.
      shear: radians; lower rows move right by its tangent.
      brightness: factor on the grey levels.
    """

    flip: bool = False
    rotation: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    shear: float = 0.0
    brightness: float = 1.0

    def matrix(self, rows: int, columns: int) -> np.ndarray:
        """Return the affine map float64[2, 3] from input to output pixels (x right, y down, centres at integers)."""
        c, s = np.cos(np.deg2rad(self.rotation)), np.sin(np.deg2rad(self.rotation))
        rotate = np.array([[c, s], [-s, c]])
        shear = np.array([[1.0, np.tan(self.shear)], [0.0, 1.0]])
        mirror = np.diag([-1.0 if self.flip else 1.0, 1.0])
        linear = self.zoom * rotate @ shear @ mirror
        centre = np.array([(columns - 1) / 2, (rows - 1) / 2])
        offset = centre + np.array(self.shift) * (columns, rows) - linear @ centre
        return np.column_stack([linear, offset])

    def apply(self, image: Grey, out: Grey | None = None) -> Grey:
        """Transform an image (linear interpolation, black outside), into `out` of the same shape if given."""
        out = np.empty_like(image) if out is None else out
        warped = self._warp(image, out)
        if self.brightness != 1:
            cv2.convertScaleAbs(warped, dst=out, alpha=self.brightness)
        elif warped is image:
            out[...] = image
        return out

    def _warp(self, image: Grey, out: Grey) -> Grey:
        """Warp the image into `out`; return the image itself if nothing moves."""
        if (self.rotation, self.shift, self.zoom, self.shear) != (0, (0, 0), 1, 0):
            rows, columns = image.shape
            cv2.warpAffine(image, self.matrix(rows, columns), (columns, rows), dst=out, flags=cv2.INTER_LINEAR)
        elif self.flip:
            cv2.flip(image, 1, dst=out)
        else:
            return image
        return out


@dataclass(frozen=True)
class Augment:
    """Ranges of random augmentation; each value is uniform in its range, and all 0 disables augmentation.

    Attributes:
      flip: probability of mirroring left and right.
      rotation: degrees, from -rotation to rotation.
      shift: fractions of width and height, each from -shift to shift.
      zoom: magnification, from 1 - zoom to 1 + zoom.
      shear: radians, from -shear to shear.
      brightness: factor, from 1 - brightness to 1 + brightness.
    """

    flip: float = 0.0
    rotation: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    brightness: float = 0.0

    def __post_init__(self):
        if not 0 <= self.flip <= 1:
            raise CxrError(f"augment.flip is {self.flip}; give a probability from 0 to 1")
        for key, below in (("rotation", 180.01), ("shift", 1), ("zoom", 1), ("shear", np.pi / 2), ("brightness", 1.01)):
            if not 0 <= getattr(self, key) < below:
                raise CxrError(f"augment.{key} is {getattr(self, key)}; give a value from 0 to below {below:.4g}")

    def sample(self, rng: np.random.Generator) -> Transform:
        """Sample one transform; always takes the same number of values from `rng`."""
        flip, *uniform = rng.random(7)
        rotation, right, down, zoom, shear, brightness = (2 * x - 1 for x in uniform)
        return Transform(
            flip=bool(flip < self.flip),
            rotation=self.rotation * rotation,
            shift=(self.shift * right, self.shift * down),
            zoom=1 + self.zoom * zoom,
            shear=self.shear * shear,
            brightness=1 + self.brightness * brightness,
        )


def _check_png(data: bytes, name: str) -> bool:
    """Check that the chunks reach IEND and have at most 8 bits; return whether pixels may be transparent."""
    position, kind, depth, transparency = len(PNG_SIGNATURE), b"", 0, False
    while kind != b"IEND":
        if position + 12 > len(data):
            raise _truncated(data, name)
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise _truncated(data, name)
        if kind == b"IHDR" and length == 13:
            depth, colour = data[position + 16], data[position + 17]
            transparency = colour in (4, 6)
        transparency |= kind == b"tRNS"
        position += 12 + length
    if depth > 8:
        raise CxrError(f"{name}: a {depth}-bit PNG; choose a grey window and convert it to 8 bits")
    return transparency


def _check_jpeg(data: bytes, name: str) -> bool:
    """Check the segments up to the first scan (8 bits, 1 or 3 components, an end marker); return whether it is grey."""
    position, components = 2, 0
    while True:
        while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] == b"\xff":
            position += 1  # fill bytes
        if position + 10 > len(data):
            raise _truncated(data, name)
        fill, kind, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF:
            raise CxrError(f"{name}: the JPEG header is damaged; fetch the file again")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            depth, components = data[position + 4], data[position + 9]
            if depth != 8:
                raise CxrError(f"{name}: a {depth}-bit JPEG; choose a grey window and convert it to 8 bits")
            if components not in (1, 3):
                raise CxrError(f"{name}: a JPEG with {components} colour components (CMYK); convert it to 8-bit grey")
        if kind == 0xDA:
            break
        position += 2 + length
    if data.rfind(b"\xff\xd9") < position:
        raise _truncated(data, name)
    return components == 1


def _has_exif(data: bytes) -> bool:
    """Return whether a JPEG has EXIF data, which may hold an orientation that only OpenCV applies."""
    return data.find(b"Exif\0\0", 0, 1 << 16) >= 0


def _decode_jpeg_strictly(data: bytes, name: str, grey: bool) -> UInt8[np.ndarray, "H W C"]:
    """Decode a JPEG to grey or BGR; every libjpeg-turbo warning is an error."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "BGR", strict=True)
    except ValueError as error:
        raise CxrError(
            f"{name}: the JPEG is damaged ({error}); fetch the file again, or, if the original has the same damage and "
            "looks complete, save it as 8-bit grey PNG"
        ) from error


def _check_opaque(data: bytes, name: str) -> None:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is not None and image.ndim == 3 and image.shape[2] == 4 and image[..., 3].min() < 255:
        raise CxrError(f"{name}: has transparent pixels; flatten it to an 8-bit grey image")


def _to_luminance(image: np.ndarray, name: str) -> Grey:
    blue, green, red = cv2.split(image)
    spread = cv2.subtract(cv2.max(cv2.max(blue, green), red), cv2.min(cv2.min(blue, green), red))
    coloured = np.count_nonzero(spread > COLOUR_LEVELS) / spread.size
    if coloured > COLOUR_FRACTION:
        raise CxrError(
            f"{name}: a colour image ({coloured:.0%} of the pixels); if it is a radiograph, convert it to 8-bit grey"
        )
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))  # exact for equal channels


def _truncated(data: bytes, name: str) -> CxrError:
    return CxrError(f"{name}: the image is truncated after {len(data):,} bytes; fetch the file again")


def _describe_format(data: bytes) -> str:
    kinds = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP", b"GIF8": "GIF", b"\0\0\0\x0cjP": "JPEG 2000"}
    for signature, kind in kinds.items():
        if data.startswith(signature):
            return f"a {kind} file"
    return f"starts with {data[:8]!r}"
