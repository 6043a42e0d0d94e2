"""Boxes detected in saliency maps, scored against true boxes: hit rates by IoU and by IoBB.

Wang et al., "ChestX-ray8: hospital-scale chest X-ray database and benchmarks" (2017): a map is thresholded, each region
gets a box, and a localisation is correct if IoU > T, the intersection over the union of both boxes, or if IoBB > T, the
intersection over the detected *box* (not over the region in it, which others call IoR).
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
"""Left, top, width and height, as fractions of the image width and height."""
Regions = Literal["peak", "all"]
REGIONS: tuple[Regions, ...] = get_args(Regions)
LIMITS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # values of T
_SIDE = 256  # px of the grid on which regions are detected; finer maps keep their own
_PLACEMENTS = 32  # along each side, of a randomly placed box


@dataclass(frozen=True)
class HitRate:
    """Images that are hit at one limit T.

    Attributes:
      limit: T, which the overlap must exceed.
      hits: images whose best pair of a detected and a true box exceeds it.
      rate: hits / images.
      low, high: the rate's 95 % Wilson interval.
      chance: expected rate if each detected box were placed uniformly at random in the image.
      false_boxes: detected boxes per image that exceed the limit with no true box.
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
    """Agreement of detected with true boxes.

    Attributes:
      images: number of images.
      mean_iou, mean_iobb: means over images of the best pair's IoU and IoBB.
      iou, iobb: hit rates by IoU and by IoBB, one for each of `LIMITS`.
    """

    images: int
    mean_iou: float
    mean_iobb: float
    iou: tuple[HitRate, ...]
    iobb: tuple[HitRate, ...]


def detected(heat: Float[np.ndarray, "h w"], *, threshold: float = 0.5, regions: Regions = "peak") -> Boxes:
    """Return boxes around the regions (8-connected) where a map reaches `threshold` of its maximum.

    Args:
      heat: not negative; coarser maps are resized to 256 px. A map of zeros has no boxes.
      threshold: above 0 and at most 1. Wang et al. used 60/255 and 180/255.
      regions: `peak`: the region of the maximum. `all`: every region, the largest first, as Wang et al.

    Raises:
      CxrError: an option is out of range.
    """
    if not 0 < threshold <= 1:
        raise CxrError(f"threshold must be above 0 and at most 1, not {threshold}")
    if regions not in REGIONS:
        raise CxrError(f"regions must not be {regions!r}; choose one of {', '.join(REGIONS)}")
    if not heat.any():
        return np.zeros((0, 4))
    large = resize(heat, *(max(_SIDE, side) for side in heat.shape))
    marked = large >= threshold * large.max()
    if regions == "peak":
        labels = _regions(marked)
        marked = labels == labels.ravel()[large.argmax()]
    return boxes_of(marked)


def boxes_of(mask: Bool[np.ndarray, "H W"]) -> Boxes:
    """Return the bounding boxes of a mask's regions (8-connected), the largest region first."""
    labels = _regions(mask)
    order = np.argsort(-np.bincount(labels.ravel())[1:], kind="stable")
    slices = ndimage.find_objects(labels)
    edges = [(x.start, y.start, x.stop, y.stop) for y, x in (slices[k] for k in order)]
    left, top, right, bottom = np.array(edges, np.float64).reshape(-1, 4).T
    height, width = mask.shape
    return np.stack([left / width, top / height, (right - left) / width, (bottom - top) / height], -1)


def _regions(mask: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """Return the number of each pixel's region, from 1; 0 outside."""
    return ndimage.label(mask, np.ones((3, 3)))[0]  # pyright: ignore


def overlaps(
    detected: Float[np.ndarray, "*detected 4"], true: Float[np.ndarray, "*true 4"]
) -> tuple[Float[np.ndarray, "*pairs"], Float[np.ndarray, "*pairs"]]:
    """Return IoU and IoBB of detected and true boxes, whose leading axes broadcast; 0 for empty boxes."""
    first, last = np.maximum(detected[..., :2], true[..., :2]), np.minimum(_ends(detected), _ends(true))
    inside = np.maximum(last - first, 0).prod(-1)
    detected_area, true_area = detected[..., 2:].prod(-1), true[..., 2:].prod(-1)
    return _ratio(inside, detected_area + true_area - inside), _ratio(inside, detected_area)


def _ends(boxes: Float[np.ndarray, "*boxes 4"]) -> Float[np.ndarray, "*boxes 2"]:
    return boxes[..., :2] + boxes[..., 2:]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def box_scores(predicted: Sequence[Boxes], true: Sequence[Boxes]) -> BoxScores:
    """Score the detected boxes of images that show a finding.

    An image with several detected or several true boxes counts with its best pair, so one hit suffices. An image
    without any detected box is a miss; each must have a true one.

    Raises:
      CxrError: there are no images, the numbers of images differ, or an image has no true box.
    """
    if len(predicted) == 0 or len(predicted) != len(true):
        raise CxrError(f"boxes need at least one image, and true boxes for each: {len(true)} for {len(predicted)}")
    without = [i for i, boxes in enumerate(true) if not len(boxes)]
    if without:
        raise CxrError(f"image {without[0]} has no true box: score only images that show the finding")
    pairs = list(zip(predicted, true, strict=True))
    best = [[overlap.max(-1) for overlap in overlaps(p[:, None], t[None])] for p, t in pairs]
    by_chance = np.mean([_by_chance(p, t) for p, t in pairs], axis=0)

    def rates(kind: int) -> tuple[float, tuple[HitRate, ...]]:
        highest = np.array([overlap[kind].max(initial=0) for overlap in best])
        every = np.concatenate([overlap[kind] for overlap in best])
        return float(highest.mean()), tuple(
            _hit_rate(limit, highest, every, float(chance))
            for limit, chance in zip(LIMITS, by_chance[kind], strict=True)
        )

    (mean_iou, iou), (mean_iobb, iobb) = rates(0), rates(1)
    return BoxScores(len(predicted), mean_iou, mean_iobb, iou, iobb)


def _hit_rate(limit: float, highest: np.ndarray, every: np.ndarray, chance: float) -> HitRate:
    hits, images = int((highest > limit).sum()), len(highest)
    low, high = wilson(hits, images)
    return HitRate(limit, hits, hits / images, low, high, chance, float((every <= limit).sum() / images))


def _by_chance(predicted: Boxes, true: Boxes) -> Float[np.ndarray, "2 T"]:
    """Return the probability of a hit by IoU and by IoBB at each limit, for randomly placed boxes of these sizes."""
    fraction = (np.arange(_PLACEMENTS) + 0.5) / _PLACEMENTS
    places = np.stack(np.meshgrid(fraction, fraction), -1).reshape(-1, 1, 2)
    missed = np.ones((2, len(LIMITS)))
    for size in predicted[:, 2:]:
        moved = np.concatenate([places * (1 - size), np.broadcast_to(size, places.shape)], -1)
        hits = np.stack(
            [overlap.max(-1)[None] > np.asarray(LIMITS)[:, None] for overlap in overlaps(moved, true[None])]
        )
        missed *= 1 - hits.mean(-1)
    return 1 - missed
