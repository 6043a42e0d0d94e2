"""DICOM radiographs to grey uint8, as a viewer would first show them."""

import io
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

from cxrjax.errors import CxrError

Values = Num[np.ndarray, "H W"]

_FAR = 1e30  # beyond every window


def decode(data: bytes, name: str) -> UInt8[np.ndarray, "H W"]:
    """Decodes a grey DICOM image of one frame, by DICOM PS3.3 C.11.1 and C.11.2.

    The stored values go through the modality table, or rescale slope and intercept; then through the first table or
    window of interest. What these can give at least and at most becomes 0 and 255; without either, the least and the
    largest value of the image do (padding left out), and 8-bit values without a rescale stay as they are. MONOCHROME1
    is inverted, so that air is black.

    Args:
      data: the whole file.
      name: the file or record, for the error message.

    Returns:
      uint8[H, W], 0 black.

    Raises:
      CxrError: pydicom is not installed, the file is damaged or holds no single grey image, or its compression needs a
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
        _check(image, name)
        return _shown(_stored(image, name), image)
    except CxrError:
        raise
    except Exception as error:  # whatever damage, or values that contradict the standard, make of it
        message = " ".join(str(error).split())
        raise CxrError(f"{name}: the DICOM file is damaged ({message}); fetch it again") from error


def _check(image: Any, name: str) -> None:
    kind = image.get("PhotometricInterpretation")
    if kind is None or "PixelData" not in image:
        raise CxrError(f"{name}: a DICOM file without an image ({image.get('Modality') or 'no modality'})")
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise CxrError(f"{name}: a DICOM image in colour ({kind}); if it is a radiograph, convert it to 8-bit grey PNG")
    frames = int(image.get("NumberOfFrames") or 1)
    if frames != 1:
        raise CxrError(f"{name}: a DICOM file of {frames} frames; give one image a file")


def _stored(image: Any, name: str) -> Values:
    try:
        return image.pixel_array
    except (RuntimeError, NotImplementedError) as error:  # no plugin, or none that could
        syntax = image.file_meta.TransferSyntaxUID.name
        raise CxrError(
            f"{name}: DICOM pixels that are {syntax} cannot be decoded ({' '.join(str(error).split())}); where a "
            "decoder is missing, install pylibjpeg[all], or convert the file to 8-bit grey PNG"
        ) from error


def _shown(stored: Values, image: Any) -> UInt8[np.ndarray, "H W"]:
    """The grey levels. Each depends on its stored value alone, so a value is worked out once."""
    low, high = int(stored.min()), int(stored.max())
    if high - low >= 2**16:
        return _grey(stored, _extremes(stored, image), image)
    levels = np.arange(low, high + 1)
    return _grey(levels, _extremes(stored, image), image)[stored.astype(np.int64) - low]


def _grey(stored: np.ndarray, extremes: np.ndarray, image: Any) -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut, apply_windowing

    def measured(values: np.ndarray) -> np.ndarray:
        if image.get("ModalityLUTSequence"):
            return _looked_up(values, image.ModalityLUTSequence[0], image)
        return apply_modality_lut(values, image)

    values = measured(stored)
    if image.get("VOILUTSequence"):
        table = image.VOILUTSequence[0]
        values, black, white = _looked_up(values, table, image), 0, 2 ** table.LUTDescriptor[2] - 1
    elif image.get("WindowWidth") is not None and image.get("WindowCenter") is not None:
        with np.errstate(over="ignore"):  # of a sigmoid window, far below it
            values = apply_windowing(values, image)
            black, white = apply_windowing(np.array([-_FAR, _FAR]), image)
    elif values is stored and image.BitsStored == 8 and not image.PixelRepresentation:
        black, white = 0, 255
    else:
        black, white = np.sort(measured(extremes))
    scale = 255 / (float(white) - float(black)) if white != black else 0.0
    grey = np.clip(np.rint((values.astype(float) - float(black)) * scale), 0, 255).astype(np.uint8)
    return 255 - grey if image.PhotometricInterpretation == "MONOCHROME1" else grey


def _looked_up(values: Values, table: Any, image: Any) -> Values:
    """The entries of a table. pydicom's own way loses input above 255 of 8-bit tables, and refuses 12-bit modality."""
    count, first, _ = table.LUTDescriptor
    entries = table.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, "<u2" if image.original_encoding[1] else ">u2")
    entries = np.asarray(entries)[: count or 2**16]
    return entries[np.clip(np.rint(values).astype(np.int64) - first, 0, len(entries) - 1)]


def _extremes(stored: Values, image: Any) -> np.ndarray:
    """The least and the largest stored value that is not padding (PS3.3 C.7.5.1.1.2)."""
    value = image.get("PixelPaddingValue")
    if value is not None:
        limit = image.get("PixelPaddingRangeLimit", value)
        real = stored[(stored < min(value, limit)) | (stored > max(value, limit))]
        stored = real if real.size else stored
    return np.array([stored.min(), stored.max()])
