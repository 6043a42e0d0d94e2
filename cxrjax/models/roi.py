"""A region inferred from feature maps, and its crop from the full-resolution image: inside jit, with static shapes.

Guan et al. 2018, "Diagnose like a radiologist: attention guided convolutional neural network", arXiv:1801.09927.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cxrjax.models.layers import Maps, param_dtype
from cxrjax.models.spatial import summed_rows


def heat_map(maps: Maps) -> Float[Array, "B h w"]:
    """The largest absolute value over channels, brought to 0..1 in each image; 0 where a map is constant."""
    strength = jnp.abs(maps).max(-1)
    low = strength.min((1, 2), keepdims=True)
    span = strength.max((1, 2), keepdims=True) - low
    return jnp.where(span > 0, (strength - low) / jnp.where(span > 0, span, 1), 0)


def largest_component(mask: Bool[Array, "B h w"]) -> Bool[Array, "B h w"]:
    """The largest group of true cells that touch, also diagonally; of equally large ones the first in reading order.

    Each cell takes the lowest number around it, then the number that this one has, until nothing changes: about as
    many rounds as the logarithm of the longest path.
    """
    B, h, w = mask.shape
    outside = h * w
    number = jnp.arange(outside, dtype=jnp.int32).reshape(1, h, w)

    def spread(labels: Array) -> Array:
        padded = jnp.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
        near = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        lowest = jnp.where(mask, jnp.stack(near).min(0), outside)
        flat = jnp.pad(lowest.reshape(B, -1), ((0, 0), (0, 1)), constant_values=outside)
        return jnp.take_along_axis(flat, flat, axis=1)[:, :-1].reshape(B, h, w)

    start = jnp.where(mask, number, outside)
    labels, _ = jax.lax.while_loop(
        lambda pair: jnp.any(pair[0] != pair[1]), lambda pair: (spread(pair[0]), pair[0]), (spread(start), start)
    )
    rows = jnp.arange(B)[:, None]
    areas = jnp.zeros((B, outside + 1), jnp.int32).at[rows, labels.reshape(B, -1)].add(1)[:, :-1]
    return mask & (labels == areas.argmax(1).astype(labels.dtype)[:, None, None])


def bounding_box(mask: Bool[Array, "B h w"]) -> Float[Array, "B 4"]:
    """Top, left, bottom and right edge of the true cells, as fractions of height and width; the whole where none is."""
    edges = []
    for axis in (1, 2):
        cells = mask.any(3 - axis)
        count = cells.shape[1]
        first = jnp.argmax(cells, axis=1)
        last = count - jnp.argmax(cells[:, ::-1], axis=1)
        found = cells.any(1)
        edges.append((jnp.where(found, first, 0) / count, jnp.where(found, last, count) / count))
    (top, bottom), (left, right) = edges
    return jnp.stack([top, left, bottom, right], axis=1).astype(jnp.float32)


def crop(images: Maps, boxes: Float[Array, "#B 4"], size: int) -> Maps:
    """The part of each image inside its box, resized to `size` x `size` px; where it shrinks, pixels are averaged.

    Args:
      images: at full resolution, any float type.
      boxes: top, left, bottom, right, as fractions; bottom > top and right > left; one for each image, or for all.
      size: side of the result in px.
    """
    wide = images.astype(param_dtype(images.dtype))
    top, left, bottom, right = jnp.broadcast_to(boxes, (len(images), 4)).astype(wide.dtype).T
    columns = _weights(images.shape[2], size, left, right)
    narrow = jnp.einsum("bhwc,bsw->bhsc", wide, columns, precision="highest")
    return summed_rows(narrow, _weights(images.shape[1], size, top, bottom)).astype(images.dtype)


def _weights(pixels: int, size: int, low: Float[Array, " B"], high: Float[Array, " B"]) -> Float[Array, "B S pixels"]:
    """What each pixel of a side counts in each of `size` points between two fractions of it.

    Triangles of twice the points' distance, and of two pixels at least, as `jax.image.scale_and_translate` has them.
    """
    step = ((high - low) * pixels / size)[:, None, None]
    points = (low * pixels)[:, None, None] + (jnp.arange(size, dtype=low.dtype)[:, None] + 0.5)[None] * step - 0.5
    apart = jnp.abs(jnp.arange(pixels, dtype=low.dtype)[None, None] - points)
    counts = jnp.maximum(1 - apart / jnp.maximum(step, 1), 0)
    return counts / counts.sum(-1, keepdims=True)
