"""FHRNet: one HRNet on the whole image, one on the region where the first one looks, and a head on both.

Huang et al., "Fusion high-resolution network for diagnosing ChestX-ray images", Electronics 2020.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.heads import Classifier
from cxrjax.models.hrnet import ARCHITECTURES as HRNETS
from cxrjax.models.hrnet import HRNet
from cxrjax.models.input_spec import GREY, IMAGENET, InputSpec
from cxrjax.models.layers import LayerFactory, Maps, param_dtype
from cxrjax.models.roi import bounding_box, crop, heat_map, largest_component

STAGES = ("global", "local", "fusion", "joint")
Outputs = OrderedDict[str, Float[Array, "B K"]]


class FHRNet(Backbone):
    """Two HRNets and the fusion of their vectors.

    The global branch sees the whole image, resized and cut at the centre. Where its maps are strongest (above
    `threshold`, the largest component) a region is cut from the *full-resolution* image for the local branch. The
    paper leaves out how the mask is inferred: this is AG-CNN's way.

    Which heads there are depends on the stage of training: "global", "local" (the global branch then works as at
    inference), "fusion" (both do), or "joint" (all three heads; the prediction is the fusion's). What does not learn
    in a stage is said by `train.freeze`.

    Args:
      classes: number of findings.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      backbone: an HRNet, by its name.
      neck: of both HRNets: "half" (the paper's, 1024 values) or "public" (2048, so that public weights load whole).
      stage: "global", "local", "fusion" or "joint".
      resize: px to which the whole image is resized for the global branch; 0 leaves it.
      crop: px cut out of the centre after that; 0 leaves all.
      region: "crop" cuts the region from the image; "mask" sets the rest of the prepared whole to 0 (equation 4).
      region_size: side of the local branch's input in px, for "crop".
      threshold: of the heat map, 0 to 1.
      fusion: "concatenate" the vectors, or "weighted": a sum with two learned weights (equation 5).
      heads: "separate", or "shared": one matrix for all three (equations 6 to 9), which needs the weighted fusion.
      dropout: of the fused vector (the paper's random mask).
      prediction: of the network where it has all heads: "fusion", or "geometric-mean" of the global and the local
        branch's probabilities (sigmoid), which is what the paper wants to be consistent.
    """

    replaceable: ClassVar = ("classifier", "fusion_weights")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
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
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        self.backbone = backbone
        self.stage = check_choice("stage", stage, STAGES)
        self.resize, self.crop = resize and check_positive("resize", resize), crop and check_positive("crop", crop)
        self.region = check_choice("region", region, ("crop", "mask"))
        self.region_size = check_positive("region_size", region_size)
        self.fusion = check_choice("fusion", fusion, ("concatenate", "weighted"))
        self.shared = check_choice("heads", heads, ("separate", "shared")) == "shared"
        if not 0 < threshold < 1:
            raise CxrError(f"threshold must be between 0 and 1, not {threshold!r}")
        if resize and crop > resize:
            raise CxrError(f"crop = {crop} px cannot be cut out of an image resized to {resize} px")
        if self.shared and fusion != "weighted":
            raise CxrError("heads='shared' is one matrix for vectors of one length: it needs fusion='weighted'")
        self.threshold = float(threshold)
        self.prediction = check_choice("prediction", prediction, ("fusion", "geometric-mean"))
        settings = {**HRNETS[check_choice("backbone", backbone, HRNETS)].settings, "neck": neck, "pooling": "average"}
        common = {"classes": classes, "inputs": inputs, "dtype": dtype, "remat": remat}
        self.global_branch = HRNet(**common, **settings, seed=seed)
        self.local_branch = HRNet(**common, **settings, seed=seed + 1)
        make = LayerFactory(dtype, seed + 2)
        channels = self.global_branch.classifier.output.in_features
        self.fusion_weights = nnx.data(None)
        if self.fusion == "weighted":
            self.fusion_weights = nnx.Param(jnp.full(2, 0.5, param_dtype(dtype)))
        else:
            channels *= 2
        self.classifier = Classifier(make, channels, classes, dropout=dropout)

    @property
    def members(self) -> Mapping[str, str]:
        """Both branches take the weights of an HRNet."""
        return {"global_branch": self.backbone, "local_branch": self.backbone}

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """The global branch's maps by its own names, and the local branch's last ones.

        "final" holds the global branch's last maps and "local" the local branch's; in stage "local" they are called
        "global" and "final".

        Raises:
          CxrError: as in `HRNet`, for the sizes that the branches see.
        """
        self.check(images)
        whole = self._whole(images)
        named = self.global_branch.trunk(whole, train and self.stage in ("global", "joint"))
        if self.stage == "global":
            return named
        seen = named.pop("final")
        region = self._region(images, whole, seen)
        local = self.local_branch.trunk(region, train and self.stage in ("local", "joint"))["final"]
        if self.stage == "local":
            return OrderedDict(named, **{"global": seen}, final=local)
        return OrderedDict(named, local=local, final=seen)

    def head(
        self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B K"]:
        """The prediction of the stage: the fusion's but in stages "global" and "local"."""
        return list(self.heads(features, train=train, key=key).values())[-1]

    def heads(self, features: Mapping[str, Maps], *, train: bool = False, key: PRNGKeyArray | None = None) -> Outputs:
        """Logits "global", "local" and "fusion"; those that the stage trains only, in training.

        Where the geometric mean is the prediction it follows as "consistency", which nothing trains.
        """
        if self.stage in ("global", "local"):
            branch = self.global_branch if self.stage == "global" else self.local_branch
            return Outputs({self.stage: self._branch_head(branch, features["final"], train, key)})
        fusion = self._fused(features["final"], features["local"], train, key)
        if train and self.stage == "fusion":
            return Outputs(fusion=fusion)
        seen = self._branch_head(self.global_branch, features["final"], train, key)
        local = self._branch_head(self.local_branch, features["local"], train, key)
        outputs = Outputs({"global": seen, "local": local, "fusion": fusion})
        if not train and self.prediction == "geometric-mean":
            outputs["consistency"] = geometric_mean(seen, local)
        return outputs

    def _branch_head(self, branch: HRNet, maps: Maps, train: bool, key: PRNGKeyArray | None) -> Float[Array, "B K"]:
        return (self.global_branch if self.shared else branch).classifier(maps, train=train, key=key)

    def _fused(self, seen: Maps, local: Maps, train: bool, key: PRNGKeyArray | None) -> Float[Array, "B K"]:
        vectors = [maps.astype(param_dtype(maps.dtype)).mean((1, 2), keepdims=True) for maps in (seen, local)]
        if self.fusion_weights is None:
            return self.classifier(jnp.concatenate(vectors, axis=-1), train=train, key=key)
        weights = self.fusion_weights[...]
        total = weights[0] * vectors[0] + weights[1] * vectors[1]
        return (self.global_branch if self.shared else self).classifier(total, train=train, key=key)

    def _whole(self, images: Maps) -> Maps:
        """The whole image as the global branch sees it."""
        if self.resize:
            images = crop(images, jnp.array([[0.0, 0.0, 1.0, 1.0]]), self.resize)
        if not self.crop:
            return images
        height, width = images.shape[1:3]
        if min(height, width) < self.crop:
            raise CxrError(f"crop = {self.crop} px cannot be cut out of images of {height} x {width} px")
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return images[:, top : top + self.crop, left : left + self.crop]

    def _region(self, images: Maps, whole: Maps, seen: Maps) -> Maps:
        """What the local branch sees: no gradient flows back through the choice of the region."""
        mask = largest_component(heat_map(jax.lax.stop_gradient(seen)) > self.threshold)
        if self.region == "mask":
            enlarged = jax.image.resize(mask.astype(whole.dtype), whole.shape[:3], "nearest")
            return whole * enlarged[..., None]
        boxes = bounding_box(mask)
        if self.crop:  # fractions of the cut-out, so far
            sides = (self.resize, self.resize) if self.resize else images.shape[1:3]
            share = jnp.array([self.crop / side for side in sides] * 2, boxes.dtype)[None]
            boxes = boxes * share + (1 - share) / 2
        return crop(images, boxes, self.region_size)


def geometric_mean(first: Float[Array, "B K"], second: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Logits of the geometric mean of two probabilities, given as logits; it ranks as log p_first + log p_second."""
    log_p = jnp.minimum((jax.nn.log_sigmoid(first) + jax.nn.log_sigmoid(second)) / 2, -1e-30)
    return log_p - jnp.log(-jnp.expm1(log_p))


_SMALL = {"backbone": "hrnet_small", "neck": "eighth", "dropout": 0.2, "resize": 0, "crop": 0, "region_size": 32}

ARCHITECTURES = {
    "fhrnet": Architecture(FHRNet, IMAGENET, {}, "Huang et al. 2020, on timm's hrnet_w32"),
    "fhrnet_small": Architecture(FHRNet, GREY, _SMALL, "ours, for CPUs"),
}
