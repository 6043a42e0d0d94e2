"""Decode DICOM radiographs to grey uint8, in the grey window that a viewer shows first."""

import io
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

from cxrjax.errors import CxrError

Values = Num[np.ndarray, "H W"]

_FAR = 1e30  # outside every window


def decode(data: bytes, name: str) -> UInt8[np.ndarray, "H W"]:
    """Decode a single-frame grey DICOM image, following DICOM PS3.3 C.11.1 and C.11.2.

    The stored values go through the modality LUT, or rescale slope and intercept, and then through the first VOI LUT or
    window. The smallest and largest values that these can give become 0 and 255. Without a VOI LUT or window, those of
    the image do (without padding), and 8-bit values without a rescale are kept. MONOCHROME1 is inverted, so that air is
    black (0). `name` is that of the file or record, for error messages.

    Raises:
      CxrError: pydicom is not installed, the file is damaged or is not a single grey image, or its compression needs a
        decoder that is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise CxrError(
            f"{name}: a DICOM file, which needs the package pydicom: install with `uv sync --extra dicom`"
        ) from error
    try:
        image = pydicom.dcmread(io.BytesIO(data))
        _check_image(image, name)
        return _to_grey(_read_pixels(image, name), image)
    except CxrError:
        raise
    except Exception as error:  # pydicom raises many types for damage and for values that violate the standard
        message = " ".join(str(error).split())
        raise CxrError(f"{name}: the DICOM file is damaged ({message}); fetch it again") from error


def _check_image(image: Any, name: str) -> None:
    kind = image.get("PhotometricInterpretation")
    if kind is None or "PixelData" not in image:
        raise CxrError(f"{name}: a DICOM file without an image ({image.get('Modality') or 'no modality'})")
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise CxrError(f"{name}: a DICOM image in colour ({kind}); if it is a radiograph, convert it to 8-bit grey PNG")
    frames = int(image.get("NumberOfFrames") or 1)
    if frames != 1:
        raise CxrError(f"{name}: a DICOM file with {frames} frames; give one image per file")


def _read_pixels(image: Any, name: str) -> Values:
    try:
        return image.pixel_array
    except (RuntimeError, NotImplementedError) as error:  # no decoder plugin, or none that succeeded
        syntax = image.file_meta.TransferSyntaxUID.name
        raise CxrError(
            f"{name}: DICOM pixels in {syntax} cannot be decoded ({' '.join(str(error).split())}); install "
            "pylibjpeg[all] if a decoder is missing, or convert the file to 8-bit grey PNG"
        ) from error


def _to_grey(stored: Values, image: Any) -> UInt8[np.ndarray, "H W"]:
    """Map stored values to grey levels, each distinct value once."""
    low, high = int(stored.min()), int(stored.max())
    if high - low >= 2**16:
        return _map_levels(stored, _value_range(stored, image), image)
    levels = np.arange(low, high + 1)
    return _map_levels(levels, _value_range(stored, image), image)[stored.astype(np.int64) - low]


def _map_levels(stored: np.ndarray, value_range: np.ndarray, image: Any) -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut, apply_windowing

    def apply_modality(values: np.ndarray) -> np.ndarray:
        if image.get("ModalityLUTSequence"):
            return _apply_lut(values, image.ModalityLUTSequence[0], image)
        return apply_modality_lut(values, image)

    values = apply_modality(stored)
    if image.get("VOILUTSequence"):
        lut = image.VOILUTSequence[0]
        values, black, white = _apply_lut(values, lut, image), 0, 2 ** lut.LUTDescriptor[2] - 1
    elif image.get("WindowWidth") is not None and image.get("WindowCenter") is not None:
        with np.errstate(over="ignore"):  # far below a sigmoid window
            values = apply_windowing(values, image)
            black, white = apply_windowing(np.array([-_FAR, _FAR]), image)
    elif values is stored and image.BitsStored == 8 and not image.PixelRepresentation:
        black, white = 0, 255
    else:
        black, white = np.sort(apply_modality(value_range))
    scale = 255 / (float(white) - float(black)) if white != black else 0.0
    grey = np.clip(np.rint((values.astype(float) - float(black)) * scale), 0, 255).astype(np.uint8)
    return 255 - grey if image.PhotometricInterpretation == "MONOCHROME1" else grey


def _apply_lut(values: Values, lut: Any, image: Any) -> Values:
    """Apply a LUT. pydicom's function loses input above 255 of 8-bit LUTs and refuses 12-bit modality LUTs."""
    count, first, _ = lut.LUTDescriptor
    entries = lut.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, "<u2" if image.original_encoding[1] else ">u2")
    entries = np.asarray(entries)[: count or 2**16]
    return entries[np.clip(np.rint(values).astype(np.int64) - first, 0, len(entries) - 1)]


def _value_range(stored: Values, image: Any) -> np.ndarray:
    """Return the smallest and the largest stored value that is not padding (PS3.3 C.7.5.1.1.2)."""
    padding = image.get("PixelPaddingValue")
    if padding is not None:
        limit = image.get("PixelPaddingRangeLimit", padding)
        real = stored[(stored < min(padding, limit)) | (stored > max(padding, limit))]
        stored = real if real.size else stored
    return np.array([stored.min(), stored.max()])
