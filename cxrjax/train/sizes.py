"""Whether a network takes images of a size, found out from shapes alone before any image is read."""

from functools import partial

import jax
import numpy as np

from cxrjax.errors import CxrError
from cxrjax.models.network import Network

STEP, TRIES = 32, 4
"""Sizes that are proposed are multiples of this: networks halve their images five times. So many are tried."""


def check_size(network: Network, size: int, *, images: int = 1, backbone_in_training: bool = True) -> None:
    """Check that a training step can be made.

    Args:
      network: of any family.
      size: side of the images in px.
      images: normalised together.
      backbone_in_training: whether its norms learn their statistics.

    Raises:
      CxrError: the network says why not; the nearest multiples of `STEP` that work are named.
    """
    how = (images, backbone_in_training)
    reason = _refusal(network, size, *how)
    if not reason:
        return
    below = size // STEP * STEP
    candidates = [below + STEP * step for step in range(1, TRIES + 1)]
    choices = [each for each in (below, *candidates) if each and not _refusal(network, each, *how)]
    nearest = [each for each in choices if each < size][:1] + [each for each in choices if each > size][:1]
    mend = f": choose data.size = {' or '.join(map(str, nearest))}" if nearest else ""
    raise CxrError(f"config key data.size = {size} does not suit the network{mend}. It says: {reason}")


def _refusal(network: Network, size: int, images: int, backbone_in_training: bool) -> str:
    try:
        # Traced once for equal networks: a study opens many runs.
        _outputs.eval_shape(network, jax.ShapeDtypeStruct((images, size, size, 1), np.uint8), backbone_in_training)
    except CxrError as error:
        return str(error)
    return ""


@partial(jax.jit, static_argnums=2)
def _outputs(network: Network, image: jax.Array, backbone_in_training: bool) -> list[jax.Array]:
    key = jax.random.PRNGKey(0)
    found, _ = network.outputs(image, train=True, key=key, backbone_in_training=backbone_in_training)
    return list(found.values())
