"""Inputs of explanations: checked images in batches of one size, placed on devices, and feature maps by name."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, UInt8

from cxrjax.errors import CxrError
from cxrjax.models.input_spec import prepare
from cxrjax.models.network import Network


def check_images(images: np.ndarray) -> UInt8[np.ndarray, "N H W 1"]:
    """Return the images; raise a `CxrError` unless they are grey, uint8 of shape N x H x W x 1 with N at least 1."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 1:
        shape = " x ".join(map(str, images.shape))
        raise CxrError(f"images must be grey, uint8 of shape N x H x W x 1, not {images.dtype} of shape {shape}")
    if not images.size:
        raise CxrError("there is no image: give at least one")
    return images


def batches(
    images: UInt8[np.ndarray, "N H W 1"], batch_size: int
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 1"], Int32[np.ndarray, " B"]]]:
    """Yield batches of one size with the number of each image; padding in the last batch has number -1.

    One size means that functions of a batch compile once. If there are fewer than `batch_size` images, the batch has
    the next power of two, so that calls with similar numbers of images share compiled code.
    """
    if batch_size < 1:
        raise CxrError(f"batch_size must be at least 1, not {batch_size}")
    size = min(batch_size, 1 << (len(images) - 1).bit_length())
    for start in range(0, len(images), size):
        index = np.arange(start, start + size, dtype=np.int32)
        yield images[np.minimum(index, len(images) - 1)], np.where(index < len(images), index, -1)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Return a context in which layers are traced for the mesh and shard their maps over it (`models.spatial`)."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_shape(mesh: Mesh | None) -> tuple[int, int]:
    """Return the number of shards that the mesh splits a batch into, and an image."""
    return (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["space"])


def put_images(mesh: Mesh | None, images: UInt8[np.ndarray, "B H W 1"]) -> Array | np.ndarray:
    """Place images on the mesh, sharded over each of its axes that divides them and replicated over the others."""
    if mesh is None:
        return images
    axes = zip(("data", "space"), images.shape[:2], strict=True)
    spec = P(*(axis if length % mesh.shape[axis] == 0 else None for axis, length in axes))
    return jax.device_put(images, NamedSharding(mesh, spec))


@jax.tree_util.register_static
class Name(str):
    """A feature map's name as a static pytree node: jit returns dictionaries sorted by key, but a list in its order."""

    __slots__ = ()


def with_names(maps: Mapping[str, Array]) -> list[tuple[Name, Array]]:
    """Return (name, feature map) pairs in the backbone's order, in a form that a traced function can return."""
    return [(Name(name), value) for name, value in maps.items()]


def feature_map(network: Network, images: UInt8[np.ndarray, "N H W 1"], name: str | None) -> tuple[str, tuple]:
    """Return the name (default: the last) and the shape (1, h, w, C) of a feature map, without computing it.

    Raises:
      CxrError: there is no such feature map, or the network does not take such images.
    """
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    shapes = {str(key): maps.shape for key, maps in _features.eval_shape(network, image)}
    name = check_name(shapes, name)
    return name, shapes[name]


@jax.jit
def _features(network: Network, images: UInt8[Array, "B H W 1"]) -> list[tuple[Name, Array]]:
    return with_names(network.model().features(prepare(images, network.input_spec, network.dtype)))


def check_name(names: Iterable[str], name: str | None) -> str:
    """Return a feature map's name, by default the last; raise a `CxrError` if it is not among `names`."""
    names = list(names)
    if name is not None and name not in names:
        raise CxrError(f"no feature map {name!r}; this network has {', '.join(names)}")
    return names[-1] if name is None else name
