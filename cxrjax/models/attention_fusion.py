"""The attention-fusion network: maps of a DenseNet121 and of an EfficientNetB3, side by side, then attention.

The paper's parameter count, 10,638,528 with batch statistics, fits exactly one reading: the DenseNet ends before its
last norm, the EfficientNet at the first expansion of its sixth stage, and one gated self-attention of 512 channels
follows.
"""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_options, check_choice, check_positive
from cxrjax.models.backbone import Architecture, Backbone
from cxrjax.models.densenet import DenseNet
from cxrjax.models.efficientnet import B0, EfficientNet
from cxrjax.models.heads import Classifier
from cxrjax.models.input_spec import GREY, IMAGENET, InputSpec
from cxrjax.models.layers import LayerFactory, Maps, param_dtype
from cxrjax.models.spatial import doubled, ring_shift, shared

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
        self.match = check_choice("match", match, ("up", "down"))
        self.crossed = check_choice("attention", attention, ("self", "cross")) == "cross"
        common: dict[str, Any] = {"classes": 1, "inputs": inputs, "dtype": dtype, "remat": remat}
        for what, changes, family in (("dense", dense, DenseNet), ("efficient", efficient, EfficientNet)):
            if not isinstance(changes, Mapping):
                raise CxrError(f"{what} must hold options of that trunk, such as {what}.dropout, not {changes!r}")
            check_options(what, changes, family)
        self.dense = DenseNet(**common, seed=seed, **dense)
        self.efficient = EfficientNet(**common, seed=seed + 1, **efficient)
        make = LayerFactory(dtype, seed + 2)
        both = 2 * check_positive("channels", channels)
        self.dense_reduction = make.conv(self.dense.channels, channels, 1, bias=True)
        self.efficient_reduction = make.conv(self.efficient.channels, channels, 1, bias=True)
        directions, width = (2, channels) if self.crossed else (1, both)
        self.attention = nnx.List([Attention(make, width) for _ in range(directions)])
        self.gate = nnx.Param(jax.device_put(np.zeros(directions, param_dtype(dtype))))
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
        return doubled(maps.astype(param_dtype(maps.dtype))).astype(maps.dtype)
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


WEIGHTS = 1 << 22
"""Weights at once: 16 MiB an image, of 1024 queries at 1024 px, where there are 4096 positions, of 256 at 2048 px."""


class Attention(nnx.Module):
    """Scaled dot-product attention with one head: each position of one map asks all positions of another.

    softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, arXiv:1706.03762), with q, k and v linear in the maps, bias
    included. Queries pass in blocks, and the backward pass computes their weights again, so that memory is linear in
    the number of positions. Devices that share the rows of an image share queries, keys and values.

    Args:
      make: maker of the network's layers.
      channels: C, of both maps and of the result.
    """

    def __init__(self, make: LayerFactory, channels: int):
        self.query = make.linear(channels, channels)
        self.key = make.linear(channels, channels)
        self.value = make.linear(channels, channels)

    def __call__(self, asking: Maps, asked: Maps) -> Maps:
        """The values of `asked`, weighted for each position of `asking`; the shape and type of `asking`.

        It computes in float32 at least.
        """
        tokens, others = (maps.astype(param_dtype(maps.dtype)) for maps in (asking, asked))
        return _rows(self.query(tokens), self.key(others), self.value(others)).astype(asking.dtype)


@shared
def _rows(query: Maps, key: Maps, value: Maps, *, shares: int) -> Maps:
    B, h, w, C = query.shape
    query, key, value = (maps.reshape(B, -1, C) for maps in (query, key, value))
    return attend(query, key, value, shares=shares).reshape(B, h, w, C)


