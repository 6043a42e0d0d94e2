"""From the batches of each process to arrays that all devices share."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar, cast

import jax
from jax.sharding import NamedSharding

from cxrjax.data.records import Batch

Placed = TypeVar("Placed")


def process_shard(sharding: NamedSharding, process: int | None = None) -> tuple[int, int]:
    """Which part of every batch a process loads: the `shard` argument of the pipeline.

    Processes whose devices hold the same rows of the batch (because they share the rows of its images) load the same
    part.

    Args:
      sharding: of a batch field of one axis, such as `Batch.valid`.
      process: default this one.
    """
    process = jax.process_index() if process is None else process
    held: dict[int, set[int]] = {}
    count = len(sharding.device_set)
    for device, (rows,) in sharding.devices_indices_map((count,)).items():
        held.setdefault(device.process_index, set()).update(range(count)[rows])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    return parts.index(tuple(sorted(held[process]))), len(parts)


def put_batch(batch: Batch, shardings: Batch) -> Batch:
    """Puts this process's part of a batch where it belongs; does not wait for the transfer.

    Args:
      batch: host arrays, the part that `process_shard` names.
      shardings: a NamedSharding for each field; images may also be split by their rows.

    Returns:
      Global arrays of the whole batch.
    """
    where = cast(Sequence[NamedSharding], shardings)
    parts = process_shard(where[-1])[1]
    return Batch(
        *(
            jax.make_array_from_process_local_data(sharding, array, (len(array) * parts, *array.shape[1:]))
            for array, sharding in zip(batch, where, strict=True)
        )
    )


def prefetch_to_device(batches: Iterator[Batch], place: Callable[[Batch], Placed], depth: int = 2) -> Generator[Placed, None, None]:
    """Keeps `depth` placed batches waiting on the devices, so that transfers hide behind computation.

    Ends, and closes `batches`, with them, when it is closed, or when loading fails.
    """
    placed: deque[Placed] = deque()
    try:
        for batch in batches:
            placed.append(place(batch))
            if len(placed) > depth:
                yield placed.popleft()
        yield from placed
    finally:
        if isinstance(batches, Generator):
            batches.close()
