"""How fast are training and inference here? One process a case, so that nothing is warm and the peak is its own.

`python -m cxrjax.planning.benchmark CASE ...` does the same with JAX, Flax, optax and this package's source alone.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from cxrjax.errors import CxrError

if TYPE_CHECKING:  # it is not needed to measure a case
    from cxrjax.config import Config

FINDINGS = 14
WARM_UP = 3
READY = "ready"
"""What a case's process prints when it has compiled, where it measures in turn."""
_ONE, _IN_TURN = "--one", "--in-turn"  # one case, in this process; not before it gets a line


@dataclass(frozen=True)
class Case:
    """What is measured, in one process: a training step (forward, backward, Adam) or inference of one batch.

    Attributes:
      arch: a network's name.
      resolution: side of the images in px.
      batch: images at once, over all devices.
      dtype: what it computes in.
      remat: what the backward pass recomputes; nothing in inference.
      inference: whether it is inference.
      steps: that the medians are of.
      data: devices that share the batch; 0: all that there are, but for `space`.
      space: devices that share the rows of an image.
      options: of the network.
    """

    arch: str
    resolution: int
    batch: int
    dtype: str = "bfloat16"
    remat: str = "none"
    inference: bool = False
    steps: int = 10
    data: int = 1
    space: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise CxrError(f"--steps {self.steps}: there is no median of no step")

    @classmethod
    def of(cls, config: "Config", steps: int) -> "Case":
        """The training step of a recipe, on its mesh, with as many images as pass at once.

        Raises:
          CxrError: it does not say how many these are.
        """
        model, train, mesh = config.model, config.train, config.mesh
        if train.per_device and not mesh.data:
            raise CxrError("config key train.per_device needs mesh.data here: say how many devices share the batch")
        batch = train.per_device * mesh.data or train.batch
        return cls(
            model.name, config.data.size, batch, model.dtype, model.remat, steps=steps, data=mesh.data,
            space=mesh.space, options=model.options.to_dict(),
        )  # fmt: skip


def cases(
    words: Sequence[str], dtypes: Sequence[str] | None, remats: Sequence[str] | None, steps: int, mesh: str = ""
) -> list[Case]:
    """One training case for each ARCH:SIZE:BATCH, type (default bfloat16) and way of recomputing (default none).

    `mesh` is data=D,space=S, one device by default.

    Raises:
      CxrError: a word is no such case, or its network not known; types, ways or a mesh, and no case to take them.
    """
    if not words and (dtypes or remats or mesh):
        raise CxrError("--dtypes, --remats and --mesh are for ARCH:SIZE:BATCH; of --config change its keys instead")
    from cxrjax.distributed.mesh import parse_mesh
    from cxrjax.errors import check_choice
    from cxrjax.models.registry import ARCHITECTURES

    made, shape = [], parse_mesh(mesh) if mesh else (1, 1)
    for word, dtype, remat in product(words, dtypes or ["bfloat16"], remats or ["none"]):
        matched = re.fullmatch(r"(\w+):([1-9]\d*):([1-9]\d*)", word)
        if matched is None:
            raise CxrError(f"{word!r} is no case: write ARCH:SIZE:BATCH, such as densenet121:1024:8")
        check_choice("network", matched[1], ARCHITECTURES)
        made.append(Case(matched[1], int(matched[2]), int(matched[3]), dtype, remat, False, steps, *shape))
    return made


def rows(wanted: Sequence[Case], *, inference: bool = True) -> Iterator[dict[str, Any]]:
    """The measurements of each case, training and inference side by side.

    What went wrong is its `error`, or `infer_error` where that was inference alone. The values have the names of the
    peer's benchmark: `train_s`, `train_images_per_s`, `train_peak_bytes`, `infer_s` and so on, medians over the steps.
    Beside them:

      trace_s, lower_s, compile_s, first_step_s   once; no cache, unless JAX_COMPILATION_CACHE_DIR is set
      train_steady_images_per_s       of steps one after the other without waiting, as training does them
      train_cpu_s                     median CPU time of all threads: what to compare on a busy machine
      train_dispatch_ms               median time until the call returns, while the device works on
      train_planned_bytes             arguments, results and temporaries, as the compiler counts them
      train_peak_bytes                what a device held at most; null where it does not say (CPUs)
      train_floor_s, train_roofline   least time by the chip's data sheet, and its share of train_s; null if unknown
    """
    for case in wanted:
        about = {"arch": case.arch, "resolution": case.resolution, "batch": case.batch,
                 "variant": f"{case.dtype}, remat {case.remat}", "data": case.data, "space": case.space}  # fmt: skip
        row = about | _apart(case)
        if inference and "error" not in row:
            inferred = _apart(Case(**(asdict(case) | {"inference": True, "remat": "none"})))
            row |= {f"infer_{name}" if name == "error" else name: value for name, value in inferred.items()}
        yield row


