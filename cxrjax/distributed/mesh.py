"""The `data` x `space` mesh: batches are split over `data`, the rows of each image over `space`."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cxrjax.data import Batch
from cxrjax.distributed import runtime
from cxrjax.errors import CxrError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def make_mesh(data: int = 0, space: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with the axes `data` and `space`.

    Args:
      data: number of devices over which a batch is split; 0 uses all devices that `space` leaves.
      space: number of devices over which the rows of an image are split.
      devices: devices to use; default `runtime.devices()`.

    Raises:
      CxrError: the devices do not fit this shape; the message names shapes that do.
    """
    all_devices = devices is None
    devices = runtime.devices() if devices is None else devices
    if space < 1 or (data or 1) < 1:
        raise CxrError(f"config keys mesh.data = {data} and mesh.space = {space} must be positive (mesh.data may be 0)")
    if not data and len(devices) % space:
        raise CxrError(
            f"config key mesh.space = {space} does not divide the {len(devices)} devices: choose "
            f"{_join_choices(n for n in range(1, len(devices) + 1) if len(devices) % n == 0)}, or set mesh.data as well"
        )
    data = data or len(devices) // space
    if data * space > len(devices):
        largest = len(devices) // space
        nearest = f"mesh.data = {largest}" if largest else f"mesh.data = 1, mesh.space = {len(devices)}"
        raise CxrError(
            f"a mesh of {data} x {space} devices (config keys mesh.data, mesh.space) needs {data * space} devices, but "
            f"there are {len(devices)}: the nearest that works is {nearest}"
        )
    grid = np.asarray(devices[: data * space]).reshape(data, space)
    if all_devices:
        _check_process_shards(grid, devices)
    return Mesh(grid, ("data", "space"))


def _check_process_shards(grid: np.ndarray, devices: Sequence[Any]) -> None:
    """Check that every process loads a batch shard of the same size, which it may share with others."""
    processes = {device.process_index for device in devices}
    if _has_equal_shards(grid, processes):
        return
    count = len(devices)
    choices = [
        f"{data} x {count // data}"
        for data in range(count, 0, -1)
        if count % data == 0 and _has_equal_shards(np.asarray(devices).reshape(data, -1), processes)
    ]
    raise CxrError(
        f"a mesh of {grid.shape[0]} x {grid.shape[1]} devices (config keys mesh.data, mesh.space) does not give each "
        f"of the {len(processes)} processes the same share of a batch: of {count} devices, what works is "
        f"{_join_choices(choices)}"
    )


def _has_equal_shards(grid: np.ndarray, processes: set[int]) -> bool:
    held: dict[int, set[int]] = {}
    for (row, _), device in np.ndenumerate(grid):
        held.setdefault(device.process_index, set()).add(row)
    shards = {frozenset(rows) for rows in held.values()}
    disjoint = sum(map(len, shards)) == len(grid)
    return held.keys() == processes and disjoint and len({len(rows) for rows in shards}) == 1


def parse_mesh(text: str) -> tuple[int, int]:
    """Parse `data=D,space=S` into (D, S); an axis that is left out is 1.

    Raises:
      CxrError: the text has another form.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"(data|space)=([1-9][0-9]*)", item.strip())
        if match is None:
            raise CxrError(f"--mesh {text}: {item.strip()!r} is not data=D or space=S with a positive number")
        if match[1] in sizes:
            raise CxrError(f"--mesh {text} has {match[1]} twice: give it once")
        sizes[match[1]] = int(match[2])
    return sizes.get("data", 1), sizes.get("space", 1)


def _join_choices(choices: Iterable[Any]) -> str:
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def check_divides(what: str, number: int, axis: str, parts: int, alternative: str = "") -> None:
    """Check that an axis of the mesh divides a number of rows or images.

    Args:
      what: the number with its unit, for the error: "a batch of 4 images".
      number: the number of rows or images.
      axis: "data" or "space".
      parts: number of devices on that axis.
      alternative: another fix, appended to the error.

    Raises:
      CxrError: it does not divide the number; the message names the nearest multiples.
    """
    if number % parts or not number:
        below = number // parts * parts
        choices = _join_choices(n for n in (below, below + parts) if n)
        raise CxrError(f"{what} cannot be divided over mesh {axis}={parts}: choose {choices}{alternative}")


def suggest_space(rows: int, space: int) -> str:
    """Return the values of mesh.space, nearest to `space`, that divide `rows`: an `alternative` of `check_divides`."""
    below, above = (
        next((n for n in numbers if rows % n == 0), 0) for numbers in (range(space - 1, 0, -1), range(space, rows + 1))
    )
    return f", or set mesh.space to {_join_choices(n for n in (below, above) if n)}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole: parameters, statistics, optimizer state."""
    return NamedSharding(mesh, P())


def batch_shardings(mesh: Mesh) -> Any:
    """Return a `Batch` of shardings: images are split over both axes, all other fields over `data`."""
    image: Any = NamedSharding(mesh, P("data", "space"))
    rows: Any = NamedSharding(mesh, P("data"))
    return Batch(image=image, label=rows, label_mask=rows, example_mask=rows, record=rows)


def with_mesh(mesh: Mesh, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap a function, to be jitted, so that its layers constrain their maps to the mesh (`models.spatial`)."""

    @wraps(function)
    def on_mesh(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh
