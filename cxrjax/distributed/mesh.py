"""The `data` x `space` mesh: batches are split over `data`, the rows of each image over `space`."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cxrjax.data.records import Batch
from cxrjax.distributed import runtime
from cxrjax.errors import CxrError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def make_mesh(data: int = 0, space: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `data` and `space`.

    Args:
      data: devices that share a batch; 0: as many as `space` leaves.
      space: devices that share the rows of an image.
      devices: the devices to use; default `runtime.devices()`.

    Raises:
      CxrError: the devices cannot be laid out so.
    """
    ours = devices is None
    devices = runtime.devices() if devices is None else devices
    if space < 1 or (data or 1) < 1:
        raise CxrError(f"config keys mesh.data = {data} and mesh.space = {space} must be positive (mesh.data may be 0)")
    if not data and len(devices) % space:
        raise CxrError(
            f"config key mesh.space = {space} does not divide the {len(devices)} devices: choose "
            f"{_listed(n for n in range(1, len(devices) + 1) if len(devices) % n == 0)}, or set mesh.data as well"
        )
    data = data or len(devices) // space
    if data * space > len(devices):
        fits = len(devices) // space
        nearest = f"mesh.data = {fits}" if fits else f"mesh.data = 1, mesh.space = {len(devices)}"
        raise CxrError(
            f"a mesh of {data} x {space} devices (config keys mesh.data, mesh.space) needs {data * space}, and there "
            f"are {len(devices)}: the nearest that works is {nearest}"
        )
    laid_out = np.asarray(devices[: data * space]).reshape(data, space)
    if ours:
        _check_shares(laid_out, devices)
    return Mesh(laid_out, ("data", "space"))


def _check_shares(laid_out: np.ndarray, devices: Sequence[Any]) -> None:
    """Check that all processes load as much of each batch: whole parts of it, alone or shared."""
    processes = {device.process_index for device in devices}
    data, space = laid_out.shape
    if _shared_evenly(laid_out, processes):
        return
    choices = []
    for rows in (n for n in range(len(devices), 0, -1) if len(devices) % n == 0):
        if _shared_evenly(np.asarray(devices).reshape(rows, -1), processes):
            choices.append(f"{rows} x {len(devices) // rows}")
    raise CxrError(
        f"a mesh of {data} x {space} devices (config keys mesh.data, mesh.space) does not give each of the "
        f"{len(processes)} processes the same share of a batch: there are {len(devices)} devices, and what works is "
        f"{_listed(choices)}"
    )


def _shared_evenly(laid_out: np.ndarray, processes: set[int]) -> bool:
    held: dict[int, set[int]] = {}
    for (row, _), device in np.ndenumerate(laid_out):
        held.setdefault(device.process_index, set()).add(row)
    shares = {frozenset(rows) for rows in held.values()}
    apart = sum(map(len, shares)) == len(laid_out)
    return held.keys() == processes and apart and len({len(rows) for rows in shares}) == 1


def parse_mesh(text: str) -> tuple[int, int]:
    """`data=D,space=S` as (D, S); what is left out is 1.

    Raises:
      CxrError: it is not written so.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        matched = re.fullmatch(r"(data|space)=([1-9][0-9]*)", part.strip())
        if matched is None:
            raise CxrError(f"--mesh {text}: {part.strip()!r} is not data=D or space=S with a positive number")
        if matched[1] in found:
            raise CxrError(f"--mesh {text} says {matched[1]} twice: say it once")
        found[matched[1]] = int(matched[2])
    return found.get("data", 1), found.get("space", 1)


def _listed(numbers: Iterable[Any]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_divides(what: str, number: int, axis: str, parts: int, otherwise: str = "") -> None:
    """Check that an axis of the mesh divides a number of rows or images.

    Args:
      what: the number with what it counts, for the error: "a batch of 4 images".
      number: that number.
      axis: "data" or "space".
      parts: how many devices that axis has.
      otherwise: what else would mend it.

    Raises:
      CxrError: it does not; the multiples around the number are named.
    """
    if number % parts or not number:
        below = number // parts * parts
        choices = _listed(n for n in (below, below + parts) if n)
        raise CxrError(f"{what} cannot be divided over mesh {axis}={parts}: choose {choices}{otherwise}")


def instead_of_rows(rows: int, space: int) -> str:
    """The parts, nearest to `space`, into which rows can be divided; for `check_divides`."""
    below, above = (
        next((n for n in numbers if rows % n == 0), 0) for numbers in (range(space - 1, 0, -1), range(space, rows + 1))
    )
    return f", or set mesh.space to {_listed(n for n in (below, above) if n)}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole: parameters, statistics, optimiser."""
    return NamedSharding(mesh, P())


def batch_shardings(mesh: Mesh) -> Any:
    """A `Batch` of shardings, where each field lies: images over both axes, the rest over `data`."""
    image: Any = NamedSharding(mesh, P("data", "space"))
    rows: Any = NamedSharding(mesh, P("data"))
    return Batch(image=image, label=rows, label_mask=rows, example_mask=rows, record=rows)


def with_mesh(mesh: Mesh, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function to be jitted for the mesh, whose layers lay their maps out on it (`models.rows`)."""

    @wraps(function)
    def on_mesh(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh
