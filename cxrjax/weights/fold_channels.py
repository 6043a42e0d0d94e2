"""Fold a first convolution of three grey channels into a convolution of one.

A grey image repeated to channels c and normalised gives the convolution sum_c w_c * (x - mean_c) / std_c. One channel
(x - m) / s with w = sum_c w_c s / std_c gives the same less the constant k = sum_c,taps w_c (m - mean_c) / std_c, which
the norm that follows takes up in its running mean. At the edge the convolution pads with zeros, which stand for mean_c
or m: there the two differ, unless all channels are normalised alike (then m = mean_c, and k = 0).
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
class FoldedWeights:
    """Weights for one channel.

    Attributes:
      arrays: all of the network's, by our path.
      input_spec: what the network now expects.
      exact: whether it computes the same for every image, up to rounding.
      inner_error: relative difference of the first maps of a random image, where the convolution sees no padding.
      edge_error: the same where it does.
    """

    arrays: Arrays
    input_spec: InputSpec
    exact: bool
    inner_error: float
    edge_error: float

    def note(self, channels: int) -> str:
        """Describe what was done and what it costs."""
        exactness = "exact" if self.exact else "exact but at the edge, where padding is 0 after normalisation"
        return (
            f"{channels} input channels folded to 1, {exactness}; the first maps of a random image differ by "
            f"{self.inner_error:.1e} inside and {self.edge_error:.1e} at the edge (relative)"
        )


def fold_channels(model: Backbone, arrays: Arrays) -> FoldedWeights:
    """Sum the first convolution over its input channels, and move the normalisation's offset into the next norm.

    Args:
      model: the network with several channels; shapes alone are enough.
      arrays: its weights by our path, HWIO.

    Raises:
      CxrError: it has one channel already, or nothing follows the convolution that could take up the constant.
    """
    if model.input_spec.channels == 1:
        raise CxrError("these weights take one channel already: leave out --channels 1")
    if not getattr(model, "stem", ("",))[0]:
        raise CxrError("this network has no single first convolution that could be folded")
    before, after = model.input_spec, one_channel(model.input_spec)
    conv, norm = (tuple(path.split(".")) if path else () for path in model.stem)
    kernel = arrays[*conv, "kernel"].astype(np.float64)
    mean, std = (np.array(values)[None, None, :, None] for values in (before.mean, before.std))
    all_alike = len(set(zip(before.mean, before.std, strict=True))) == 1
    summed = (kernel / std * after.std[0]).sum(2, keepdims=True)
    constant = np.zeros(kernel.shape[-1]) if all_alike else (kernel * (after.mean[0] - mean) / std).sum((0, 1, 2))
    folded = arrays | {(*conv, "kernel"): summed.astype(np.float32)}
    if (bias := (*conv, "bias")) in arrays:
        folded[bias] = (arrays[bias] + constant).astype(np.float32)
    elif norm:
        folded[*norm, "mean"] = (arrays[*norm, "mean"] - constant).astype(np.float32)
    elif constant.any():
        raise CxrError("the first convolution has neither a bias nor a norm after it: it cannot be folded")
    maps = _first_maps(model, before, arrays, conv, norm)
    difference = maps - _first_maps(model, after, folded, conv, norm)
    is_inner = _sees_no_padding(model, conv, kernel.shape)
    inner_error, edge_error = (
        float(np.linalg.norm(difference[:, where]) / np.linalg.norm(maps[:, where])) if where.any() else 0.0
        for where in (is_inner, ~is_inner)
    )
    return FoldedWeights(folded, after, all_alike or bool(is_inner.all()), inner_error, edge_error)


def _first_maps(model: Backbone, input_spec: InputSpec, arrays: Arrays, conv: tuple, norm: tuple) -> np.ndarray:
    """Return the first convolution of a random image, less the running mean of the next norm."""
    grey = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, _SIDE, _SIDE, 1), np.uint8))
    maps = _convolve(model, conv, np.asarray(prepare(grey, input_spec, jnp.float32)), arrays[*conv, "kernel"])
    maps = maps + arrays.get((*conv, "bias"), np.zeros(1, np.float32))
    return maps - arrays[*norm, "mean"] if norm else maps


def _sees_no_padding(model: Backbone, conv: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """Return bool[H, W] of the first maps: whether all of the kernel lies on the image."""
    ones = np.ones((1, _SIDE, _SIDE, 1), np.float32)
    return _convolve(model, conv, ones, np.ones((*shape[:2], 1, 1), np.float32))[0, :, :, 0] == shape[0] * shape[1]


def _convolve(model: Backbone, conv: tuple, images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with the strides and padding of the model's convolution."""
    layer: Any = model
    for name in conv:
        layer = layer[int(name)] if isinstance(layer, nnx.List) else getattr(layer, name)
    maps = jax.lax.conv_general_dilated(
        jnp.asarray(images), jnp.asarray(kernel), layer.strides, layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    return np.asarray(maps)
