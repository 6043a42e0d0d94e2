"""Attention between the positions of feature maps, in memory that grows linearly with their number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cxrjax.models.layers import Maker, Maps, storage
from cxrjax.models.rows import passed_on, shared

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
        following = passed_on((key, value), shares) if share < shares else (key, value)
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
        following = passed_on((key, value), shares) if share < shares else (key, value)
        of_query, *others = _gradients((of_query, of_key, of_value), asking, key, value, block)
        (key, value), of_query, (of_key, of_value) = jax.lax.optimization_barrier(
            (following, of_query, passed_on(others, shares))
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
