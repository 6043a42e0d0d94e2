"""Where in an image a finding's score comes from, by four methods with one interface.

Class activation maps weigh a feature map A, the network's last before pooling, by the gradient of the finding's logit:

- `gradcam`: Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization"
  (2017), equations 1 and 2.
- `gradcam++`: Chattopadhay et al., "Grad-CAM++: generalized gradient-based visual explanations for deep convolutional
  networks" (2018), equations 5 and 19.
- `layercam`: Jiang et al., "LayerCAM: exploring hierarchical class activation maps for localization" (2021).

`integrated` gradients attribute the logit to the pixels themselves: Sundararajan, Taly and Yan, "Axiomatic attribution
for deep networks" (2017), equation 1.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from cxrjax.errors import CxrError
from cxrjax.explain.inputs import batches, checked, feature_map, on, shares, spread
from cxrjax.models.input_spec import prepare
from cxrjax.models.layers import param_dtype
from cxrjax.models.network import Network

Method = Literal["gradcam", "gradcam++", "layercam", "integrated"]
Baseline = Literal["black", "mean"]
METHODS: tuple[Method, ...] = get_args(Method)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
STEPS = 64
_AT_ONCE = 2**20  # pixels that pass through a network side by side


def saliency(
    network: Network,
    images: UInt8[np.ndarray, "N H W 1"],
    findings: Sequence[int],
    *,
    method: Method = "gradcam",
    layer: str | None = None,
    baseline: Baseline = "black",
    steps: int = STEPS,
    signed: bool = False,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    advance: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "N K h w"]:
    """Maps of what raises the logit S of each finding, the network in evaluation mode.

    With g = dS/dA for each position and channel k of the feature map A, the maps are ReLU(sum_k w_k A_k):

    - `gradcam`: w_k = mean of g_k over positions. With a head of average pooling and one linear layer the map before
      its ReLU adds up to the logit less its bias.
    - `gradcam++`: w_k = sum over positions of a ReLU(g_k), a = g_k^2 / (2 g_k^2 + g_k^3 sum A_k). The paper's factor
      exp(S), common to a whole map, is left out: it says nothing of the place, and overflows. Derived for an A that is
      not negative.
    - `layercam`: w_k = ReLU(g_k), at each position its own.

    `integrated` is (x - x') times the mean of dS/dx on the straight line from the baseline x' to the image x, summed
    over the network's input channels: before its ReLU it adds up to S(x) - S(x'), but for the error of the mean over
    `steps` midpoints.

    Args:
      network: a trained network.
      images: grey images.
      findings: positions of the findings among the network's outputs; any number, in any order.
      method: one of `METHODS`.
      layer: name of the feature map A, which the head must read; the last by default. Not for `integrated`.
      baseline: what `integrated` starts from, see `baselines`.
      steps: forward and backward passes per image, for `integrated`.
      signed: leave out the last ReLU, so that what lowers the logit is negative.
      batch_size: images side by side. By default as many as make 2^20 pixels: 16 of 256 x 256, and 1 from 1024 x 1024,
        for each device.
      mesh: devices among which images and their rows are split, where the network lies; default one device.
      advance: told how many images were done, each time some were.

    Returns:
      f32, not negative unless `signed`, in logits; h x w is the size of A, or that of the images for `integrated`. See
      `heatmaps.normalise` and `heatmaps.resize`.

    Raises:
      CxrError: no such method, baseline, finding or feature map, a map that the head does not read, no steps, or wrong
        images.
    """
    images = checked(images)
    _check(network, findings, method, layer, baseline, steps)
    chosen = np.asarray(findings, np.int32)
    if method == "integrated":
        one_batch = partial(_integrated, network, mesh=mesh, baseline=baseline, steps=steps)
    else:
        name = feature_map(network, images, layer)[0]
        one_batch = partial(_activations, network, mesh=mesh, layer=name, method=method)
    parts = []
    for batch, index in _batches(images, batch_size, mesh):
        with on(mesh):
            maps = np.asarray(one_batch(batch, chosen), np.float32)[index >= 0]
        parts.append(maps if signed else np.maximum(maps, 0))
        if advance is not None:
            advance(len(maps))
    return np.concatenate(parts)


def _activations(
    network: Network,
    images: UInt8[np.ndarray, "B H W 1"],
    findings: Int[np.ndarray, " K"],
    *,
    mesh: Mesh | None,
    layer: str,
    method: Method,
) -> Float[Array, "B K h w"]:
    return _activation(network, spread(mesh, images), findings, layer=layer, method=method)


@partial(jax.jit, static_argnames=("layer", "method"))
def _activation(
    network: Network, images: UInt8[Array, "B H W 1"], findings: Int[Array, " K"], *, layer: str, method: Method
) -> Float[Array, "B K h w"]:
    """Class activation maps before their ReLU: one forward pass, and a backward pass through the head per finding."""
    model = network.model()
    features = model.features(prepare(images, network.input_spec, network.dtype))

    def head(maps: Float[Array, "B h w C"]) -> Float[Array, "B All"]:
        return model.head({**features, layer: maps})

    if not _reads(head, features[layer]):
        raise CxrError(f"the head does not read the feature map {layer!r}: choose the last one, {list(features)[-1]!r}")
    maps = features[layer].astype(param_dtype(network.dtype))

    def weighted(slope: Float[Array, "B h w C"]) -> Float[Array, "B h w"]:
        weights = _WEIGHTS[method](maps, slope.astype(maps.dtype))
        return jnp.einsum("bhwc,bhwc->bhw", maps, jnp.broadcast_to(weights, maps.shape), precision="highest")

    slopes_of = _slopes(head, features[layer])
    maps_of = jax.lax.map(lambda finding: weighted(slopes_of(finding)), findings, batch_size=4)
    return jnp.swapaxes(maps_of, 0, 1)


def _mean_slope(maps: Float[Array, "B h w C"], slope: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
    return slope.mean((1, 2), keepdims=True)


def _weighted_slope(maps: Float[Array, "B h w C"], slope: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
    """Equation 19's fraction, reduced by g^2, which would underflow; where g is 0 the weight is 0 whatever it is."""
    denominator = 2 + slope * maps.sum((1, 2), keepdims=True)
    share = 1 / jnp.where(denominator == 0, 1, denominator)
    return (share * jax.nn.relu(slope)).sum((1, 2), keepdims=True)


