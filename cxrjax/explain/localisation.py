"""Localisation scores of saliency maps against masks: pointing game, energy inside the mask, and overlap.

Pointing game: Zhang et al., "Top-down neural attention by excitation backprop" (2016). Energy: Wang et al., "Score-CAM"
(2020). The scores need maps of at least 8 x 8 cells; in coarser ones a cell is as large as a finding.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage, stats

from cxrjax.errors import CxrError

RESOLVABLE = 8  # cells


@dataclass(frozen=True)
class Localisation:
    """Localisation scores of the maps of one finding.

    Attributes:
      images: number of pairs of map and mask.
      hits: maps whose maximum is in the mask, within the tolerance.
      hit_rate: hits / images.
      low, high: the hit rate's 95 % Wilson interval.
      chance: hit rate of a random pixel: mean area fraction of the masks, including the tolerance.
      energy: mean fraction of the map that is inside the mask, over maps that are not empty; nan if all are.
      area: mean area fraction of the masks, which is the expected `energy` by chance.
      iou: mean intersection over union of the mask and the thresholded map.
      empty: maps that are zero everywhere; they count as misses.
      resolvable: whether the maps have at least 8 x 8 cells; if not, the scores are meaningless.
    """

    images: int
    hits: int
    hit_rate: float
    low: float
    high: float
    chance: float
    energy: float
    area: float
    iou: float
    empty: int
    resolvable: bool


def localisation(
    maps: Float[np.ndarray, "N h w"],
    masks: Sequence[Bool[np.ndarray, "H W"]],
    *,
    tolerance: float = 0.0,
    threshold: float = 0.5,
) -> Localisation:
    """Score the maps of one finding against masks of it.

    Args:
      maps: not negative, one per image that shows the finding.
      masks: one per map, of any size (`Records.mask`), not empty.
      tolerance: distance from the mask at which the maximum still counts as a hit, as a fraction of the mask's width.
      threshold: fraction of a map's maximum above which a pixel counts as marked, for `iou`.

    Raises:
      CxrError: there are no maps, not one mask per map, a mask is empty, or a map is negative or not finite.
    """
    if len(maps) == 0 or len(maps) != len(masks):
        raise CxrError(f"localisation needs one mask per map and at least one map, not {len(masks)} for {len(maps)}")
    if not np.isfinite(maps).all() or (maps < 0).any():
        raise CxrError("localisation needs maps that are finite and not negative everywhere")
    empty_masks = [i for i, mask in enumerate(masks) if not mask.any()]
    if empty_masks:
        raise CxrError(f"mask {empty_masks[0]} is empty: score only images that show the finding")

    margins = [tolerance * mask.shape[1] for mask in masks]
    hits = sum(points_at(*pair) for pair in zip(maps, masks, margins, strict=True))
    low, high = wilson(hits, len(maps))
    energies = [energy_inside(*pair) for pair in zip(maps, masks, strict=True)]
    marked = [energy for energy in energies if not math.isnan(energy)]
    return Localisation(
        images=len(maps),
        hits=hits,
        hit_rate=hits / len(maps),
        low=low,
        high=high,
        chance=_mean((distance_to(mask) <= px).mean() for mask, px in zip(masks, margins, strict=True)),
        energy=_mean(marked) if marked else math.nan,
        area=_mean(mask.mean() for mask in masks),
        iou=_mean(overlap(*pair, threshold) for pair in zip(maps, masks, strict=True)),
        empty=len(energies) - len(marked),
        resolvable=resolvable(maps.shape[-2:]),
    )


def pooled(scores: Sequence[Localisation]) -> Localisation:
    """Return the scores of the maps of several findings together; every map counts once."""
    images = np.array([score.images for score in scores])
    marked = images - [score.empty for score in scores]
    hits = sum(score.hits for score in scores)
    low, high = wilson(hits, int(images.sum()))

    def mean(name: str, weights: np.ndarray) -> float:
        counted = weights > 0
        values = np.array([getattr(score, name) for score in scores])[counted]
        return float(np.average(values, weights=weights[counted])) if counted.any() else math.nan

    return Localisation(
        images=int(images.sum()),
        hits=hits,
        hit_rate=hits / int(images.sum()),
        low=low,
        high=high,
        chance=mean("chance", images),
        energy=mean("energy", marked),
        area=mean("area", images),
        iou=mean("iou", images),
        empty=sum(score.empty for score in scores),
        resolvable=all(score.resolvable for score in scores),
    )


def wilson(hits: int, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a rate; images are treated as independent."""
    interval = stats.binomtest(hits, images).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def resolvable(shape: Sequence[int]) -> bool:
    """Return whether maps of this shape (rows, columns) have the 8 x 8 cells that localisation scores need."""
    return min(shape) >= RESOLVABLE


def points_at(heat: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "H W"], tolerance: float = 0.0) -> bool:
    """Return whether the map's maximum is in the mask, or at most `tolerance` px of the mask away from it.

    The maximum of an interpolated map is at the centre of its highest cell; of several highest cells, the first counts.
    A map of zeros points nowhere.
    """
    if not heat.any():
        return False
    cell = np.unravel_index(heat.argmax(), heat.shape)
    row, column = (
        min(int((index + 0.5) * size / cells), size - 1)
        for index, size, cells in zip(cell, mask.shape, heat.shape, strict=True)
    )
    return bool(distance_to(mask)[row, column] <= tolerance)


def distance_to(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Return the distance of each pixel from the mask, px; 0 inside."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def energy_inside(heat: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "H W"]) -> float:
    """Return the fraction of the map, resized to the mask, that is inside the mask; nan for a map of zeros."""
    large = resize(heat, *mask.shape).astype(np.float64)
    total = large.sum()
    return float(large[mask].sum() / total) if total > 0 else math.nan


def overlap(heat: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "H W"], threshold: float = 0.5) -> float:
    """Return the IoU of the mask and the map, resized to it, above `threshold` of the map's maximum."""
    if not heat.any():
        return 0.0
    marked = normalise(resize(heat, *mask.shape)) >= threshold
    return float((marked & mask).sum() / (marked | mask).sum())


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def normalise(maps: Float[np.ndarray, "*maps h w"]) -> Float[np.ndarray, "*maps h w"]:
    """Divide each map by its maximum, so that it is in [0, 1]; maps of zeros stay zero."""
    highest = maps.max((-2, -1), keepdims=True)
    return np.where(highest > 0, maps / np.where(highest > 0, highest, 1), 0).astype(maps.dtype)


def resize(maps: Float[np.ndarray, "*maps h w"], height: int, width: int) -> Float[np.ndarray, "*maps H W"]:
    """Resize maps bilinearly between the centres of their cells; constant beyond the outermost."""
    flat = np.asarray(maps, np.float32).reshape(-1, *maps.shape[-2:])
    large = [cv2.resize(single, (width, height), interpolation=cv2.INTER_LINEAR) for single in flat]
    return np.stack(large).reshape(*maps.shape[:-2], height, width)


def smooth(maps: Float[np.ndarray, "*maps h w"], sigma: float) -> Float[np.ndarray, "*maps h w"]:
    """Blur maps by a Gaussian of standard deviation `sigma` px; each keeps its sum."""
    return ndimage.gaussian_filter(maps, (0,) * (maps.ndim - 2) + (sigma, sigma))