def _apart(case: Case) -> dict[str, Any]:
    """One measurement, by a process of its own."""
    made = subprocess.run(command(case), capture_output=True, text=True, check=False)
    return found(made.returncode, made.stdout, made.stderr)


def command(case: Case, *, in_turn: bool = False) -> list[str]:
    """What measures a case in a process of its own; `in_turn`: it prints `READY` once compiled, and waits for a line.

    So several can compile at once and still have the device for themselves when they are timed.
    """
    return [
        sys.executable, "-m", "cxrjax.planning.benchmark", _ONE, json.dumps(asdict(case)),
        *([_IN_TURN] if in_turn else []),
    ]  # fmt: skip


def found(code: int, printed: str, errors: str) -> dict[str, Any]:
    """The measurement that such a process printed, or its `error`."""
    lines = printed.splitlines()
    if code == 0 and lines:
        return json.loads(lines[-1])
    if "RESOURCE_EXHAUSTED" in errors:
        return {"error": "out of memory"}
    raised = re.findall(r"^[\w.]+(?:Error|Exception): .*", errors, re.MULTILINE)
    reason = raised[-1].removeprefix(f"{CxrError.__module__}.CxrError: ") if raised else ""
    return {"error": reason[:1000] or f"its process ended with code {code}"}


def failures(measured: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What could not be measured, and why."""
    return {
        f"{row['arch']} at {row['resolution']} px, {row['batch']} images, {row['variant']}{what}": row[key]
        for row in measured
        for key, what in (("error", ""), ("infer_error", ", inference"))
        if key in row
    }


def table(measured: Sequence[dict[str, Any]]) -> Any:
    """A line for each case that could be measured: what a user compares; gigabytes are 1e9 bytes."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in (
        "network",
        "px",
        "images",
        "",
        "step, ms",
        "images/s",
        "peak, GB",
        "roofline",
        "inference, images/s",
    ):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in measured:
        if "error" in row:
            continue
        about = (row["arch"], f"{row['resolution']}", f"{row['batch']}", row["variant"])
        peak, share, inferred = (row.get(k) for k in ("train_peak_bytes", "train_roofline", "infer_images_per_s"))
        made.add_row(
            *about, f"{1e3 * row['train_s']:.1f}", f"{row['train_images_per_s']:.1f}",
            f"{peak / 1e9:.2f}" if peak else f"{row['train_planned_bytes'] / 1e9:.2f} planned",
            f"{share:.0%}" if share else "", f"{inferred:.1f}" if inferred else "",
        )  # fmt: skip
    return made


