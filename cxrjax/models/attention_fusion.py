"""The attention-fusion network: maps of a DenseNet121 and an EfficientNetB3, concatenated, then attention.

The paper's parameter count, 10,638,528 with batch statistics, fits exactly one reading: the DenseNet ends before its
last norm, the EfficientNet at the first expansion of its sixth stage, and one gated self-attention of 512 channels
follows.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cxrjax.errors import CxrError, check_choice, check_options, check_positive
from cxrjax.models.backbone import Architecture, Backbone, Classifier, CommonArgs
from cxrjax.models.densenet import DenseNet
from cxrjax.models.efficientnet import B0_CONFIG, EfficientNet
from cxrjax.models.input_spec import GREY, IMAGENET
from cxrjax.models.layers import LayerFactory, Maps, param_dtype
from cxrjax.models.spatial import map_row_shards, ring_shift, upsample_bilinear_2x

_DENSE = {"last_norm": False}
# EfficientNetB3 up to stage 5, then the first expansion of stage 6 in place of the last convolution. 18 of its 26
# blocks are left, and keep their rates of stochastic depth.
_EFFICIENT = {
    "width_mult": 1.2,
    "depth_mult": 1.4,
    "block_config": B0_CONFIG[:5],
    "last_channels_mult": 6,
    "stochastic_depth": 0.2 * 18 / 26,
}


class AttentionFusion(Backbone):
    """Two trunks, each reduced to `channels` maps by a 1x1 convolution; concatenation, attention, average, logits.

    With "self" attention the result is `gate * attention(maps, maps) + maps`, with one learned scalar gate that starts
    at 0. With "cross" attention each trunk's maps attend to the other's, each direction with its own gate.

    Args (the common ones: see `Backbone`):
      attention: "self" (fits the paper's count) or "cross" (fits its name).
      match: "up" upsamples the coarser maps to the finer ones' size (bilinear), "down" averages the finer ones.
      channels: channels of each trunk after its 1x1 convolution.
      dense: options of the DenseNet.
      efficient: options of the EfficientNet.
    """

    replaceable: ClassVar = ("classifier", "dense_reduction", "efficient_reduction", "attention", "gate")

    def __init__(
        self,
        common: CommonArgs,
        *,
        attention: str = "self",
        match: str = "up",
        channels: int = 256,
        pooling: str = "average",
        hidden: int = 0,
        dropout: float = 0.5,
        dense: Mapping[str, Any] = _DENSE,
        efficient: Mapping[str, Any] = _EFFICIENT,
    ):
        super().__init__(common)
        self.match = check_choice("match", match, ("up", "down"))
        self.is_cross = check_choice("attention", attention, ("self", "cross")) == "cross"
        for name, options, family in (("dense", dense, DenseNet), ("efficient", efficient, EfficientNet)):
            if not isinstance(options, Mapping):
                raise CxrError(f"{name} must hold options of that trunk, such as {name}.dropout, not {options!r}")
            check_options(name, options, family)
        self.dense = DenseNet(replace(common, classes=1), **dense)
        self.efficient = EfficientNet(replace(common, classes=1, seed=common.seed + 1), **efficient)
        factory = LayerFactory(common.dtype, common.seed + 2)
        fused = 2 * check_positive("channels", channels)
        self.dense_reduction = factory.conv(self.dense.channels, channels, 1, bias=True)
        self.efficient_reduction = factory.conv(self.efficient.channels, channels, 1, bias=True)
        directions, width = (2, channels) if self.is_cross else (1, fused)
        self.attention = nnx.List([Attention(factory, width) for _ in range(directions)])
        self.gate = nnx.Param(jax.device_put(np.zeros(directions, param_dtype(self.dtype))))
        self.classifier = Classifier(factory, fused, self.classes, pooling=pooling, hidden=hidden, dropout=dropout)
        for trunk in (self.dense, self.efficient):
            del trunk.classifier

    @property
    def members(self) -> Mapping[str, str]:
        """Both trunks, which take the weights of the networks they are cut from."""
        return {"dense": "densenet121", "efficient": "efficientnet_b3"}

    def member_arrays(self, member: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays before the cut, and of the EfficientNet's sixth stage those of the first expansion."""
        if member == "dense":
            return {name: array for name, array in arrays.items() if not name.startswith(("norm5.", "classifier."))}
        before = {name: array for name, array in arrays.items() if name.startswith(tuple("012345"), len("stages."))}
        expansion = "stages.6.0.block.0."
        return before | {
            name.replace(expansion, "stages.6."): arrays[name] for name in arrays if name.startswith(expansion)
        }

    def features(self, images: Maps, *, train: bool = False, key: PRNGKeyArray | None = None) -> OrderedDict[str, Maps]:
        """Return the trunks' last maps, "dense" and "efficient"; concatenated, "fused"; after attention, "final"."""
        self.check_images(images)
        named = OrderedDict(
            dense=self.dense.remat_features(images, train)["final"],
            efficient=self.efficient.remat_features(images, train, key)["final"],
        )
        pair = self._match_sizes(self.dense_reduction(named["dense"]), self.efficient_reduction(named["efficient"]))
        named["fused"] = jnp.concatenate(pair, axis=-1)
        if self.is_cross:
            attended = [attend(*both) for attend, both in zip(self.attention, (pair, pair[::-1]), strict=True)]
            gated = [self.gate[index].astype(maps.dtype) * maps for index, maps in enumerate(attended)]
            residual = jnp.concatenate(gated, axis=-1)
        else:
            residual = self.gate[0].astype(self.dtype) * self.attention[0](named["fused"], named["fused"])
        named["final"] = named["fused"] + residual
        return named

    def _match_sizes(self, first: Maps, second: Maps) -> list[Maps]:
        """Return both maps at the size of the finer or the coarser one."""
        sizes = [maps.shape[1:3] for maps in (first, second)]
        size = max(sizes) if self.match == "up" else min(sizes)
        return [_resize(maps, size) for maps in (first, second)]


def _resize(maps: Maps, size: tuple[int, ...]) -> Maps:
    if maps.shape[1:3] == size:
        return maps
    if tuple(2 * side for side in maps.shape[1:3]) == size:
        return upsample_bilinear_2x(maps.astype(param_dtype(maps.dtype))).astype(maps.dtype)
    return jax.image.resize(maps, (len(maps), *size, maps.shape[-1]), "bilinear")


class Attention(nnx.Module):
    """Scaled dot-product attention with one head, from each position of one map to all positions of another.

    softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, arXiv:1706.03762), with q, k and v linear in the maps, with bias.
    Queries are processed in blocks and the backward pass recomputes their weights, so memory is linear in the number
    of positions. Devices that share the rows of an image share queries, keys and values. C is `channels`.
    """

    def __init__(self, factory: LayerFactory, channels: int):
        self.query = factory.linear(channels, channels)
        self.key = factory.linear(channels, channels)
        self.value = factory.linear(channels, channels)

    def __call__(self, queries: Maps, keys: Maps) -> Maps:
        """Return the values of `keys`, weighted for each position of `queries`, in the latter's shape and type."""
        wide_queries, wide_keys = (maps.astype(param_dtype(maps.dtype)) for maps in (queries, keys))
        result = _map_attention(self.query(wide_queries), self.key(wide_keys), self.value(wide_keys))
        return result.astype(queries.dtype)


@map_row_shards
def _map_attention(query: Maps, key: Maps, value: Maps, *, num_shards: int) -> Maps:
    B, h, w, C = query.shape
    query, key, value = (maps.reshape(B, -1, C) for maps in (query, key, value))
    return dot_product_attention(query, key, value, num_shards=num_shards).reshape(B, h, w, C)


MAX_WEIGHTS = 1 << 22
"""Attention weights at once per image, 16 MiB: of 1024 queries at 1024 px (4096 positions), of 256 at 2048 px."""


def dot_product_attention(
    query: Float[Array, "B N C"],
    key: Float[Array, "B M C"],
    value: Float[Array, "B M D"],
    block_size: int = 0,
    num_shards: int = 1,
) -> Float[Array, "B N D"]:
    """Return softmax(query key^T / sqrt(C)) value, for `block_size` queries at a time (0: see `MAX_WEIGHTS`).

    Each of `num_shards` devices holds a shard of the keys and values. The shards travel around the ring of devices, and
    no device ever holds all (ring attention, Liu, Zaharia and Abbeel 2023, arXiv:2310.01889).
    """
    N, C = query.shape[1:]
    block_size = min(block_size or max(MAX_WEIGHTS // key.shape[1], 1), N)
    padded = jnp.pad(query / np.sqrt(C).astype(query.dtype), ((0, 0), (0, -N % block_size), (0, 0)))
    result: Array = _blocked_attention(padded, key, value, block_size, num_shards)
    return result[:, :N]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocked_attention(
    query: Float[Array, "B N C"],
    key: Float[Array, "B M C"],
    value: Float[Array, "B M D"],
    block_size: int,
    num_shards: int,
) -> Float[Array, "B N D"]:
    """Return softmax(query key^T) value for a whole number of blocks of queries."""
    return _forward(query, key, value, block_size, num_shards)[0]


# The loops' initial values are derived from their inputs: plain zeros XLA would create long before, at the peak of
# memory.


def _forward(
    query: Array, key: Array, value: Array, block_size: int, num_shards: int
) -> tuple[Array, tuple[Array, ...]]:
    """Return the result, and the residuals: inputs, result, and the logarithms of the softmax denominators."""
    inputs, zeros = (query, key, value), 0 * query[..., :1]
    carry = (zeros - jnp.inf, zeros, jnp.broadcast_to(zeros, (*query.shape[:2], value.shape[-1])))
    for shard in range(1, num_shards + 1):
        following = ring_shift((key, value), num_shards) if shard < num_shards else (key, value)
        carry = _forward_shard(carry, query, key, value, block_size)
        (key, value), carry = jax.lax.optimization_barrier((following, carry))  # else all shards' weights at once
    highest, total, result = carry
    return result / total, (*inputs, result / total, highest + jnp.log(total))


def _forward_shard(
    carry: tuple[Array, ...], query: Array, key: Array, value: Array, block_size: int
) -> tuple[Array, ...]:
    """Add a shard of keys to the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

    The carry is the highest score of each query, the sum of the exponentials of the scores less that, and the sum of
    these exponentials times the values.
    """

    def step(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        highest, total, result = (_get_block(array, index, block_size) for array in carry)
        scores = jnp.einsum("bnc,bmc->bnm", _get_block(query, index, block_size), key)
        new_highest = jnp.maximum(highest, scores.max(-1, keepdims=True))
        weights, rescale = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
        total = rescale * total + weights.sum(-1, keepdims=True)
        result = rescale * result + jnp.einsum("bnm,bmd->bnd", weights, value)
        set_block = partial(_set_block, index=index, block_size=block_size)
        return tuple(map(set_block, carry, (new_highest, total, result)))

    return jax.lax.fori_loop(0, query.shape[1] // block_size, step, carry)


def _backward(
    block_size: int, num_shards: int, residuals: tuple[Array, ...], d_result: Float[Array, "B N D"]
) -> tuple[Array, ...]:
    """Return the gradients; weights are recomputed, and the keys' gradients travel around the ring with the keys."""
    query, key, value, result, log_total = residuals
    per_query = query, log_total, d_result, (d_result * result).sum(-1, keepdims=True)
    d_query, d_key, d_value = 0 * query, 0 * key, 0 * value
    for shard in range(1, num_shards + 1):
        following = ring_shift((key, value), num_shards) if shard < num_shards else (key, value)
        d_query, *d_others = _backward_shard((d_query, d_key, d_value), per_query, key, value, block_size)
        (key, value), d_query, (d_key, d_value) = jax.lax.optimization_barrier(
            (following, d_query, ring_shift(d_others, num_shards))
        )
    return d_query, d_key, d_value


def _backward_shard(
    gradients: tuple[Array, ...], per_query: tuple[Array, ...], key: Array, value: Array, block_size: int
) -> tuple[Array, ...]:
    """Add a shard of keys' contribution to the gradients."""

    def step(index: Array, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        d_query, d_key, d_value = gradients
        query, log_total, d_result, projection = (_get_block(array, index, block_size) for array in per_query)
        weights = jnp.exp(jnp.einsum("bnc,bmc->bnm", query, key) - log_total)
        d_scores = weights * (jnp.einsum("bnd,bmd->bnm", d_result, value) - projection)
        d_block = _get_block(d_query, index, block_size) + jnp.einsum("bnm,bmc->bnc", d_scores, key)
        return (
            _set_block(d_query, d_block, index, block_size),
            d_key + jnp.einsum("bnm,bnc->bmc", d_scores, query),
            d_value + jnp.einsum("bnm,bnd->bmd", weights, d_result),
        )

    return jax.lax.fori_loop(0, per_query[0].shape[1] // block_size, step, gradients)


_blocked_attention.defvjp(_forward, _backward)


def _get_block(rows: Float[Array, "B N C"], index: Array, block_size: int) -> Float[Array, "B n C"]:
    return jax.lax.dynamic_slice_in_dim(rows, index * block_size, block_size, axis=1)


def _set_block(
    rows: Float[Array, "B N C"], block: Float[Array, "B n C"], index: Array, block_size: int
) -> Float[Array, "B N C"]:
    return jax.lax.dynamic_update_slice_in_dim(rows, block, index * block_size, axis=1)


_PAPER = {"dense": _DENSE, "efficient": _EFFICIENT}
_SMALL = {
    "channels": 8,
    "dropout": 0.2,
    "dense": {"growth_rate": 4, "block_config": (1, 1, 1), "bn_size": 2, "stem_channels": 8, "last_norm": False},
    "efficient": {"stem_channels": 8, "block_config": ((1, 3, 1, 8, 1), (4, 3, 2, 16, 1)), "last_channels_mult": 2},
}

ARCHITECTURES = {
    "attention_fusion": Architecture(AttentionFusion, IMAGENET, _PAPER, "the attention-fusion paper, by its counts"),
    "attention_fusion_small": Architecture(AttentionFusion, GREY, _SMALL, "ours, for CPUs"),
}
