"""What the explanations take: images in batches of one size, laid out on devices, and the name of a feature map."""

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


def checked(images: np.ndarray) -> UInt8[np.ndarray, "N H W 1"]:
    """The images as they are, or a `CxrError` unless they are grey, uint8 of shape N x H x W x 1, at least one."""
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
    """Batches of one size, with the number of each image; the last batch is padded, with the number -1.

    So each function of a batch compiles once. At most `batch_size` images each; few images are filled up to the next
    power of two only, so that calls with almost as many share what was compiled.
    """
    if batch_size < 1:
        raise CxrError(f"batch_size must be at least 1, not {batch_size}")
    size = min(batch_size, 1 << (len(images) - 1).bit_length())
    for start in range(0, len(images), size):
        index = np.arange(start, start + size, dtype=np.int32)
        yield images[np.minimum(index, len(images) - 1)], np.where(index < len(images), index, -1)


def on(mesh: Mesh | None) -> AbstractContextManager:
    """Inside, functions are traced for the mesh, whose layers lay their maps out on it (`models.rows`)."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def shares(mesh: Mesh | None) -> tuple[int, int]:
    """Into how many parts the mesh splits a batch, and an image."""
    return (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["space"])


def spread(mesh: Mesh | None, images: UInt8[np.ndarray, "B H W 1"]) -> Array | np.ndarray:
    """The images on the mesh: split by both of its axes, or whole where an axis does not divide them."""
    if mesh is None:
        return images
    axes = zip(("data", "space"), images.shape[:2], strict=True)
    where = P(*(axis if length % mesh.shape[axis] == 0 else None for axis, length in axes))
    return jax.device_put(images, NamedSharding(mesh, where))


@jax.tree_util.register_static
class Name(str):
    """A feature map's name as part of a pytree: dictionaries leave traced functions sorted, a list keeps its order."""

    __slots__ = ()


def named(maps: Mapping[str, Array]) -> list[tuple[Name, Array]]:
    """Feature maps with their names, in the backbone's order, as a traced function may return them."""
    return [(Name(name), value) for name, value in maps.items()]


def feature_map(network: Network, images: UInt8[np.ndarray, "N H W 1"], name: str | None) -> tuple[str, tuple]:
    """Name (the last by default) and shape (1, h, w, C) of a feature map of one image; nothing is computed.

    Raises:
      CxrError: no such feature map, or images the network does not take.
    """
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    shapes = {str(key): maps.shape for key, maps in _features.eval_shape(network, image)}
    name = name_in(shapes, name)
    return name, shapes[name]


@jax.jit
def _features(network: Network, images: UInt8[Array, "B H W 1"]) -> list[tuple[Name, Array]]:
    return named(network.model().features(prepare(images, network.input_spec, network.dtype)))


def name_in(names: Iterable[str], name: str | None) -> str:
    """The feature map's name, the last by default; a `CxrError` where it is none of `names`."""
    names = list(names)
    if name is not None and name not in names:
        raise CxrError(f"no feature map {name!r}; this network has {', '.join(names)}")
    return names[-1] if name is None else name
