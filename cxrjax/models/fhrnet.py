"""FHRNet: one HRNet on the whole image, one on the region where the first one's maps are strongest, and their fusion.

Huang et al. 2020, "Fusion high-resolution network for diagnosing ChestX-ray images", Electronics 9(1). The region is
found as in AG-CNN (Guan et al. 2018, arXiv:1801.09927), inside jit, with static shapes.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs, Logits
from cxrjax.models.hrnet import ARCHITECTURES as HRNETS
from cxrjax.models.hrnet import HRNet
from cxrjax.models.input_spec import GREY, IMAGENET
from cxrjax.models.layers import LayerFactory, Maps, param_dtype
from cxrjax.models.spatial import weighted_row_sums

STAGES = ("global", "local", "fusion", "joint")


class FHRNet(Backbone):
    """Two HRNets and the fusion of their feature vectors.

    The global branch sees the whole image, resized and cropped at the centre. The local branch sees a region of the
    *full-resolution* image: the bounding box of the largest component where the global branch's heat map exceeds
    `threshold`. The paper does not say how it finds the region; this is AG-CNN's way.

    The heads depend on the training stage: "global", "local" (the global branch works as at inference), "fusion" (both
    branches do), or "joint" (all three heads; the prediction is the fusion's). `train.freeze` says what does not learn.

    Args (the common ones: see `Backbone`):
      backbone: name of an HRNet.
      neck: of both HRNets: "half" (the paper's, 1024 values) or "public" (2048, so that public weights load whole).
      stage: "global", "local", "fusion" or "joint".
      resize: side to which the whole image is resized for the global branch, px; 0 does not resize.
      crop: side of the centre crop after that, px; 0 does not crop.
      region: "crop" crops the region from the image; "mask" sets everything else to 0 (equation 4).
      region_size: side of the local branch's input for "crop", px.
      threshold: of the heat map, between 0 and 1.
      fusion: "concatenate" the vectors, or "weighted": a sum with two learned weights (equation 5).
      heads: "separate", or "shared": one matrix for all three (equations 6 to 9), which needs the weighted fusion.
      dropout: fraction of the fused vector dropped (the paper's random mask).
      prediction: where all heads exist: "fusion", or "geometric-mean" of the global and the local branch's
        probabilities (sigmoid), which the paper wants to be consistent.
    """

    replaceable: ClassVar = ("classifier", "fusion_weights")

    def __init__(
        self,
        common: CommonArgs,
        *,
        backbone: str = "hrnet_w32",
        neck: str = "half",
        stage: str = "joint",
        resize: int = 256,
        crop: int = 224,
        region: str = "crop",
        region_size: int = 224,
        threshold: float = 0.7,
        fusion: str = "concatenate",
        heads: str = "separate",
        dropout: float = 0.5,
        prediction: str = "fusion",
    ):
        super().__init__(common)
        self.backbone = backbone
        self.stage = check_choice("stage", stage, STAGES)
        self.resize, self.crop = resize and check_positive("resize", resize), crop and check_positive("crop", crop)
        self.region = check_choice("region", region, ("crop", "mask"))
        self.region_size = check_positive("region_size", region_size)
        self.fusion = check_choice("fusion", fusion, ("concatenate", "weighted"))
        self.shared_head = check_choice("heads", heads, ("separate", "shared")) == "shared"
        if not 0 < threshold < 1:
            raise CxrError(f"threshold must be between 0 and 1, not {threshold!r}")
        if resize and crop > resize:
            raise CxrError(f"crop = {crop} px cannot be cut out of an image resized to {resize} px")
        if self.shared_head and fusion != "weighted":
            raise CxrError("heads='shared' is one matrix for vectors of one length: it needs fusion='weighted'")
        self.threshold = float(threshold)
        self.prediction = check_choice("prediction", prediction, ("fusion", "geometric-mean"))
        options = {**HRNETS[check_choice("backbone", backbone, HRNETS)].options, "neck": neck, "pooling": "average"}
        self.global_branch = HRNet(common, **options)
        self.local_branch = HRNet(replace(common, seed=common.seed + 1), **options)
        factory = LayerFactory(common.dtype, common.seed + 2)
        channels = self.global_branch.classifier.output.in_features
        self.fusion_weights = nnx.data(None)
        if self.fusion == "weighted":
            self.fusion_weights = nnx.Param(jnp.full(2, 0.5, param_dtype(self.dtype)))
        else:
            channels *= 2
        self.classifier = Classifier(factory, channels, self.classes, dropout=dropout)

    @property
    def members(self) -> Mapping[str, str]:
        """Both branches, which take the weights of an HRNet."""
        return {"global_branch": self.backbone, "local_branch": self.backbone}

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the global branch's maps under its own names, and the local branch's last ones.

        "final" are the global branch's last maps and "local" the local branch's; in stage "local" they are called
        "global" and "final".

        Raises:
          CxrError: as in `HRNet`, for the sizes that the branches see.
        """
        self.check_images(images)
        whole = self._global_input(images)
        named = self.global_branch.remat_features(whole, train and self.stage in ("global", "joint"))
        if self.stage == "global":
            return named
        global_maps = named.pop("final")
        region = self._local_input(images, whole, global_maps)
        local_maps = self.local_branch.remat_features(region, train and self.stage in ("local", "joint"))["final"]
        if self.stage == "local":
            return OrderedDict(named, **{"global": global_maps}, final=local_maps)
        return OrderedDict(named, local=local_maps, final=global_maps)

    def head(self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None) -> Logits:
        """Return the prediction of the stage: the branch's in stages "global" and "local", otherwise the fusion's."""
        return list(self.heads(features, train=train, key=key).values())[-1]

    def heads(
        self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> OrderedDict[str, Logits]:
        """Return the logits "global", "local" and "fusion"; in training only those that the stage trains.

        If the geometric mean is the prediction it follows as "consistency", which is not trained.
        """
        if self.stage in ("global", "local"):
            branch = self.global_branch if self.stage == "global" else self.local_branch
            return OrderedDict({self.stage: self._branch_logits(branch, features["final"], train, key)})
        fusion = self._fusion_logits(features["final"], features["local"], train, key)
        if train and self.stage == "fusion":
            return OrderedDict(fusion=fusion)
        global_logits = self._branch_logits(self.global_branch, features["final"], train, key)
        local_logits = self._branch_logits(self.local_branch, features["local"], train, key)
        outputs = OrderedDict({"global": global_logits, "local": local_logits, "fusion": fusion})
        if not train and self.prediction == "geometric-mean":
            outputs["consistency"] = geometric_mean(global_logits, local_logits)
        return outputs

    def _branch_logits(self, branch: HRNet, maps: Maps, train: bool, key: PRNGKeyArray | None) -> Logits:
        return (self.global_branch if self.shared_head else branch).classifier(maps, train=train, key=key)

    def _fusion_logits(self, global_maps: Maps, local_maps: Maps, train: bool, key: PRNGKeyArray | None) -> Logits:
        both = (global_maps, local_maps)
        vectors = [maps.astype(param_dtype(maps.dtype)).mean((1, 2), keepdims=True) for maps in both]
        if self.fusion_weights is None:
            return self.classifier(jnp.concatenate(vectors, axis=-1), train=train, key=key)
        weights = self.fusion_weights[...]
        total = weights[0] * vectors[0] + weights[1] * vectors[1]
        return (self.global_branch if self.shared_head else self).classifier(total, train=train, key=key)

    def _global_input(self, images: Maps) -> Maps:
        """Return the global branch's input: the whole image, resized and cropped at the centre."""
        if self.resize:
            images = crop_and_resize(images, jnp.array([[0.0, 0.0, 1.0, 1.0]]), self.resize)
        if not self.crop:
            return images
        height, width = images.shape[1:3]
        if min(height, width) < self.crop:
            raise CxrError(f"crop = {self.crop} px cannot be cut out of images of {height} x {width} px")
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return images[:, top : top + self.crop, left : left + self.crop]

    def _local_input(self, images: Maps, whole: Maps, global_maps: Maps) -> Maps:
        """Return the local branch's input; no gradient flows through the choice of the region."""
        mask = largest_component(heat_map(jax.lax.stop_gradient(global_maps)) > self.threshold)
        if self.region == "mask":
            upsampled = jax.image.resize(mask.astype(whole.dtype), whole.shape[:3], "nearest")
            return whole * upsampled[..., None]
        boxes = bounding_box(mask)
        if self.crop:  # the boxes are fractions of the centre crop: turn them into fractions of the image
            sides = (self.resize, self.resize) if self.resize else images.shape[1:3]
            fraction = jnp.array([self.crop / side for side in sides] * 2, boxes.dtype)[None]
            boxes = boxes * fraction + (1 - fraction) / 2
        return crop_and_resize(images, boxes, self.region_size)


def geometric_mean(first: Logits, second: Logits) -> Logits:
    """Return the logits of the geometric mean of two probabilities; they rank as log p_first + log p_second."""
    log_p = jnp.minimum((jax.nn.log_sigmoid(first) + jax.nn.log_sigmoid(second)) / 2, -1e-30)
    return log_p - jnp.log(-jnp.expm1(log_p))


def heat_map(maps: Maps) -> Float[Array, "B h w"]:
    """Return the maximum absolute value over channels, scaled to 0..1 per image; 0 where it is constant."""
    strength = jnp.abs(maps).max(-1)
    low = strength.min((1, 2), keepdims=True)
    span = strength.max((1, 2), keepdims=True) - low
    return jnp.where(span > 0, (strength - low) / jnp.where(span > 0, span, 1), 0)


def largest_component(mask: Bool[Array, "B h w"]) -> Bool[Array, "B h w"]:
    """Return the largest 8-connected component; of equally large ones the first in row-major order.

    Each cell repeatedly takes the lowest label around it, then that label's own label, until nothing changes: about as
    many rounds as the logarithm of the longest path.
    """
    B, h, w = mask.shape
    background = h * w
    indices = jnp.arange(background, dtype=jnp.int32).reshape(1, h, w)

    def propagate(labels: Array) -> Array:
        padded = jnp.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=background)
        neighbours = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        lowest = jnp.where(mask, jnp.stack(neighbours).min(0), background)
        flat = jnp.pad(lowest.reshape(B, -1), ((0, 0), (0, 1)), constant_values=background)
        return jnp.take_along_axis(flat, flat, axis=1)[:, :-1].reshape(B, h, w)

    start = jnp.where(mask, indices, background)
    labels, _ = jax.lax.while_loop(
        lambda pair: jnp.any(pair[0] != pair[1]), lambda pair: (propagate(pair[0]), pair[0]), (propagate(start), start)
    )
    rows = jnp.arange(B)[:, None]
    areas = jnp.zeros((B, background + 1), jnp.int32).at[rows, labels.reshape(B, -1)].add(1)[:, :-1]
    return mask & (labels == areas.argmax(1).astype(labels.dtype)[:, None, None])


def bounding_box(mask: Bool[Array, "B h w"]) -> Float[Array, "B 4"]:
    """Return top, left, bottom, right of the true cells as fractions of height and width; the whole if none is true."""
    edges = []
    for axis in (1, 2):
        cells = mask.any(3 - axis)
        count = cells.shape[1]
        first = jnp.argmax(cells, axis=1)
        last = count - jnp.argmax(cells[:, ::-1], axis=1)
        is_any = cells.any(1)
        edges.append((jnp.where(is_any, first, 0) / count, jnp.where(is_any, last, count) / count))
    (top, bottom), (left, right) = edges
    return jnp.stack([top, left, bottom, right], axis=1).astype(jnp.float32)


def crop_and_resize(images: Maps, boxes: Float[Array, "#B 4"], size: int) -> Maps:
    """Resize the part of each image inside its box to `size` x `size` px; where it shrinks, pixels are averaged.

    A box is top, left, bottom, right as fractions, bottom > top and right > left; one per image, or one for all.
    """
    wide = images.astype(param_dtype(images.dtype))
    top, left, bottom, right = jnp.broadcast_to(boxes, (len(images), 4)).astype(wide.dtype).T
    columns = _resize_weights(images.shape[2], size, left, right)
    narrow = jnp.einsum("bhwc,bsw->bhsc", wide, columns, precision="highest")
    return weighted_row_sums(narrow, _resize_weights(images.shape[1], size, top, bottom)).astype(images.dtype)


def _resize_weights(
    pixels: int, size: int, low: Float[Array, " B"], high: Float[Array, " B"]
) -> Float[Array, "B S pixels"]:
    """Return the weight of each pixel of a side in each of `size` points between two fractions of the side.

    The weights are triangles with a half-width of the points' distance, or one pixel if that is more, as in
    `jax.image.scale_and_translate`.
    """
    step = ((high - low) * pixels / size)[:, None, None]
    points = (low * pixels)[:, None, None] + (jnp.arange(size, dtype=low.dtype)[:, None] + 0.5)[None] * step - 0.5
    distance = jnp.abs(jnp.arange(pixels, dtype=low.dtype)[None, None] - points)
    weights = jnp.maximum(1 - distance / jnp.maximum(step, 1), 0)
    return weights / weights.sum(-1, keepdims=True)


_SMALL = {"backbone": "hrnet_small", "neck": "eighth", "dropout": 0.2, "resize": 0, "crop": 0, "region_size": 32}

ARCHITECTURES = {
    "fhrnet": Architecture(FHRNet, IMAGENET, {}, "Huang et al. 2020, on timm's hrnet_w32"),
    "fhrnet_small": Architecture(FHRNet, GREY, _SMALL, "ours, for CPUs"),
}