def measure(case: Case, turn: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """One case, in this process, on its first device; `turn` is called when all is compiled, before it is timed."""
    import jax
    import numpy as np
    import optax

    from cxrjax.data.records import Batch
    from cxrjax.distributed.mesh import batch_shardings, check_divides, make_mesh, replicated
    from cxrjax.distributed.placement import put_batch
    from cxrjax.models import create
    from cxrjax.models.network import Network
    from cxrjax.train.flat_params import pack_for
    from cxrjax.train.optimizer import as_one_vector
    from cxrjax.train.state import TrainState
    from cxrjax.train.step import make_predict_step, make_train_step

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_enable_compilation_cache", False)
    rng = np.random.default_rng(0)
    count, side = case.batch, case.resolution
    host = Batch(
        image=rng.integers(0, 256, (count, side, side, 1), np.uint8),
        label=(rng.random((count, FINDINGS)) < 0.1).astype(np.float32),
        label_mask=np.ones((count, FINDINGS), bool),
        example_mask=np.ones(count, bool),
        record=np.arange(count, dtype=np.int32),
    )
    mesh = make_mesh(case.data, case.space)
    check_divides(f"a batch of {count} images", count, "data", mesh.shape["data"])
    check_divides(f"{side} rows", side, "space", case.space)
    placed = put_batch(host, batch_shardings(mesh))
    network = Network.from_model(create(case.arch, classes=FINDINGS, dtype=case.dtype, remat=case.remat, **case.options))
    if case.inference:
        arguments = pack_for(jax.device_put(network, replicated(mesh)), mesh), placed.image
        return _timed(case, make_predict_step(mesh), arguments, lambda _: arguments, mesh.devices, turn)
    optimizer = as_one_vector(optax.scale_by_adam())
    state = jax.device_put(TrainState.create(network, optimizer, 0), replicated(mesh))
    step = make_train_step(network, optimizer, optax.constant_schedule(1e-4), mesh)
    return _timed(case, step, (pack_for(state, mesh), placed), lambda result: (result[0], placed), mesh.devices, turn)


def _timed(
    case: Case,
    step: Any,
    arguments: tuple,
    following: Callable[[Any], tuple],
    devices: Any,
    turn: Callable[[], object],
) -> dict[str, Any]:
    """Compile a jitted step and time it; `following` makes the next call's arguments of a result."""
    import jax

    moments = [time.perf_counter()]
    traced = step.trace(*arguments)
    moments.append(time.perf_counter())
    lowered = traced.lower()
    moments.append(time.perf_counter())
    compiled = lowered.compile()
    moments.append(time.perf_counter())
    once: dict[str, float] = dict(zip(("trace_s", "lower_s", "compile_s"),
                    (round(after - before, 2) for before, after in pairwise(moments)),
                    strict=True))  # fmt: skip
    turn()
    start = time.perf_counter()
    result = jax.block_until_ready(step(*arguments))
    once["first_step_s"] = round(time.perf_counter() - start, 2)

    times = []
    for _ in range(case.steps + WARM_UP):
        arguments = following(result)
        start = time.perf_counter(), time.process_time()
        result = step(*arguments)
        returned = time.perf_counter() - start[0]
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1], returned))
    seconds, cpu, dispatch = map(statistics.median, zip(*times[WARM_UP:], strict=True))
    start = time.perf_counter()
    for _ in range(case.steps):
        result = step(*following(result))
    jax.block_until_ready(result)
    steady = (time.perf_counter() - start) / case.steps

    device = devices.flat[0]
    floor = _floor(traced.jaxpr.jaxpr, compiled, device.device_kind, devices.size)
    peaks = [(each.memory_stats() or {}).get("peak_bytes_in_use") for each in devices.flat]
    what = "infer" if case.inference else "train"
    found: dict[str, Any] = {
        "s": seconds,
        "images_per_s": case.batch / seconds,
        "steady_images_per_s": case.batch / steady,
        "peak_bytes": max((peak for peak in peaks if peak), default=None),
        "cpu_s": cpu,
        "dispatch_ms": 1e3 * dispatch,
        "planned_bytes": _planned(compiled, device.platform),
        "floor_s": floor,
        "roofline": floor and floor / seconds,
    }
    same = {"framework": f"cxrjax, jax {jax.__version__}", "device": device.device_kind}
    if not case.inference:
        same |= once | {"loss": float(result[1]["loss"])}
    return same | {f"{what}_{name}": value for name, value in found.items()}


def _planned(compiled: Any, platform: str) -> int | None:
    from cxrjax.planning.compiled_memory import held_and_temporary

    memory = compiled.memory_analysis()
    return None if memory is None else sum(held_and_temporary(memory, tpu=platform == "tpu"))


def _floor(jaxpr: Any, compiled: Any, kind: str, devices: int) -> float | None:
    """Least seconds that chips of this kind need: for their arithmetic or for moving bytes through their memory.

    Recomputed products count as arithmetic, as they are done.
    """
    from cxrjax.planning.accelerators import target_of
    from cxrjax.planning.compiled_memory import moved
    from cxrjax.planning.model_summary import multiply_adds

    target = target_of(kind)
    if target is None:
        return None
    return max(2 * multiply_adds(jaxpr) / devices / target.flops, moved(compiled) / target.bandwidth)


def main() -> None:
    """Prints one JSON line a case."""
    if sys.argv[1:2] == [_ONE]:
        turn = _wait if _IN_TURN in sys.argv else lambda: None
        print(json.dumps(measure(Case(**json.loads(sys.argv[2])), turn)), flush=True)
        return
    parser = argparse.ArgumentParser(prog="python -m cxrjax.planning.benchmark", description=__doc__)
    add_arguments(parser)
    given = parser.parse_args()
    wanted = cases(given.cases, given.dtypes, given.remats, given.steps, given.mesh)
    for row in rows(wanted, inference=given.inference):
        print(json.dumps(row), flush=True)


def _wait() -> None:
    print(READY, flush=True)
    sys.stdin.readline()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `bench` takes."""
    parser.add_argument("cases", nargs="*", metavar="ARCH:SIZE:BATCH", help="such as densenet121:1024:8")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), help="(default: bfloat16)")
    parser.add_argument(
        "--remats", nargs="+", choices=("none", "layer", "block", "full"),
        help="what the backward pass recomputes (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--mesh",
        default="",
        metavar="data=D,space=S",
        help="devices that share the batch, and an image's rows (default: one device)",
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="medians are over N steps (default: 10)")
    parser.add_argument(
        "--no-inference", dest="inference", action="store_false", help="measure training steps alone"
    )  # fmt: skip


if __name__ == "__main__":
    main()
