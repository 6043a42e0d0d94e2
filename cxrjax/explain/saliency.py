"""Saliency maps: which regions of an image raise the score of a finding, by four methods with one interface.

Class activation maps weight a feature map A (by default the last) by the gradient of the finding's logit:

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
from cxrjax.explain.inputs import batches, check_images, feature_map, mesh_shape, put_images, use_mesh
from cxrjax.jaxprs import needed_inputs
from cxrjax.models.input_spec import prepare
from cxrjax.models.layers import param_dtype
from cxrjax.models.network import Network

Method = Literal["gradcam", "gradcam++", "layercam", "integrated"]
Baseline = Literal["black", "mean"]
METHODS: tuple[Method, ...] = get_args(Method)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
STEPS = 64
_PIXELS_PER_PASS = 2**20


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
    """Compute maps of what raises the logit S of each finding, with the network in evaluation mode.

    With g = dS/dA for each position and channel k of the feature map A, the maps are ReLU(sum_k w_k A_k):

    - `gradcam`: w_k = mean of g_k over positions. With a head of average pooling and one linear layer, the map before
      its ReLU sums to the logit minus its bias.
    - `gradcam++`: w_k = sum over positions of a ReLU(g_k), a = g_k^2 / (2 g_k^2 + g_k^3 sum A_k). The paper's factor
      exp(S), constant over a map, is left out because it overflows. The derivation assumes A >= 0.
    - `layercam`: w_k = ReLU(g_k), a weight for each position.

    `integrated` is (x - x') times the mean of dS/dx on the straight line from the baseline x' to the image x, summed
    over the network's input channels. Before its ReLU it sums to S(x) - S(x'), up to the error of the mean over `steps`
    midpoints.

    Args:
      network: a trained network.
      images: grey images.
      findings: indices of the findings among the network's outputs, in any order.
      method: one of `METHODS`.
      layer: name of the feature map A, which the head must read; default: the last. Not for `integrated`.
      baseline: start of the line for `integrated`, see `baselines`.
      steps: forward and backward passes per image, for `integrated`.
      signed: leave out the last ReLU, so that regions that lower the logit are negative.
      batch_size: images per batch. Default: as many as make 2^20 pixels on each device: 16 of 256 x 256, and 1 from
        1024 x 1024.
      mesh: devices over which images and their rows are sharded, and where the network is; default: one device.
      advance: called with the number of finished images.

    Returns:
      f32, in logits, not negative unless `signed`. h x w is the size of A, or of the images for `integrated`. See
      `localisation.normalise` and `localisation.resize`.

    Raises:
      CxrError: an option is out of range, a finding or feature map does not exist, the head does not read the feature
        map, or the images have a wrong format.
    """
    images = check_images(images)
    _check(network, findings, method, layer, baseline, steps)
    chosen = np.asarray(findings, np.int32)
    name = "" if method == "integrated" else feature_map(network, images, layer)[0]
    batches_of_maps = []
    for batch, index in _batches(images, batch_size, mesh):
        with use_mesh(mesh):
            if method == "integrated":
                maps = _integrated(network, batch, chosen, mesh=mesh, baseline=baseline, steps=steps)
            else:
                maps = _activation(network, put_images(mesh, batch), chosen, layer=name, method=method)
            maps = np.asarray(maps, np.float32)[index >= 0]
        batches_of_maps.append(maps if signed else np.maximum(maps, 0))
        if advance is not None:
            advance(len(maps))
    return np.concatenate(batches_of_maps)


@partial(jax.jit, static_argnames=("layer", "method"))
def _activation(
    network: Network, images: UInt8[Array, "B H W 1"], findings: Int[Array, " K"], *, layer: str, method: Method
) -> Float[Array, "B K h w"]:
    """Compute class activation maps before their ReLU: a forward pass, and a backward pass of the head per finding."""
    model = network.model()
    features = model.features(prepare(images, network.input_spec, network.dtype))

    def head(maps: Float[Array, "B h w C"]) -> Float[Array, "B All"]:
        return model.head({**features, layer: maps})

    layer_shape = jax.ShapeDtypeStruct(features[layer].shape, features[layer].dtype)
    if not needed_inputs(jax.make_jaxpr(head)(layer_shape).jaxpr)[0]:  # a gradient of zero would not show it
        raise CxrError(f"the head does not read the feature map {layer!r}: choose the last one, {list(features)[-1]!r}")
    maps = features[layer].astype(param_dtype(network.dtype))

    def cam(gradient: Float[Array, "B h w C"]) -> Float[Array, "B h w"]:
        weights = _WEIGHTS[method](maps, gradient.astype(maps.dtype))
        return jnp.einsum("bhwc,bhwc->bhw", maps, jnp.broadcast_to(weights, maps.shape), precision="highest")

    gradient = _output_gradients(head, features[layer])
    cams = jax.lax.map(lambda finding: cam(gradient(finding)), findings, batch_size=4)
    return jnp.swapaxes(cams, 0, 1)


def _gradcam_weights(maps: Float[Array, "B h w C"], gradient: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
    return gradient.mean((1, 2), keepdims=True)


def _gradcam_plus_weights(maps: Float[Array, "B h w C"], gradient: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
    """Equation 19, with its fraction divided by g^2, which would underflow; if g is 0 the weight is 0."""
    denominator = 2 + gradient * maps.sum((1, 2), keepdims=True)
    fraction = 1 / jnp.where(denominator == 0, 1, denominator)
    return (fraction * jax.nn.relu(gradient)).sum((1, 2), keepdims=True)


def _layercam_weights(maps: Float[Array, "B h w C"], gradient: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    return jax.nn.relu(gradient)


_WEIGHTS = {"gradcam": _gradcam_weights, "gradcam++": _gradcam_plus_weights, "layercam": _layercam_weights}


def _integrated(
    network: Network,
    images: UInt8[np.ndarray, "B H W 1"],
    findings: Int[np.ndarray, " K"],
    *,
    mesh: Mesh | None,
    baseline: Baseline,
    steps: int,
) -> Float[np.ndarray, "B K H W"]:
    """Average `_step` over midpoints; the loop is not compiled, since convolutions inside loops are slow on CPUs."""
    end, start = (put_images(mesh, ends) for ends in (images, baselines(images, baseline)))
    points = ((np.arange(steps) + 0.5) / steps).tolist()
    group_size = min(max(_PIXELS_PER_PASS // images.size, 1), len(findings))
    groups = np.resize(findings, (-(-len(findings) // group_size), group_size))  # the last one is padded
    attributions = []
    for group in groups:
        total = sum(_step(network, end, start, point, group) for point in points)
        attributions.append(np.asarray(total) / steps)
    return np.concatenate(attributions, axis=1)[:, : len(findings)]


@jax.jit
def _step(
    network: Network,
    images: UInt8[Array, "B H W 1"],
    start: UInt8[Array, "B H W 1"],
    point: float | Float[Array, ""],
    findings: Int[Array, " F"],
) -> Float[Array, "B F H W"]:
    """Return (x - x') dS/dx at one point of the line from the baseline (0) to the image (1)."""
    model, wide = network.model(), param_dtype(network.dtype)
    end, begin = (prepare(ends, network.input_spec, wide) for ends in (images, start))
    difference = end - begin

    def logits(prepared: Float[Array, "B H W C"]) -> Float[Array, "B All"]:
        return model(prepared.astype(network.dtype))

    gradient = _output_gradients(logits, begin + jnp.asarray(point, wide) * difference)
    return jnp.swapaxes(jax.vmap(lambda finding: (gradient(finding) * difference).sum(-1))(findings), 0, 1)


def _output_gradients(function: Callable[[Array], Array], inputs: Array) -> Callable[[Array], Array]:
    """Return `gradient(k)`: the gradient of output k of `function(inputs)`, f[B, All], for each image of the batch."""
    outputs, backward = jax.vjp(function, inputs)

    def gradient(k: Int[Array, ""]) -> Array:
        return backward(jax.nn.one_hot(jnp.full(len(outputs), k), outputs.shape[1], dtype=outputs.dtype))[0]

    return gradient


def baselines(images: UInt8[np.ndarray, "N H W 1"], baseline: Baseline) -> UInt8[np.ndarray, "N H W 1"]:
    """Return start images for integrated gradients: "black", or each image's "mean" grey value (rounded)."""
    if baseline == "black":
        return np.zeros_like(images)
    means = images.mean((1, 2, 3), keepdims=True).round().astype(np.uint8)
    return np.broadcast_to(means, images.shape)


def logits(
    network: Network, images: UInt8[np.ndarray, "N H W 1"], *, mesh: Mesh | None = None
) -> Float[np.ndarray, "N All"]:
    """Return the network's logits in evaluation mode; see `saliency` for the arguments."""
    outputs = []
    for batch, index in _batches(check_images(images), None, mesh):
        with use_mesh(mesh):
            outputs.append(np.asarray(_logits(network, put_images(mesh, batch)))[index >= 0])
    return np.concatenate(outputs)


@jax.jit
def _logits(network: Network, images: UInt8[Array, "B H W 1"]) -> Float[Array, "B All"]:
    return network.apply(images)[0]


def _batches(
    images: UInt8[np.ndarray, "N H W 1"], batch_size: int | None, mesh: Mesh | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    data, space = mesh_shape(mesh)
    return batches(
        images, max(_PIXELS_PER_PASS * space // images[0].size, 1) * data if batch_size is None else batch_size
    )


def _check(
    network: Network, findings: Sequence[int], method: str, layer: str | None, baseline: str, steps: int
) -> None:
    wrong = [k for k in findings if not 0 <= k < network.classes]
    if wrong or not len(findings):
        raise CxrError(f"findings must be one or more indices 0 to {network.classes - 1}, not {list(findings)}")
    if method not in METHODS:
        raise CxrError(f"no method {method!r}; choose one of {', '.join(METHODS)}")
    if baseline not in BASELINES:
        raise CxrError(f"no baseline {baseline!r}; choose one of {', '.join(BASELINES)}")
    if method == "integrated" and layer is not None:
        raise CxrError(
            f"integrated gradients are computed for the image, not for a layer: leave out the layer {layer!r}"
        )
    if steps < 1:
        raise CxrError(f"steps must be at least 1, not {steps}")