def _positive_slope(maps: Float[Array, "B h w C"], slope: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    return jax.nn.relu(slope)


_WEIGHTS = {"gradcam": _mean_slope, "gradcam++": _weighted_slope, "layercam": _positive_slope}


def _integrated(
    network: Network,
    images: UInt8[np.ndarray, "B H W 1"],
    findings: Int[np.ndarray, " K"],
    *,
    mesh: Mesh | None,
    baseline: Baseline,
    steps: int,
) -> Float[np.ndarray, "B K H W"]:
    """The mean of `_step` over midpoints; the loop is not compiled, since the CPU is slow at convolutions in loops."""
    end, start = (spread(mesh, ends) for ends in (images, baselines(images, baseline)))
    points = ((np.arange(steps) + 0.5) / steps).tolist()
    together = min(max(_AT_ONCE // images.size, 1), len(findings))
    groups = np.resize(findings, (-(-len(findings) // together), together))  # the last one is filled up
    parts = []
    for group in groups:
        total = sum(_step(network, end, start, point, group) for point in points)
        parts.append(np.asarray(total) / steps)
    return np.concatenate(parts, axis=1)[:, : len(findings)]


@jax.jit
def _step(
    network: Network,
    images: UInt8[Array, "B H W 1"],
    start: UInt8[Array, "B H W 1"],
    point: float | Float[Array, ""],
    findings: Int[Array, " F"],
) -> Float[Array, "B F H W"]:
    """(x - x') dS/dx at one point of the line from the baseline, 0, to the image, 1."""
    model, wide = network.model(), param_dtype(network.dtype)
    end, begin = (prepare(ends, network.input_spec, wide) for ends in (images, start))
    way = end - begin

    def logits(prepared: Float[Array, "B H W C"]) -> Float[Array, "B All"]:
        return model(prepared.astype(network.dtype))

    slopes_of = _slopes(logits, begin + jnp.asarray(point, wide) * way)
    return jnp.swapaxes(jax.vmap(lambda finding: (slopes_of(finding) * way).sum(-1))(findings), 0, 1)


def _slopes(function: Callable[[Array], Array], at: Array) -> Callable[[Array], Array]:
    """`slopes(k)`: the gradient of output k of f[B, All] = function(at), each image's by its own part of `at`."""
    outputs, backward = jax.vjp(function, at)

    def slopes(k: Int[Array, ""]) -> Array:
        return backward(jax.nn.one_hot(jnp.full(len(outputs), k), outputs.shape[1], dtype=outputs.dtype))[0]

    return slopes


def baselines(images: UInt8[np.ndarray, "N H W 1"], baseline: Baseline) -> UInt8[np.ndarray, "N H W 1"]:
    """What integrated gradients start from: "black", or the "mean" grey value of each image (rounded), all over it."""
    if baseline == "black":
        return np.zeros_like(images)
    means = images.mean((1, 2, 3), keepdims=True).round().astype(np.uint8)
    return np.broadcast_to(means, images.shape)


def logits(
    network: Network, images: UInt8[np.ndarray, "N H W 1"], *, batch_size: int | None = None, mesh: Mesh | None = None
) -> Float[np.ndarray, "N All"]:
    """The network's logits of these images, in evaluation mode; arguments as in `saliency`."""
    parts = []
    for batch, index in _batches(checked(images), batch_size, mesh):
        with on(mesh):
            parts.append(np.asarray(_logits(network, spread(mesh, batch)))[index >= 0])
    return np.concatenate(parts)


@jax.jit
def _logits(network: Network, images: UInt8[Array, "B H W 1"]) -> Float[Array, "B All"]:
    return network.apply(images)[0]


def _batches(
    images: UInt8[np.ndarray, "N H W 1"], batch_size: int | None, mesh: Mesh | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    data, space = shares(mesh)
    return batches(images, max(_AT_ONCE * space // images[0].size, 1) * data if batch_size is None else batch_size)


def _check(
    network: Network, findings: Sequence[int], method: str, layer: str | None, baseline: str, steps: int
) -> None:
    wrong = [k for k in findings if not 0 <= k < network.classes]
    if wrong or not len(findings):
        raise CxrError(f"findings must be positions 0 to {network.classes - 1}, at least one, not {list(findings)}")
    if method not in METHODS:
        raise CxrError(f"no method {method!r}; choose one of {', '.join(METHODS)}")
    if baseline not in BASELINES:
        raise CxrError(f"no baseline {baseline!r}; choose one of {', '.join(BASELINES)}")
    if method == "integrated" and layer is not None:
        raise CxrError(f"integrated gradients are those of the image: leave out the layer {layer!r}")
    if steps < 1:
        raise CxrError(f"steps must be at least 1, not {steps}")


def _reads(function: Callable[[Array], Array], argument: Array) -> bool:
    """Whether any operation of `function` uses its argument; a gradient of zero would not tell."""
    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(argument.shape, argument.dtype)).jaxpr
    return any(atom is jaxpr.invars[0] for equation in jaxpr.eqns for atom in equation.invars)
