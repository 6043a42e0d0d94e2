"""Boxes around what maps mark, against the boxes of where the finding is: hit rates by IoU and by IoBB.

Wang et al., "ChestX-ray8: hospital-scale chest X-ray database and benchmarks" (2017): heat maps are cut at a threshold,
a box is put around each isolated region, and a localisation is right where IoU > T, the intersection over the union of
both boxes, or where IoBB > T, the intersection over the detected *box* (not over the region in it, whose like is called
IoR elsewhere).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from cxrjax.errors import CxrError
from cxrjax.explain.localisation import resize, wilson

Boxes = Float[np.ndarray, "n 4"]
"""Left, top, width and height as fractions of the image's width and height."""
Regions = Literal["peak", "all"]
REGIONS: tuple[Regions, ...] = get_args(Regions)
LIMITS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_SIDE = 256  # px, of the grid on which regions are found, or the map's own where that is finer
_PLACES = 32  # along each side, of a box put down at random


@dataclass(frozen=True)
class HitRate:
    """How many images are hit at one limit T.

    Attributes:
      limit: T; the overlap must be larger.
      hits: images where the best pair of a detected and a true box overlaps by more.
      rate: hits / images.
      low: lower end of the rate's Wilson interval.
      high: its upper end.
      chance: the rate that detected boxes of the same sizes would have anywhere in the image, all places equally
        likely, each box by itself.
      false_boxes: detected boxes per image that overlap with no true box by more.
    """

    limit: float
    hits: int
    rate: float
    low: float
    high: float
    chance: float
    false_boxes: float


@dataclass(frozen=True)
class BoxScores:
    """How well detected boxes fit the true ones.

    Attributes:
      images: how many.
      mean_iou: mean over images of the best pair's IoU.
      mean_iobb: likewise.
      iou: hit rates by IoU, one per limit.
      iobb: likewise.
    """

    images: int
    mean_iou: float
    mean_iobb: float
    iou: tuple[HitRate, ...]
    iobb: tuple[HitRate, ...]


def detected(heat: Float[np.ndarray, "h w"], *, threshold: float = 0.5, regions: Regions = "peak") -> Boxes:
    """Boxes around what a map marks: where it reaches `threshold` of its maximum, neighbours by side or corner joined.

    Args:
      heat: not negative; resized to 256 px where it is coarser. A map of zeros marks nothing.
      threshold: above 0 and at most 1. Wang et al. used 60/255 and 180/255.
      regions: `peak`: the region that holds the maximum. `all`: every region, the largest first, as Wang et al.

    Raises:
      CxrError: threshold out of range, or no such reading of regions.
    """
    if not 0 < threshold <= 1:
        raise CxrError(f"threshold must be above 0 and at most 1, not {threshold}")
    if regions not in REGIONS:
        raise CxrError(f"no reading of regions {regions!r}; choose one of {', '.join(REGIONS)}")
    if not heat.any():
        return np.zeros((0, 4))
    large = resize(heat, *(max(_SIDE, side) for side in heat.shape))
    marked = large >= threshold * large.max()
    if regions == "peak":
        labels = _regions(marked)
        marked = labels == labels.ravel()[large.argmax()]
    return boxes_of(marked)


def boxes_of(mask: Bool[np.ndarray, "H W"]) -> Boxes:
    """Bounding boxes of a mask's regions, whose pixels touch by side or corner; the largest region first."""
    labels = _regions(mask)
    order = np.argsort(-np.bincount(labels.ravel())[1:], kind="stable")
    found = ndimage.find_objects(labels)
    edges = [(cut[1].start, cut[0].start, cut[1].stop, cut[0].stop) for cut in (found[k] for k in order)]
    left, top, right, bottom = np.array(edges, np.float64).reshape(-1, 4).T
    height, width = mask.shape
    return np.stack([left / width, top / height, (right - left) / width, (bottom - top) / height], -1)


