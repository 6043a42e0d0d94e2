"""Encoded bytes to grey uint8 and back; plain resizing; augmentation in one warp."""

import math
import struct
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from cxrjax.data import dicom
from cxrjax.errors import CxrError

try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:  # an environment that was made before this was needed: damage inside a JPEG goes unnoticed there
    simplejpeg = None

Grey = UInt8[np.ndarray, "H W"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
DICOM_SIGNATURE = b"DICM"  # behind 128 bytes of anything
COLOUR_LEVELS, COLOUR_SHARE = 16, 0.01

cv2.setNumThreads(0)  # the loader's threads are the parallelism: OpenCV's own pool would fight with them


def decode(data: bytes, name: str) -> Grey:
    """Decodes an 8-bit PNG or JPEG radiograph, or a DICOM one, to grey.

    The content decides, never the file's extension: a JPEG named `.png` is read as a JPEG. A colour file must show a
    grey picture (coloured marks on up to 1 % of the pixels are let pass) and gives its luminance; an opaque alpha
    channel is dropped. An EXIF orientation is applied, as viewers do. See `dicom.decode` for DICOM files.

    Args:
      data: the whole file.
      name: the file or record, for the error message.

    Returns:
      uint8[H, W], 0 black.

    Raises:
      CxrError: empty, cut off or damaged data, anything but PNG, JPEG and DICOM, a PNG or JPEG of more than 8 bits,
        CMYK, transparency, a colour photograph.

    A PNG has checksums. A JPEG has none, but its code words must come out even: whatever makes libjpeg-turbo warn is an
    error here. So a JPEG that lacks its end, or a piece of a baseline one, never becomes a picture with a grey rest,
    also where its end marker is there. What cannot be noticed is damage that leaves valid code words: most changes of
    single bytes, some missing pieces of progressive files, and such a file cut exactly between two of its scans. Only a
    checksum of the file tells these.
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
        if simplejpeg:
            image = _decode_strictly(data, name, grey)
            if not _says_how_to_turn(data):
                return image[..., 0] if grey else _luminance(image, name)
    else:
        raise CxrError(f"{name}: {_what(data)}, not a PNG, JPEG or DICOM image; convert it to 8-bit grey PNG")
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
    return image if image.ndim == 2 else _luminance(image, name)


def is_plain_grey(data: bytes) -> bool:
    """Whether a file that `decode` takes is just its grey pixels: 8-bit grey PNG, or grey JPEG as it is to be seen."""
    if data.startswith(PNG_SIGNATURE):
        return data[24:26] == b"\x08\x00"  # the header's depth and colour type
    return data.startswith(JPEG_SIGNATURE) and _check_jpeg(data, "") and not _says_how_to_turn(data)


def encode(image: Grey, format: str = "png", quality: int = 95) -> bytes:
    """Encodes a grey image.

    Args:
      image: uint8[H, W].
      format: `"png"` (lossless) or `"jpeg"`.
      quality: of a JPEG, 1 to 100; at 95 the mean error on radiographs is below one grey level.

    Raises:
      CxrError: the image is not uint8[H, W], or the format is another.
    """
    if image.dtype != np.uint8 or image.ndim != 2 or image.size == 0:
        raise CxrError(f"cannot encode {image.dtype}{list(image.shape)}; give a grey uint8[H, W] image")
    if format == "png":
        return cv2.imencode(".png", image)[1].tobytes()
    if format == "jpeg":
        return cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()
    raise CxrError(f"unknown image format {format!r}; use 'png' or 'jpeg'")


def resize(image: Grey, size: int | tuple[int, int]) -> Grey:
    """Resizes to a square (the aspect ratio is given up, as the published systems do) or to `(rows, columns)`.

    An axis that shrinks is averaged over the pixels' areas (no aliasing), an axis that grows is interpolated linearly.
    An image of that size already is returned as it is.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    shrunk = (min(image.shape[0], rows), min(image.shape[1], columns))
    if image.shape != shrunk:
        image = np.asarray(cv2.resize(image, shrunk[::-1], interpolation=cv2.INTER_AREA))
    if image.shape != (rows, columns):
        image = np.asarray(cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR))
    return image


def pad_to_square(image: Grey) -> UInt8[np.ndarray, "side side"]:
    """The image in the middle of a black square, as `margins` says."""
    rows, columns = image.shape
    side, top, left = square_margins(rows, columns)
    return np.asarray(
        cv2.copyMakeBorder(image, top, side - rows - top, left, side - columns - left, cv2.BORDER_CONSTANT, value=0)
    )


