"""Attention between the positions of feature maps, in memory that grows linearly with their number."""

import jax
import jax.numpy as jnp
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
    B, N, C = query.shape
    block = block or max(WEIGHTS // key.shape[1], 1)

    @jax.checkpoint
    def one(part: Float[Array, "B n C"]) -> Float[Array, "B n D"]:
        scores = jnp.einsum("bnc,bmc->bnm", part, key) / jnp.asarray(C, part.dtype) ** 0.5
        return jnp.einsum("bnm,bmd->bnd", jax.nn.softmax(scores, axis=-1), value)

    if block >= N:
        return one(query)
    blocks = -(-N // block)
    padded = jnp.pad(query, ((0, 0), (0, blocks * block - N), (0, 0)))
    parts = padded.reshape(B, blocks, block, C).swapaxes(0, 1)
    return jax.lax.map(one, parts).swapaxes(0, 1).reshape(B, blocks * block, -1)[:, :N]
