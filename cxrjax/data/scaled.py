"""Images read at the size that is wanted: of a JPEG that is much larger, less is decoded."""

import math

import cv2
import numpy as np

from cxrjax.data.images import JPEG_SIGNATURE, Grey, decode, is_plain, resize
from cxrjax.errors import CxrError

try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:  # an environment that was made before this was needed: there every image is decoded whole
    simplejpeg = None

MARGIN = 1.2
"""How much larger than wanted a JPEG is decoded at least: nearer, two filters in a row would blur."""

FACTOR = 1.6
"""From which on three taps are too far from the mean over areas."""


def decode_at(data: bytes, name: str, size: int) -> Grey:
    """The image at size x size px: `resize(decode(data, name), size)`, but faster for a large JPEG.

    Of a grey JPEG a half, a quarter or an eighth is decoded, the smallest that is still 1.2 times as large as wanted,
    and then smoothed and interpolated. On radiographs that is within about a grey level of averaging the whole over
    areas, about as near to it as the antialiased bilinear filter of other programs.

    Raises:
      CxrError: as `decode` does.
    """
    if simplejpeg and data.startswith(JPEG_SIGNATURE):
        try:
            if is_plain(data):
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