def square_margins(rows: int, columns: int) -> tuple[int, int, int]:
    """Side of the square that `pad` makes, and how many pixels above and left of the image; an odd one goes after."""
    side = max(rows, columns)
    return side, (side - rows) // 2, (side - columns) // 2


@dataclass(frozen=True)
class Warp:
    """One drawn augmentation: mirror, shear, zoom and rotate about the image's centre, then shift; then brighten.

    Attributes:
      flip: mirror left and right.
      rotation: degrees, counter-clockwise as seen on the screen.
      shift: right and down, as fractions of the width and the height.
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
        """float64[2, 3] that takes a pixel (x right, y down, centres at integers) to its place in the result."""
        c, s = np.cos(np.deg2rad(self.rotation)), np.sin(np.deg2rad(self.rotation))
        rotate = np.array([[c, s], [-s, c]])
        shear = np.array([[1.0, np.tan(self.shear)], [0.0, 1.0]])
        mirror = np.diag([-1.0 if self.flip else 1.0, 1.0])
        linear = self.zoom * rotate @ shear @ mirror
        centre = np.array([(columns - 1) / 2, (rows - 1) / 2])
        offset = centre + np.array(self.shift) * (columns, rows) - linear @ centre
        return np.column_stack([linear, offset])

    def image(self, image: Grey) -> Grey:
        """The image moved (linear interpolation, black where nothing was) and brightened; same shape."""
        return self.into(np.empty_like(image), image)

    def into(self, target: Grey, image: Grey) -> Grey:
        """`image`, but written to an array of that shape, which is returned: a large image is not copied again."""
        moved = self._move(image, cv2.INTER_LINEAR, target)
        if self.brightness != 1:
            cv2.convertScaleAbs(moved, dst=target, alpha=self.brightness)
        elif moved is image:
            target[...] = image
        return target

    def mask(self, mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
        """A mask moved with its image (nearest pixel, False where nothing was); same shape."""
        image = mask.astype(np.uint8)
        return self._move(image, cv2.INTER_NEAREST, np.empty_like(image)).astype(bool)

    def _move(self, image: Grey, interpolation: int, target: Grey) -> Grey:
        """The image moved, in `target`; itself where it does not move."""
        if (self.rotation, self.shift, self.zoom, self.shear) != (0, (0, 0), 1, 0):
            rows, columns = image.shape
            cv2.warpAffine(image, self.matrix(rows, columns), (columns, rows), dst=target, flags=interpolation)
        elif self.flip:
            cv2.flip(image, 1, dst=target)
        else:
            return image
        return target


@dataclass(frozen=True)
class Augment:
    """What may happen to a training image; every value uniform in its range, all 0 means nothing.

    Attributes:
      flip: probability of mirroring left and right.
      rotation: degrees, drawn from +-rotation.
      shift: fractions of width and height, drawn each from +-shift.
      zoom: magnification drawn from 1 - zoom to 1 + zoom.
      shear: radians, drawn from +-shear.
      brightness: factor drawn from 1 - brightness to 1 + brightness.
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

    def draw(self, rng: np.random.Generator) -> Warp:
        """One augmentation; always takes the same number of values from `rng`."""
        flip, *u = rng.random(7)
        rotation, right, down, zoom, shear, brightness = (2 * x - 1 for x in u)
        return Warp(
            flip=bool(flip < self.flip),
            rotation=self.rotation * rotation,
            shift=(self.shift * right, self.shift * down),
            zoom=1 + self.zoom * zoom,
            shear=self.shear * shear,
            brightness=1 + self.brightness * brightness,
        )

    def apply(self, image: Grey, rng: np.random.Generator, size: int) -> UInt8[np.ndarray, "size size"]:
        """The image resized to a square (see `resize`) and augmented."""
        return self.draw(rng).image(resize(image, size))


def _check_png(data: bytes, name: str) -> bool:
    """Walks the chunks: complete to IEND, 8 bits at most. Returns whether pixels may be transparent."""
    position, kind, depth, transparency = len(PNG_SIGNATURE), b"", 0, False
    while kind != b"IEND":
        if position + 12 > len(data):
            raise _cut_off(data, name)
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise _cut_off(data, name)
        if kind == b"IHDR" and length == 13:
            depth, colour = data[position + 16], data[position + 17]
            transparency = colour in (4, 6)
        transparency |= kind == b"tRNS"
        position += 12 + length
    if depth > 8:
        raise CxrError(f"{name}: a {depth}-bit PNG; choose the grey window yourself and convert it to 8 bits")
    return transparency


