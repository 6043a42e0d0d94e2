"""The attention-fusion network: maps of a DenseNet121 and of an EfficientNetB3, side by side, then attention.

The paper's parameter count, 10,638,528 with batch statistics, fits exactly one reading: the DenseNet ends before its
last norm, the EfficientNet at the first expansion of its sixth stage, and one gated self-attention of 512 channels
follows.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from cxrjax.errors import CxrError
from cxrjax.models.attention import Attention
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.densenet import DenseNet
from cxrjax.models.efficientnet import B0, EfficientNet
from cxrjax.models.heads import Classifier
from cxrjax.models.inputs import GREY, IMAGENET, InputSpec
from cxrjax.models.layers import Maker, Maps, storage
from cxrjax.models.options import check_options, one_of, positive
from cxrjax.models.rows import doubled

_DENSE = {"last_norm": False}
# EfficientNetB3 up to stage 5, and the first expansion of stage 6 in place of its last convolution. Of its 26 blocks 18
# are left, and keep their share of stochastic depth.
_EFFICIENT = {"width": 1.2, "depth": 1.4, "blocks": B0[:5], "last": 6, "stochastic_depth": 0.2 * 18 / 26}


class AttentionFusion(Backbone):
    """Two trunks, each brought to `channels` maps by a 1x1 convolution, concatenated, attention, a mean and logits.

    With "self" attention the result is `gamma * attention(maps, maps) + maps`, gamma one learned scalar that starts
    at 0. With "cross" attention each trunk's maps ask the other's, both directions with a gate of their own.

    Args:
      classes: number of findings.
      inputs: what the network expects of its images.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      seed: of the initial values.
      attention: "self" (the paper's count) or "cross" (what its name says).
      match: "up" enlarges the coarser maps to the finer ones' size (bilinear), "down" averages the finer ones.
      channels: of each trunk after its 1x1 convolution.
      pooling: of the head: "average", "max", "average+max" or "log-sum-exp".
      hidden: units of a hidden layer in the head; 0 for none.
      dropout: in the head.
      dense: options of the DenseNet.
      efficient: options of the EfficientNet.
    """

    replaceable: ClassVar = ("classifier", "dense_reduction", "efficient_reduction", "attention", "gate")

    def __init__(
        self,
        *,
        classes: int,
        inputs: InputSpec,
        dtype: np.dtype,
        remat: str,
        seed: int,
        attention: str = "self",
        match: str = "up",
        channels: int = 256,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.5,
        dense: Mapping[str, Any] = _DENSE,
        efficient: Mapping[str, Any] = _EFFICIENT,
    ):
        super().__init__(classes=classes, inputs=inputs, dtype=dtype, remat=remat)
        self.match = one_of("match", match, ("up", "down"))
        self.crossed = one_of("attention", attention, ("self", "cross")) == "cross"
        common: dict[str, Any] = {"classes": 1, "inputs": inputs, "dtype": dtype, "remat": remat}
        for what, changes, family in (("dense", dense, DenseNet), ("efficient", efficient, EfficientNet)):
            if not isinstance(changes, Mapping):
                raise CxrError(f"{what} must hold options of that trunk, such as {what}.dropout, not {changes!r}")
            check_options(what, changes, family)
        self.dense = DenseNet(**common, seed=seed, **dense)
        self.efficient = EfficientNet(**common, seed=seed + 1, **efficient)
        make = Maker(dtype, seed + 2)
        both = 2 * positive("channels", channels)
        self.dense_reduction = make.conv(self.dense.channels, channels, 1, bias=True)
        self.efficient_reduction = make.conv(self.efficient.channels, channels, 1, bias=True)
        directions, width = (2, channels) if self.crossed else (1, both)
        self.attention = nnx.List([Attention(make, width) for _ in range(directions)])
        self.gate = nnx.Param(jax.device_put(np.zeros(directions, storage(dtype))))
        self.classifier = Classifier(make, both, classes, pooling=pooling, hidden=hidden, dropout=dropout)
        for trunk in (self.dense, self.efficient):
            del trunk.classifier

    @property
    def members(self) -> Mapping[str, str]:
        """Both trunks take the weights of the networks that they are cut from."""
        return {"dense": "densenet121", "efficient": "efficientnet_b3"}

    def adapt(self, member: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays before the cut; of the EfficientNet's sixth stage the first expansion."""
        if member == "dense":
            return {name: array for name, array in arrays.items() if not name.startswith(("norm5.", "classifier."))}
        before = {name: array for name, array in arrays.items() if name.startswith(tuple("012345"), len("stages."))}
        cut = "stages.6.0.block.0."
        return before | {name.replace(cut, "stages.6."): arrays[name] for name in arrays if name.startswith(cut)}

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """The trunks' last maps, "dense" and "efficient"; both side by side, "fused"; after attention, "final"."""
        self.check(images)
        named = OrderedDict(
            dense=self.dense.trunk(images, train)["final"],
            efficient=self.efficient.trunk(images, train, key)["final"],
        )
        parts = self._matched(self.dense_reduction(named["dense"]), self.efficient_reduction(named["efficient"]))
        named["fused"] = jnp.concatenate(parts, axis=-1)
        if self.crossed:
            asked = [attention(*pair) for attention, pair in zip(self.attention, (parts, parts[::-1]), strict=True)]
            gated = [self.gate[number].astype(maps.dtype) * maps for number, maps in enumerate(asked)]
            change = jnp.concatenate(gated, axis=-1)
        else:
            change = self.gate[0].astype(self.dtype) * self.attention[0](named["fused"], named["fused"])
        named["final"] = named["fused"] + change
        return named

    def _matched(self, first: Maps, second: Maps) -> list[Maps]:
        """Both maps at the size of the finer or the coarser one."""
        sizes = [maps.shape[1:3] for maps in (first, second)]
        size = max(sizes) if self.match == "up" else min(sizes)
        return [_resized(maps, size) for maps in (first, second)]


def _resized(maps: Maps, size: tuple[int, ...]) -> Maps:
    if maps.shape[1:3] == size:
        return maps
    if tuple(2 * side for side in maps.shape[1:3]) == size:
        return doubled(maps.astype(storage(maps.dtype))).astype(maps.dtype)
    return jax.image.resize(maps, (len(maps), *size, maps.shape[-1]), "bilinear")


_PAPER = {"dense": _DENSE, "efficient": _EFFICIENT}
_SMALL = {
    "channels": 8,
    "dropout": 0.2,
    "dense": {"growth": 4, "blocks": (1, 1, 1), "bottleneck": 2, "stem_channels": 8, "last_norm": False},
    "efficient": {"stem_channels": 8, "blocks": ((1, 3, 1, 8, 1), (4, 3, 2, 16, 1)), "last": 2},
}

ARCHITECTURES = {
    "attention_fusion": Architecture(AttentionFusion, IMAGENET, _PAPER, "the attention-fusion paper, by its counts"),
    "attention_fusion_small": Architecture(AttentionFusion, GREY, _SMALL, "ours, for CPUs"),
}
