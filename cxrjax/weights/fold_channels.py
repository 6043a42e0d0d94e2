"""First convolutions of three grey channels, as convolutions of one.

A grey image repeated to channels c and normalised gives the convolution sum_c w_c * (x - mean_c) / std_c. One channel
(x - m) / s with w = sum_c w_c s / std_c gives the same less the constant k = sum_c,taps w_c (m - mean_c) / std_c, which
the norm after it takes up in its running mean. At the edge the convolution pads with zeros, which stand for mean_c or
m: there the two differ, unless all channels are normalised alike (then m = mean_c, and k = 0).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.errors import CxrError
from cxrjax.models.backbone import Backbone
from cxrjax.models.input_spec import InputSpec, one_channel, prepare

_SIDE = 64  # of the random image, px
Arrays = dict[tuple[str, ...], np.ndarray]


@dataclass(frozen=True)
class Folded:
    """Weights for one channel.

    Attributes:
      arrays: all of the network's, by our path.
      inputs: what the network expects now.
      exact: whether it computes the same for every image, up to rounding.
      inside: relative difference of the first maps on a random image, where the convolution sees no padding.
      edge: likewise where it does.
    """

    arrays: Arrays
    inputs: InputSpec
    exact: bool
    inside: float
    edge: float

    def note(self, channels: int) -> str:
        """What was done and what it costs, in words."""
        exactly = "exact" if self.exact else "exact but at the edge, where padding is 0 after normalisation"
        return (
            f"{channels} input channels folded to 1, {exactly}; the first maps of a random image differ by "
            f"{self.inside:.1e} inside and {self.edge:.1e} at the edge (relative)"
        )


def fold(model: Backbone, arrays: Arrays) -> Folded:
    """Sum the first convolution over its input channels, and move what normalisation adds into the norm after it.

    Args:
      model: the network with several channels; its shapes are enough.
      arrays: its weights by our path, HWIO.

    Raises:
      CxrError: it has one channel already, or nothing follows the convolution that could take up the constant.
    """
    if model.inputs.channels == 1:
        raise CxrError("these weights take one channel already: leave out --channels 1")
    if not getattr(model, "stem", ("",))[0]:
        raise CxrError("this network has no single first convolution that could be folded")
    before, after = model.inputs, one_channel(model.inputs)
    conv, norm = (tuple(path.split(".")) if path else () for path in model.stem)
    kernel = arrays[*conv, "kernel"].astype(np.float64)
    mean, std = (np.array(values)[None, None, :, None] for values in (before.mean, before.std))
    alike = len(set(zip(before.mean, before.std, strict=True))) == 1
    summed = (kernel / std * after.std[0]).sum(2, keepdims=True)
    constant = np.zeros(kernel.shape[-1]) if alike else (kernel * (after.mean[0] - mean) / std).sum((0, 1, 2))
    folded = arrays | {(*conv, "kernel"): summed.astype(np.float32)}
    if (bias := (*conv, "bias")) in arrays:
        folded[bias] = (arrays[bias] + constant).astype(np.float32)
    elif norm:
        folded[*norm, "mean"] = (arrays[*norm, "mean"] - constant).astype(np.float32)
    elif constant.any():
        raise CxrError("the first convolution has neither a bias nor a norm after it: it cannot be folded")
    whole = _first_maps(model, before, arrays, conv, norm)
    difference = whole - _first_maps(model, after, folded, conv, norm)
    inner = _sees_no_padding(model, conv, kernel.shape)
    inside, edge = (
        float(np.linalg.norm(difference[:, where]) / np.linalg.norm(whole[:, where])) if where.any() else 0.0
        for where in (inner, ~inner)
    )
    return Folded(folded, after, alike or bool(inner.all()), inside, edge)


def _first_maps(model: Backbone, inputs: InputSpec, arrays: Arrays, conv: tuple, norm: tuple) -> np.ndarray:
    """The first convolution of a random image, less the running mean of the norm after it."""
    grey = np.random.default_rng(0).integers(0, 256, (1, _SIDE, _SIDE, 1), np.uint8)
    maps = _convolve(model, conv, np.asarray(prepare(jnp.asarray(grey), inputs, jnp.float32)), arrays[*conv, "kernel"])
    maps = maps + arrays.get((*conv, "bias"), np.zeros(1, np.float32))
    return maps - arrays[*norm, "mean"] if norm else maps


def _sees_no_padding(model: Backbone, conv: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """H x W of the first maps: whether all of the kernel lies on the image."""
    ones = np.ones((1, _SIDE, _SIDE, 1), np.float32)
    return _convolve(model, conv, ones, np.ones((*shape[:2], 1, 1), np.float32))[0, :, :, 0] == shape[0] * shape[1]


def _convolve(model: Backbone, conv: tuple, images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """With the strides and the padding of the model's convolution."""
    layer: Any = model
    for name in conv:
        layer = layer[int(name)] if isinstance(layer, nnx.List) else getattr(layer, name)
    maps = jax.lax.conv_general_dilated(
        jnp.asarray(images), jnp.asarray(kernel), layer.strides, layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    return np.asarray(maps)