def _check_jpeg(data: bytes, name: str) -> bool:
    """Walks the segments to the first scan: 8 bits, 1 or 3 components, an end behind the scan. Returns whether grey."""
    position, components = 2, 0
    while True:
        while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] == b"\xff":
            position += 1  # fill bytes
        if position + 10 > len(data):
            raise _cut_off(data, name)
        fill, kind, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF:
            raise CxrError(f"{name}: the JPEG header is damaged; fetch the file again")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            depth, components = data[position + 4], data[position + 9]
            if depth != 8:
                raise CxrError(f"{name}: a {depth}-bit JPEG; choose the grey window yourself and convert it to 8 bits")
            if components not in (1, 3):
                raise CxrError(f"{name}: a JPEG of {components} colour components (CMYK); convert it to 8-bit grey")
        if kind == 0xDA:
            break
        position += 2 + length
    if data.rfind(b"\xff\xd9") < position:
        raise _cut_off(data, name)
    return components == 1


def _says_how_to_turn(data: bytes) -> bool:
    """Whether a JPEG has Exif data, which may hold an orientation: OpenCV applies it."""
    return data.find(b"Exif\0\0", 0, 1 << 16) >= 0


def _decode_strictly(data: bytes, name: str, grey: bool) -> UInt8[np.ndarray, "H W C"]:
    """A JPEG's pixels, grey or BGR; whatever libjpeg-turbo would only warn of is an error."""
    assert simplejpeg is not None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "BGR", strict=True)
    except ValueError as error:
        raise CxrError(
            f"{name}: the JPEG is damaged ({error}); fetch the file again, or, if it is so at its source and looks "
            "whole, save it anew as 8-bit grey PNG"
        ) from error


def _check_opaque(data: bytes, name: str) -> None:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is not None and image.ndim == 3 and image.shape[2] == 4 and image[..., 3].min() < 255:
        raise CxrError(f"{name}: has transparent pixels; flatten it to an 8-bit grey image")


def _luminance(image: np.ndarray, name: str) -> Grey:
    blue, green, red = cv2.split(image)
    spread = cv2.subtract(cv2.max(cv2.max(blue, green), red), cv2.min(cv2.min(blue, green), red))
    coloured = np.count_nonzero(spread > COLOUR_LEVELS) / spread.size
    if coloured > COLOUR_SHARE:
        raise CxrError(
            f"{name}: a colour picture ({coloured:.0%} of the pixels); if it is a radiograph, convert it to 8-bit grey"
        )
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))  # exact where the channels are equal


def _cut_off(data: bytes, name: str) -> CxrError:
    return CxrError(f"{name}: the image is cut off after {len(data):,} bytes; fetch the file again")


def _what(data: bytes) -> str:
    kinds = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP", b"GIF8": "GIF", b"\0\0\0\x0cjP": "JPEG 2000"}
    for signature, kind in kinds.items():
        if data.startswith(signature):
            return f"a {kind} file"
    return f"starts with {data[:8]!r}"


try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:  # an environment that was made before this was needed: there every image is decoded whole
    simplejpeg = None

MARGIN = 1.2
"""How much larger than wanted a JPEG is decoded at least: nearer, two filters in a row would blur."""

FACTOR = 1.6
"""From which on three taps are too far from the mean over areas."""


def decode_resized(data: bytes, name: str, size: int) -> Grey:
    """The image at size x size px: `resize(decode(data, name), size)`, but faster for a large JPEG.

    Of a grey JPEG a half, a quarter or an eighth is decoded, the smallest that is still 1.2 times as large as wanted,
    and then smoothed and interpolated. On radiographs that is within about a grey level of averaging the whole over
    areas, about as near to it as the antialiased bilinear filter of other programs.

    Raises:
      CxrError: as `decode` does.
    """
    if simplejpeg and data.startswith(JPEG_SIGNATURE):
        try:
            if is_plain_grey(data):
                least = math.ceil(MARGIN * size)
                image = simplejpeg.decode_jpeg(data, "GRAY", min_height=least, min_width=least, min_factor=2)
                return _shrink(image[..., 0], size)
        except (CxrError, ValueError):
            pass  # `decode` says what is wrong
    return resize(decode(data, name), size)


def _shrink(image: Grey, size: int) -> Grey:
    """Nearly `resize`, at a third of its cost: smoothing (of `image` itself), then linear interpolation does not alias.

    Three taps on each axis, which with the interpolation's triangle have the variance of the mean over an area.
    """
    ratios = [side / size for side in image.shape]
    if min(ratios) < 1 or not 1 < max(ratios) < FACTOR:
        return resize(image, size)
    rows, columns = (np.array([tap, 1 - 2 * tap, tap]) for tap in ((ratio**2 - 1) / 24 for ratio in ratios))
    cv2.sepFilter2D(image, -1, columns, rows, dst=image, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR))
