"""Batched forward pass over many records, in their order and independent of batch size and devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from cxrjax.data.pipeline import Examples, evaluation_batches
from cxrjax.distributed.mesh import batch_shardings
from cxrjax.distributed.placement import prefetch_to_device, process_shard, put_batch
from cxrjax.models.network import Network
from cxrjax.train.state import flatten_for_mesh

PredictStep = Callable[[Network, Any], jax.Array]
"""A jitted step from a network, possibly flat, and images to an array with one row per image."""


def predict_logits(
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
    """Return the logits of every example, in order.

    Args:
      network: parameters and statistics, used in inference mode.
      examples: N records.
      step: `make_predict_step(mesh)`.
      mesh: devices.
      size: side of the images in px.
      batch: batch size over all devices; rounded up to a multiple of the `data` axis.
      threads: decoding threads.
      advance: called with the number of images of each batch.
    """
    devices = mesh.shape["data"]
    batch = -(-batch // devices) * devices
    shardings = batch_shardings(mesh)
    batches = evaluation_batches(
        examples, size=size, batch_size=batch, threads=threads, shard=process_shard(shardings.example_mask)
    )
    outputs, flat = [], flatten_for_mesh(network, mesh)
    for placed in prefetch_to_device(batches, lambda batch: put_batch(batch, shardings)):
        outputs.append(step(flat, placed.image))  # asynchronous: the device runs ahead of the host
        if len(outputs) > 2:
            outputs[-3] = np.asarray(outputs[-3])
        advance(batch)
    return np.concatenate([np.asarray(output) for output in outputs])[: len(examples.row)]
