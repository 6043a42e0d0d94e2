"""Speed and memory of training and inference on this machine, one process per measurement.

Each case runs in a separate process: it starts cold, and its peak memory is its own. `python -m
cxrjax.planning.benchmark CASE` runs one case, given as JSON; it only needs JAX, Flax, optax, rich and this package.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from cxrjax.errors import CxrError

if TYPE_CHECKING:  # its packages are not needed to measure a case
    from cxrjax.config import Config

FINDINGS = 14
WARMUP_STEPS = 3
READY = "ready"
"""Printed by the process of a case once it has compiled, if it waits for its turn."""
_WAIT = "--wait"


@dataclass(frozen=True)
class Case:
    """One measurement: a training step (forward, backward, Adam) or the inference of one batch.

    Attributes:
      arch: name of the network.
      resolution: image side in px.
      batch: batch size over all devices.
      dtype: compute type.
      remat: what the backward pass recomputes; unused in inference.
      inference: whether to measure inference.
      steps: number of steps that medians are taken over.
      data: devices that share the batch; 0: all devices, divided by `space`.
      space: devices that share the rows of an image.
      options: options of the network.
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
            raise CxrError(f"--steps {self.steps}: must be at least 1")

    @classmethod
    def from_config(cls, config: "Config", steps: int) -> "Case":
        """Return the training step of a config on its mesh, for one microbatch.

        Raises:
          CxrError: the config leaves the size of the microbatch open.
        """
        model, train, mesh = config.model, config.train, config.mesh
        if train.per_device_batch_size and not mesh.data:
            raise CxrError(
                "config key train.per_device_batch_size needs mesh.data here: set the number of devices per batch"
            )
        batch = train.per_device_batch_size * mesh.data or train.batch_size
        return cls(
            model.name, config.data.image_size, batch, model.dtype, model.remat, steps=steps, data=mesh.data,
            space=mesh.space, options=model.options.to_dict(),
        )  # fmt: skip


def parse_cases(
    specs: Sequence[str], dtypes: Sequence[str] | None = None, remats: Sequence[str] | None = None, *, steps: int = 10,
    mesh: str = "",
) -> list[Case]:  # fmt: skip
    """Return a training case for every combination of ARCH:SIZE:BATCH, dtype and remat.

    Args:
      specs: networks, image sides and batch sizes as ARCH:SIZE:BATCH.
      dtypes: compute types; default bfloat16.
      remats: rematerialisation policies; default none.
      steps: see `Case`.
      mesh: `data=D,space=S`; empty: one device.

    Raises:
      CxrError: a malformed spec, an unknown network, or options without a spec.
    """
    if not specs and (dtypes or remats or mesh):
        raise CxrError("--dtypes, --remats and --mesh apply to ARCH:SIZE:BATCH; with --config override its keys")
    from cxrjax.distributed.mesh import parse_mesh
    from cxrjax.errors import check_choice
    from cxrjax.models import ARCHITECTURES

    cases = []
    data, space = parse_mesh(mesh) if mesh else (1, 1)
    for spec, dtype, remat in product(specs, dtypes or ["bfloat16"], remats or ["none"]):
        match = re.fullmatch(r"(\w+):([1-9]\d*):([1-9]\d*)", spec)
        if match is None:
            raise CxrError(f"{spec!r} is not ARCH:SIZE:BATCH, such as densenet121:1024:8")
        arch = check_choice("network", match[1], ARCHITECTURES)
        cases.append(Case(arch, int(match[2]), int(match[3]), dtype, remat, False, steps, data, space))
    return cases


def run_cases(cases: Sequence[Case], *, inference: bool = True) -> Iterator[dict[str, Any]]:
    """Yield a row for each training case, followed by inference of the same batch.

    A failure is the row's `error`, or `infer_error` if only inference failed. Values are medians over the steps:
    `train_s`, `train_images_per_s`, `infer_s` and so on, with the names of `scripts/bench_torch.py`, and:

      trace_s, lower_s, compile_s, first_step_s   measured once, without a compilation cache unless
                                      JAX_COMPILATION_CACHE_DIR is set
      train_steady_images_per_s       of consecutive steps without waiting in between, as in training
      train_cpu_s                     CPU time of all threads, which is comparable on a busy machine
      train_dispatch_ms               time until the call returns, while the device computes
      train_planned_bytes             arguments, results and temporaries according to the compiler
      train_peak_bytes                peak memory of a device; null if it is not reported (CPUs)
      train_floor_s, train_roofline   lower bound from the data sheet and its fraction of train_s; null if unknown
    """
    for case in cases:
        row = {
            "arch": case.arch, "resolution": case.resolution, "batch": case.batch,
            "variant": f"{case.dtype}, remat {case.remat}", "data": case.data, "space": case.space,
        }  # fmt: skip
        row |= _run_case(case)
        if inference and "error" not in row:
            measured = _run_case(replace(case, inference=True, remat="none"))
            row |= {f"infer_{name}" if name == "error" else name: value for name, value in measured.items()}
        yield row


