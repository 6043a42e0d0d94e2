"""Maps brought to another scale, size or smoothness, before they are shown or read."""

import cv2
import numpy as np
from jaxtyping import Float
from scipy import ndimage


def normalise(maps: Float[np.ndarray, "*maps h w"]) -> Float[np.ndarray, "*maps h w"]:
    """Each map divided by its largest value, so that it lies in [0, 1]; a map of zeros stays one."""
    highest = maps.max((-2, -1), keepdims=True)
    return np.where(highest > 0, maps / np.where(highest > 0, highest, 1), 0).astype(maps.dtype)


def resize(maps: Float[np.ndarray, "*maps h w"], height: int, width: int) -> Float[np.ndarray, "*maps H W"]:
    """Maps at the image's resolution: bilinear between the centres of the cells, constant beyond the outermost."""
    flat = np.asarray(maps, np.float32).reshape(-1, *maps.shape[-2:])
    large = [cv2.resize(single, (width, height), interpolation=cv2.INTER_LINEAR) for single in flat]
    return np.stack(large).reshape(*maps.shape[:-2], height, width)


def smooth(maps: Float[np.ndarray, "*maps h w"], sigma: float) -> Float[np.ndarray, "*maps h w"]:
    """Maps blurred by a Gaussian of standard deviation `sigma` px; each keeps its sum."""
    return ndimage.gaussian_filter(maps, (0,) * (maps.ndim - 2) + (sigma, sigma))
