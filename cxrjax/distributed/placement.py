"""Placing the batches of each process on the mesh as global arrays."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar, cast

import jax
from jax.sharding import NamedSharding

from cxrjax.data import Batch

Placed = TypeVar("Placed")


def process_shard(sharding: NamedSharding, process: int | None = None) -> tuple[int, int]:
    """Return which shard of every batch a process loads, as (index, count): the `shard` argument of the pipeline.

    Processes whose devices hold the same images of the batch, because they share the rows of these images, load the
    same shard.

    Args:
      sharding: sharding of a batch field with one axis, such as `Batch.example_mask`.
      process: index of the process; default this one.
    """
    process = jax.process_index() if process is None else process
    device_count = len(sharding.device_set)
    images: dict[int, set[int]] = {}
    for device, (index,) in sharding.devices_indices_map((device_count,)).items():
        images.setdefault(device.process_index, set()).update(range(device_count)[index])
    shards = sorted({tuple(sorted(indices)) for indices in images.values()})
    return shards.index(tuple(sorted(images[process]))), len(shards)


def put_batch(batch: Batch, shardings: Batch) -> Batch:
    """Put this process's shard of a batch on its devices, without waiting for the transfer.

    Args:
      batch: host arrays of the shard that `process_shard` returns.
      shardings: a NamedSharding per field; images may also be split by rows.

    Returns:
      Global arrays of the whole batch.
    """
    fields = cast(Sequence[NamedSharding], shardings)
    shard_count = process_shard(fields[-1])[1]
    return Batch(
        *(
            jax.make_array_from_process_local_data(sharding, array, (len(array) * shard_count, *array.shape[1:]))
            for array, sharding in zip(batch, fields, strict=True)
        )
    )


def prefetch_to_device(
    batches: Iterator[Batch], put: Callable[[Batch], Placed], depth: int = 2
) -> Generator[Placed, None, None]:
    """Yield placed batches and keep `depth` more on the devices, so that transfers overlap with computation.

    Closes `batches` at the end, when it is closed, and when loading fails.
    """
    placed: deque[Placed] = deque()
    try:
        for batch in batches:
            placed.append(put(batch))
            if len(placed) > depth:
                yield placed.popleft()
        yield from placed
    finally:
        if isinstance(batches, Generator):
            batches.close()
