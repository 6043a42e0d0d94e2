"""Attention between the positions of feature maps, in memory that grows linearly with their number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cxrjax.models.layers import Maker, Maps, storage
from cxrjax.models.rows import each_row

WEIGHTS = 1 << 22
"""Weights at once: 16 MiB an image, of 1024 queries at 1024 px, where there are 4096 positions, of 256 at 2048 px."""


class Attention(nnx.Module):
    """Scaled dot-product attention with one head: each position of one map asks all positions of another.

    softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, arXiv:1706.03762), with q, k and v linear in the maps, bias
    included. Queries pass in blocks, and the backward pass computes their weights again, so that memory is linear in
    the number of positions. Devices that share the rows of an image share the queries; each needs all keys and values.

    Args:
      make: maker of the network's layers.
      channels: C, of both maps and of the result.
    """

    def __init__(self, make: Maker, channels: int):
        self.query = make.linear(channels, channels)
        self.key = make.linear(channels, channels)
        self.value = make.linear(channels, channels)

    def __call__(self, asking: Maps, asked: Maps) -> Maps:
        """The values of `asked`, weighted for each position of `asking`; the shape and type of `asking`.

        It computes in float32 at least.
        """
        tokens, others = (maps.astype(storage(maps.dtype)) for maps in (asking, asked))
        return _rows(self.query(tokens), self.key(others), self.value(others)).astype(asking.dtype)


@each_row
def _rows(query: Maps, key: Maps, value: Maps) -> Maps:
    B, h, w, C = query.shape
    return attend(*(maps.reshape(B, -1, C) for maps in (query, key, value))).reshape(B, h, w, C)


def attend(
    query: Float[Array, "B N C"], key: Float[Array, "B M C"], value: Float[Array, "B M D"], block: int = 0
) -> Float[Array, "B N D"]:
    """softmax(query key^T / sqrt(C)) value, `block` queries at a time; by default as many as make `WEIGHTS`."""
    N, C = query.shape[1:]
    block = min(block or max(WEIGHTS // key.shape[1], 1), N)
    padded = jnp.pad(query / np.sqrt(C).astype(query.dtype), ((0, 0), (0, -N % block), (0, 0)))
    return _attend(padded, key, value, block)[:, :N]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(
    query: Float[Array, "B N C"], key: Float[Array, "B M C"], value: Float[Array, "B M D"], block: int
) -> Float[Array, "B N D"]:
    """softmax(query key^T) value for queries that make whole blocks.

    A loop of JAX's own would start from zeros that XLA makes long before, at the peak of memory: ours are made of what
    the loop takes.
    """

    def one(number: Array, result: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        weights = _weights(_block(query, number, block), key)
        return _with_block(result, jnp.einsum("bnm,bmd->bnd", weights, value), number, block)

    B, N, _ = query.shape
    nothing = jnp.broadcast_to(0 * query[..., :1], (B, N, value.shape[-1]))
    return jax.lax.fori_loop(0, N // block, one, nothing)


def _forward(query: Array, key: Array, value: Array, block: int) -> tuple[Array, tuple[Array, Array, Array]]:
    return _attend(query, key, value, block), (query, key, value)


def _backward(block: int, kept: tuple[Array, Array, Array], change: Float[Array, "B N D"]) -> tuple[Array, ...]:
    """Gradients by query, key and value; each block's weights are computed again."""
    query, key, value = kept

    def one(number: Array, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        of_query, of_key, of_value = gradients
        asked, changed = (_block(each, number, block) for each in (query, change))
        weights = _weights(asked, key)
        of_weights = jnp.einsum("bnd,bmd->bnm", changed, value)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
        return (
            _with_block(of_query, jnp.einsum("bnm,bmc->bnc", of_scores, key), number, block),
            of_key + jnp.einsum("bnm,bnc->bmc", of_scores, asked),
            of_value + jnp.einsum("bnm,bnd->bmd", weights, changed),
        )

    start = (0 * query, 0 * key, 0 * value)
    return jax.lax.fori_loop(0, query.shape[1] // block, one, start)


_attend.defvjp(_forward, _backward)


def _weights(query: Float[Array, "B n C"], key: Float[Array, "B M C"]) -> Float[Array, "B n M"]:
    return jax.nn.softmax(jnp.einsum("bnc,bmc->bnm", query, key), axis=-1)


def _block(rows: Float[Array, "B N C"], number: Array, block: int) -> Float[Array, "B n C"]:
    return jax.lax.dynamic_slice_in_dim(rows, number * block, block, axis=1)


def _with_block(
    rows: Float[Array, "B N C"], part: Float[Array, "B n C"], number: Array, block: int
) -> Float[Array, "B N C"]:
    return jax.lax.dynamic_update_slice_in_dim(rows, part, number * block, axis=1)