def attend(
    query: Float[Array, "B N C"],
    key: Float[Array, "B M C"],
    value: Float[Array, "B M D"],
    block: int = 0,
    shares: int = 1,
) -> Float[Array, "B N D"]:
    """softmax(query key^T / sqrt(C)) value, `block` queries at a time; by default as many as make `WEIGHTS`.

    With `shares` of the keys and values on so many devices, these go around among them, and none ever has all (Liu,
    Zaharia and Abbeel 2023, arXiv:2310.01889).
    """
    N, C = query.shape[1:]
    block = min(block or max(WEIGHTS // key.shape[1], 1), N)
    padded = jnp.pad(query / np.sqrt(C).astype(query.dtype), ((0, 0), (0, -N % block), (0, 0)))
    result: Array = _attend(padded, key, value, block, shares)
    return result[:, :N]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    query: Float[Array, "B N C"], key: Float[Array, "B M C"], value: Float[Array, "B M D"], block: int, shares: int
) -> Float[Array, "B N D"]:
    """softmax(query key^T) value for queries that make whole blocks."""
    return _forward(query, key, value, block, shares)[0]


# Loops of JAX's own would start from zeros that XLA makes long before, at the peak of memory: ours are made of what the
# loops take.


def _forward(query: Array, key: Array, value: Array, block: int, shares: int) -> tuple[Array, tuple[Array, ...]]:
    """The result, and what the backward pass needs: that, its inputs, and the logarithms of the softmax's sums."""
    kept, none = (query, key, value), 0 * query[..., :1]
    seen = (none - jnp.inf, none, jnp.broadcast_to(none, (*query.shape[:2], value.shape[-1])))
    for share in range(1, shares + 1):
        following = ring_shift((key, value), shares) if share < shares else (key, value)
        seen = _with_share(seen, query, key, value, block)
        (key, value), seen = jax.lax.optimization_barrier((following, seen))  # else all shares' weights at once
    top, total, result = seen
    return result / total, (*kept, result / total, top + jnp.log(total))


def _with_share(seen: tuple[Array, ...], query: Array, key: Array, value: Array, block: int) -> tuple[Array, ...]:
    """The scores' maximum, the sum of their exponentials about it and of those times the values, with further keys.

    (Milakov and Gimelshein 2018, arXiv:1805.02867.)
    """

    def one(number: Array, seen: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, result = (_block(each, number, block) for each in seen)
        scores = jnp.einsum("bnc,bmc->bnm", _block(query, number, block), key)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, before = jnp.exp(scores - higher), jnp.exp(top - higher)
        total = before * total + weights.sum(-1, keepdims=True)
        result = before * result + jnp.einsum("bnm,bmd->bnd", weights, value)
        return tuple(map(partial(_with_block, number=number, block=block), seen, (higher, total, result)))

    return jax.lax.fori_loop(0, query.shape[1] // block, one, seen)


def _backward(block: int, shares: int, kept: tuple[Array, ...], change: Float[Array, "B N D"]) -> tuple[Array, ...]:
    """Gradients by query, key and value; weights are computed again, and keys' gradients go around with the keys."""
    query, key, value, result, total = kept
    asking = query, total, change, (change * result).sum(-1, keepdims=True)
    of_query, of_key, of_value = 0 * query, 0 * key, 0 * value
    for share in range(1, shares + 1):
        following = ring_shift((key, value), shares) if share < shares else (key, value)
        of_query, *others = _gradients((of_query, of_key, of_value), asking, key, value, block)
        (key, value), of_query, (of_key, of_value) = jax.lax.optimization_barrier(
            (following, of_query, ring_shift(others, shares))
        )
    return of_query, of_key, of_value


def _gradients(
    found: tuple[Array, ...], asking: tuple[Array, ...], key: Array, value: Array, block: int
) -> tuple[Array, ...]:
    """Those found so far, with what a share of the keys adds to them."""

    def one(number: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        of_query, of_key, of_value = found
        query, total, change, along = (_block(each, number, block) for each in asking)
        weights = jnp.exp(jnp.einsum("bnc,bmc->bnm", query, key) - total)
        of_scores = weights * (jnp.einsum("bnd,bmd->bnm", change, value) - along)
        of_block = _block(of_query, number, block) + jnp.einsum("bnm,bmc->bnc", of_scores, key)
        return (
            _with_block(of_query, of_block, number, block),
            of_key + jnp.einsum("bnm,bnc->bmc", of_scores, query),
            of_value + jnp.einsum("bnm,bnd->bmd", weights, change),
        )

    return jax.lax.fori_loop(0, asking[0].shape[1] // block, one, found)


_attend.defvjp(_forward, _backward)


def _block(rows: Float[Array, "B N C"], number: Array, block: int) -> Float[Array, "B n C"]:
    return jax.lax.dynamic_slice_in_dim(rows, number * block, block, axis=1)


def _with_block(
    rows: Float[Array, "B N C"], part: Float[Array, "B n C"], number: Array, block: int
) -> Float[Array, "B N C"]:
    return jax.lax.dynamic_update_slice_in_dim(rows, part, number * block, axis=1)
