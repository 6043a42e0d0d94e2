"""Grad-CAM: where in an image a finding's score comes from.

Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization" (2017), with A the
output of the network's last layer before pooling.
"""

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cxrjax.errors import CxrError
from cxrjax.explain.inputs import batches, checked, feature_map
from cxrjax.models.inputs import prepare
from cxrjax.models.network import Network


def gradcam(
    network: Network,
    images: UInt8[np.ndarray, "N H W 1"],
    findings: Sequence[int],
    *,
    layer: str | None = None,
    batch_size: int = 16,
) -> Float[np.ndarray, "N K h w"]:
    """Maps of what raises the logit S of each finding: ReLU(sum_k alpha_k A_k), alpha_k = mean over space of dS/dA_k.

    The network is in evaluation mode. One pass through the features serves all findings; each of them costs one
    backward pass through the head.

    Args:
      network: a trained network.
      images: grey images.
      findings: positions of the findings among the network's outputs; any number, in any order.
      layer: name of the feature map A, which the head must read; the last by default.
      batch_size: images per pass.

    Returns:
      f32, not negative, at the resolution h x w of A, in logits: with a head of average pooling and one linear layer,
      the map before its ReLU adds up to the logit less its bias. See `normalise` and `resize`.

    Raises:
      CxrError: no such finding or feature map, a map that the head does not read, or wrong images.
    """
    images = checked(images)
    wrong = [k for k in findings if not 0 <= k < network.classes]
    if wrong or not len(findings):
        raise CxrError(f"findings must be positions 0 to {network.classes - 1}, at least one, not {list(findings)}")
    name, _ = feature_map(network, images, layer)
    chosen = np.asarray(findings, np.int32)
    maps = [
        np.asarray(_gradcam(network, batch, chosen, layer=name))[index >= 0]
        for batch, index in batches(images, batch_size)
    ]
    return np.concatenate(maps)


@partial(jax.jit, static_argnames="layer")
def _gradcam(
    network: Network, images: UInt8[Array, "B H W 1"], findings: Int[Array, " K"], *, layer: str
) -> Float[Array, "B K h w"]:
    model = network.model()
    features = model.features(prepare(images, network.inputs, network.dtype))

    def head(maps: Float[Array, "B h w C"]) -> Float[Array, "B All"]:
        return model.head({**features, layer: maps})

    if not _reads(head, features[layer]):
        raise CxrError(f"the head does not read the feature map {layer!r}: choose the last one, {list(features)[-1]!r}")
    logits, backward = jax.vjp(head, features[layer])
    wide = logits.dtype
    maps = features[layer].astype(wide)

    def one(finding: Int[Array, ""]) -> Float[Array, "B h w"]:
        (gradient,) = backward(jax.nn.one_hot(jnp.full(len(images), finding), logits.shape[1], dtype=wide))
        alpha = gradient.astype(wide).mean((1, 2))
        return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", maps, alpha, precision="highest"))

    return jnp.swapaxes(jax.lax.map(one, findings, batch_size=4), 0, 1)


def _reads(function: Callable[[Array], Array], argument: Array) -> bool:
    """Whether any operation of `function` uses its argument; a gradient of zero would not tell."""
    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(argument.shape, argument.dtype)).jaxpr
    return any(atom is jaxpr.invars[0] for equation in jaxpr.eqns for atom in equation.invars)


def normalise(maps: Float[np.ndarray, "*maps h w"]) -> Float[np.ndarray, "*maps h w"]:
    """Each map divided by its largest value, so that it lies in [0, 1]; a map of zeros stays one."""
    highest = maps.max((-2, -1), keepdims=True)
    return np.where(highest > 0, maps / np.where(highest > 0, highest, 1), 0).astype(maps.dtype)


def resize(maps: Float[np.ndarray, "*maps h w"], height: int, width: int) -> Float[np.ndarray, "*maps H W"]:
    """Maps at the image's resolution: bilinear between the centres of the cells, constant beyond the outermost."""
    flat = np.asarray(maps, np.float32).reshape(-1, *maps.shape[-2:])
    large = [cv2.resize(single, (width, height), interpolation=cv2.INTER_LINEAR) for single in flat]
    return np.stack(large).reshape(*maps.shape[:-2], height, width)
