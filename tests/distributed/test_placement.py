"""Batches placed on a mesh of 8 simulated devices, and on two processes."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import finish, free_port

from cxrjax.data import Batch
from cxrjax.distributed.placement import prefetch_to_device, process_shard, put_batch


def host_batch(rows=8, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        image=rng.integers(0, 256, (rows, 16, 16, 1), np.uint8),
        label=rng.integers(0, 2, (rows, 3)).astype(np.float32),
        label_mask=rng.integers(0, 2, (rows, 3)).astype(bool),
        example_mask=np.ones(rows, bool),
        record=np.arange(rows, dtype=np.int32) + 100 * seed,
    )


def shardings(data, space) -> Batch:
    mesh = Mesh(np.array(jax.devices()[: data * space]).reshape(data, space), ("data", "space"))
    rows = NamedSharding(mesh, P("data"))
    return Batch(NamedSharding(mesh, P("data", "space")), rows, rows, rows, rows)


@pytest.mark.parametrize(("data", "space"), [(8, 1), (4, 2), (2, 4), (1, 8), (1, 1), (2, 1)])
def test_every_device_gets_its_images_and_their_rows(data, space):
    batch, layout = host_batch(), shardings(data, space)
    placed = put_batch(batch, layout)
    assert isinstance(placed, Batch)
    for array, original, sharding in zip(placed, batch, layout, strict=True):
        assert isinstance(array, jax.Array)
        assert array.sharding == sharding
        assert array.dtype == original.dtype
        np.testing.assert_array_equal(array, original)
    grid = np.array(jax.devices()[: data * space]).reshape(data, space)
    for shard in placed.image.addressable_shards:
        [(i, j)] = np.argwhere(grid == shard.device)
        b, h = 8 // data, 16 // space
        np.testing.assert_array_equal(shard.data, batch.image[i * b : (i + 1) * b, j * h : (j + 1) * h])


def test_a_single_process_loads_whole_batches():
    assert process_shard(shardings(4, 2).example_mask) == (0, 1)


class CountingStream:
    """Counts the batches taken from a stream."""

    def __init__(self, count, fail_at=None):
        self.taken, self.closed = 0, False
        self.stream = self._stream(count, fail_at)

    def _stream(self, count, fail_at):
        try:
            for k in range(count):
                if k == fail_at:
                    raise RuntimeError("a bad record")
                self.taken += 1
                yield host_batch(seed=k)
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_depth_batches_are_prefetched(depth):
    source, layout = CountingStream(9), shardings(4, 2)
    taken = []
    for k, batch in enumerate(prefetch_to_device(source.stream, lambda b: put_batch(b, layout), depth)):
        assert batch.record[0] == 100 * k
        taken.append(source.taken)
    assert taken == [min(k + 1 + depth, 9) for k in range(9)]
    assert source.closed


def test_closing_closes_the_source():
    source = CountingStream(9)
    batches = prefetch_to_device(source.stream, lambda b: b)
    next(batches)
    assert not source.closed
    batches.close()
    assert source.closed


def test_an_error_of_the_source_is_raised():
    source = CountingStream(9, fail_at=4)
    batches = prefetch_to_device(source.stream, lambda b: b, depth=2)
    with pytest.raises(RuntimeError, match="a bad record"):
        list(batches)
    assert source.closed


PROCESS = """
import sys

import jax
import numpy as np

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cxrjax.data import Batch
from cxrjax.distributed.placement import process_shard, put_batch

whole = Batch(
    image=np.random.default_rng(0).integers(0, 256, (8, 16, 4, 1), np.uint8),
    label=np.arange(24, dtype=np.float32).reshape(8, 3),
    label_mask=np.ones((8, 3), bool),
    example_mask=np.ones(8, bool),
    record=np.arange(8, dtype=np.int32),
)
assert jax.device_count() == 8 and jax.local_device_count() == 4
for data, shards in ((8, 2), (4, 2), (2, 2), (1, 1)):
    mesh = Mesh(np.array(jax.devices()).reshape(data, 8 // data), ("data", "space"))
    rows = NamedSharding(mesh, P("data"))
    shard, count = process_shard(rows)
    assert (shard, count) == (jax.process_index() if shards == 2 else 0, shards), (data, shard, count)
    size = 8 // count
    local = Batch(*(field[shard * size : (shard + 1) * size] for field in whole))
    placed = put_batch(local, Batch(NamedSharding(mesh, P("data", "space")), rows, rows, rows, rows))
    for array, original in zip(placed, whole, strict=True):
        assert array.shape == original.shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, original[shard.index])
"""


def test_two_processes_place_their_shards_of_one_batch():
    port = str(free_port())
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(process)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    for code, errors in finish(processes, timeout=120):
        assert code == 0, errors