def _regions(mask: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """The number of each pixel's region, from 1; 0 outside."""
    return ndimage.label(mask, np.ones((3, 3)))[0]  # pyright: ignore


def overlaps(
    found: Float[np.ndarray, "*found 4"], true: Float[np.ndarray, "*true 4"]
) -> tuple[Float[np.ndarray, "*pairs"], Float[np.ndarray, "*pairs"]]:
    """IoU, and IoBB with `found` as the detected ones, of boxes whose leading axes broadcast; 0 for empty boxes."""
    first, last = np.maximum(found[..., :2], true[..., :2]), np.minimum(_ends(found), _ends(true))
    inside = np.maximum(last - first, 0).prod(-1)
    detected_area, true_area = found[..., 2:].prod(-1), true[..., 2:].prod(-1)
    return _ratio(inside, detected_area + true_area - inside), _ratio(inside, detected_area)


def _ends(boxes: Float[np.ndarray, "*boxes 4"]) -> Float[np.ndarray, "*boxes 2"]:
    return boxes[..., :2] + boxes[..., 2:]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def box_scores(
    found: Sequence[Boxes], true: Sequence[Boxes], *, limits: Sequence[float] = LIMITS, confidence: float = 0.95
) -> BoxScores:
    """Score the detected boxes of images that show a finding.

    An image with several detected or several true boxes counts by its best pair, so it is enough to find one of them.

    Args:
      found: per image; none where the map is empty, which is a miss.
      true: per image, at least one each.
      limits: T.
      confidence: of the intervals.

    Raises:
      CxrError: no images, not as many true as detected, or an image without a true box.
    """
    if len(found) == 0 or len(found) != len(true):
        raise CxrError(f"true boxes are needed for each image, and at least one image: {len(true)} for {len(found)}")
    without = [i for i, boxes in enumerate(true) if not len(boxes)]
    if without:
        raise CxrError(f"image {without[0]} has no true box: score only images that show the finding")
    best = [[of.max(-1) for of in overlaps(f[:, None], t[None])] for f, t in zip(found, true, strict=True)]
    by_chance = np.mean([_by_chance(f, t, limits) for f, t in zip(found, true, strict=True)], axis=0)

    def rates(kind: int) -> tuple[float, tuple[HitRate, ...]]:
        highest = np.array([of[kind].max(initial=0) for of in best])
        every = np.concatenate([of[kind] for of in best])
        return float(highest.mean()), tuple(
            _hit_rate(limit, highest, every, float(chance), confidence)
            for limit, chance in zip(limits, by_chance[kind], strict=True)
        )

    (mean_iou, iou), (mean_iobb, iobb) = rates(0), rates(1)
    return BoxScores(len(found), mean_iou, mean_iobb, iou, iobb)


def _hit_rate(limit: float, highest: np.ndarray, every: np.ndarray, chance: float, confidence: float) -> HitRate:
    hits, images = int((highest > limit).sum()), len(highest)
    low, high = wilson(hits, images, confidence)
    return HitRate(limit, hits, hits / images, low, high, chance, float((every <= limit).sum() / images))


def _by_chance(found: Boxes, true: Boxes, limits: Sequence[float]) -> Float[np.ndarray, "2 T"]:
    """How likely boxes of these sizes hit by IoU and by IoBB, at each limit, where every place is equally likely."""
    share = (np.arange(_PLACES) + 0.5) / _PLACES
    places = np.stack(np.meshgrid(share, share), -1).reshape(-1, 1, 2)
    missed = np.ones((2, len(limits)))
    for size in found[:, 2:]:
        moved = np.concatenate([places * (1 - size), np.broadcast_to(size, places.shape)], -1)
        hits = np.stack([of.max(-1)[None] > np.asarray(limits)[:, None] for of in overlaps(moved, true[None])])
        missed *= 1 - hits.mean(-1)
    return 1 - missed
