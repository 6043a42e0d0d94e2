"""A network over many records: logits in the records' order, whatever the batches and devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from cxrjax.data.pipeline import Examples, evaluation_batches
from cxrjax.distributed.mesh import batch_shardings
from cxrjax.distributed.placement import prefetch_to_device, put_batch, process_shard
from cxrjax.models.network import Network
from cxrjax.train.flat_params import pack_for

PredictStep = Callable[[Network, Any], jax.Array]
"""The network may be packed (`train.packed`)."""


def logits_of(
    network: Network,
    examples: Examples,
    step: PredictStep,
    mesh: jax.sharding.Mesh,
    *,
    size: int,
    batch: int,
    threads: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> Float[np.ndarray, "N K"]:
    """Logits of every example, once, in order.

    Args:
      network: parameters and statistics, used in inference mode.
      examples: N records.
      step: `make_predict_step(mesh)`, compiled once by the caller.
      mesh: where batches are placed.
      size: side of the images in px.
      batch: images at once, over all devices; rounded up to a multiple of the `data` axis.
      threads: decoding threads.
      advance: told how many images each batch had.
    """
    devices = mesh.shape["data"]
    batch = -(-batch // devices) * devices
    shardings = batch_shardings(mesh)
    batches = evaluation_batches(
        examples, size=size, batch_size=batch, threads=threads, shard=process_shard(shardings.example_mask)
    )
    parts, few = [], pack_for(network, mesh)
    for placed in prefetch_to_device(batches, lambda b: put_batch(b, shardings)):
        parts.append(step(few, placed.image))  # not read yet: the device runs ahead of the host
        if len(parts) > 2:
            parts[-3] = np.asarray(parts[-3])
        advance(batch)
    return np.concatenate([np.asarray(part) for part in parts])[: len(examples.row)]