def _run_case(case: Case) -> dict[str, Any]:
    process = subprocess.run(case_command(case), capture_output=True, text=True, check=False)
    return parse_output(process.returncode, process.stdout, process.stderr)


def case_command(case: Case, *, wait: bool = False) -> list[str]:
    """Return the command that measures a case.

    With `wait` it prints `READY` once compiled and waits for a line on standard input, so that several cases can
    compile at once and still be timed alone.
    """
    waiting = [_WAIT] if wait else []
    return [sys.executable, "-m", "cxrjax.planning.benchmark", json.dumps(asdict(case)), *waiting]


def parse_output(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """Return the measurement that the process of a case printed, or its `error`."""
    lines = stdout.splitlines()
    if code == 0 and lines:
        return json.loads(lines[-1])
    if "RESOURCE_EXHAUSTED" in stderr:
        return {"error": "out of memory"}
    raised = re.findall(r"^[\w.]+(?:Error|Exception): .*", stderr, re.MULTILINE)
    reason = raised[-1].removeprefix(f"{CxrError.__module__}.CxrError: ") if raised else ""
    return {"error": reason[:1000] or f"the process exited with code {code}"}


def failures(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the error of each measurement that failed."""
    return {
        f"{row['arch']} at {row['resolution']} px, {row['batch']} images, {row['variant']}{suffix}": row[key]
        for row in rows
        for key, suffix in (("error", ""), ("infer_error", ", inference"))
        if key in row
    }


def results_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Return a table with a line per successful case; GB are 1e9 bytes."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("network", "px", "images", "variant", "step, ms", "images/s", "peak, GB", "roofline",
                   "inference, images/s"):  # fmt: skip
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows:
        if "error" in row:
            continue
        peak, roofline, inference = (
            row.get(name) for name in ("train_peak_bytes", "train_roofline", "infer_images_per_s")
        )
        table.add_row(
            row["arch"], f"{row['resolution']}", f"{row['batch']}", row["variant"],
            f"{1e3 * row['train_s']:.1f}", f"{row['train_images_per_s']:.1f}",
            f"{peak / 1e9:.2f}" if peak else f"{row['train_planned_bytes'] / 1e9:.2f} planned",
            f"{roofline:.0%}" if roofline else "", f"{inference:.1f}" if inference else "",
        )  # fmt: skip
    return table


def measure(case: Case, before_timing: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure a case in this process; `before_timing` is called when everything is compiled."""
    import jax
    import numpy as np
    import optax

    from cxrjax.data import Batch
    from cxrjax.distributed.mesh import batch_shardings, check_divides, make_mesh, replicated
    from cxrjax.distributed.placement import put_batch
    from cxrjax.models import create
    from cxrjax.models.network import Network
    from cxrjax.train.optimizer import as_one_vector
    from cxrjax.train.state import TrainState, flatten_for_mesh
    from cxrjax.train.step import make_predict_step, make_train_step

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_enable_compilation_cache", False)
    rng = np.random.default_rng(0)
    images, side = case.batch, case.resolution
    batch = Batch(
        image=rng.integers(0, 256, (images, side, side, 1), np.uint8),
        label=(rng.random((images, FINDINGS)) < 0.1).astype(np.float32),
        label_mask=np.ones((images, FINDINGS), bool),
        example_mask=np.ones(images, bool),
        record=np.arange(images, dtype=np.int32),
    )
    mesh = make_mesh(case.data, case.space)
    check_divides(f"a batch of {images} images", images, "data", mesh.shape["data"])
    check_divides(f"{side} rows", side, "space", case.space)
    placed = put_batch(batch, batch_shardings(mesh))
    model = create(case.arch, classes=FINDINGS, dtype=case.dtype, remat=case.remat, **case.options)
    network = Network.from_model(model)
    if case.inference:
        arguments = flatten_for_mesh(jax.device_put(network, replicated(mesh)), mesh), placed.image
        return _time(case, make_predict_step(mesh), arguments, lambda _: arguments, mesh.devices, before_timing)
    optimizer = as_one_vector(optax.scale_by_adam())
    state = jax.device_put(TrainState.create(network, optimizer, 0), replicated(mesh))
    step = make_train_step(network, optimizer, optax.constant_schedule(1e-4), mesh)
    arguments = flatten_for_mesh(state, mesh), placed
    return _time(case, step, arguments, lambda result: (result[0], placed), mesh.devices, before_timing)


def _time(
    case: Case, step: Any, arguments: tuple, next_arguments: Callable[[Any], tuple], devices: Any,
    before_timing: Callable[[], object],
) -> dict[str, Any]:  # fmt: skip
    """Compile and time a jitted step; `next_arguments` returns those of the next call from the last result."""
    import jax

    clock = [time.perf_counter()]
    traced = step.trace(*arguments)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    durations = (round(end - start, 2) for start, end in pairwise(clock))
    once: dict[str, float] = dict(zip(("trace_s", "lower_s", "compile_s"), durations, strict=True))
    before_timing()
    start = time.perf_counter()
    result = jax.block_until_ready(step(*arguments))
    once["first_step_s"] = round(time.perf_counter() - start, 2)

    times = []
    for _ in range(case.steps + WARMUP_STEPS):
        arguments = next_arguments(result)
        start, cpu_start = time.perf_counter(), time.process_time()
        result = step(*arguments)
        dispatched = time.perf_counter() - start
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start, time.process_time() - cpu_start, dispatched))
    seconds, cpu, dispatch = map(statistics.median, zip(*times[WARMUP_STEPS:], strict=True))
    start = time.perf_counter()
    for _ in range(case.steps):
        result = step(*next_arguments(result))
    jax.block_until_ready(result)
    steady = (time.perf_counter() - start) / case.steps

    device = devices.flat[0]
    floor = _floor_seconds(traced.jaxpr.jaxpr, compiled, device.device_kind, devices.size)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices.flat]
    values: dict[str, Any] = {
        "s": seconds,
        "images_per_s": case.batch / seconds,
        "steady_images_per_s": case.batch / steady,
        "peak_bytes": max((peak for peak in peaks if peak), default=None),
        "cpu_s": cpu,
        "dispatch_ms": 1e3 * dispatch,
        "planned_bytes": _planned_bytes(compiled, device.platform),
        "floor_s": floor,
        "roofline": floor and floor / seconds,
    }
    row: dict[str, Any] = {"framework": f"cxrjax, jax {jax.__version__}", "device": device.device_kind}
    if not case.inference:
        row |= once | {"loss": float(result[1]["loss"])}
    prefix = "infer" if case.inference else "train"
    return row | {f"{prefix}_{name}": value for name, value in values.items()}


def _planned_bytes(compiled: Any, platform: str) -> int | None:
    from cxrjax.planning.compiled_memory import argument_and_temporary_bytes

    memory = compiled.memory_analysis()
    return None if memory is None else sum(argument_and_temporary_bytes(memory, tpu=platform == "tpu"))


def _floor_seconds(jaxpr: Any, compiled: Any, kind: str, devices: int) -> float | None:
    """Return the lower bound of the time for arithmetic, including recomputation, and for memory traffic."""
    from cxrjax.planning.accelerators import find_accelerator
    from cxrjax.planning.compiled_memory import bytes_accessed
    from cxrjax.planning.model_summary import multiply_adds

    accelerator = find_accelerator(kind)
    if accelerator is None:
        return None
    arithmetic = 2 * multiply_adds(jaxpr) / devices / accelerator.flops
    return max(arithmetic, bytes_accessed(compiled) / accelerator.bandwidth)


def _wait_for_turn() -> None:
    print(READY, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    case = Case(**json.loads(sys.argv[1]))
    print(json.dumps(measure(case, _wait_for_turn if _WAIT in sys.argv else lambda: None)), flush=True)
