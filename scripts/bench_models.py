"""Measures the training step of each network, one JSON line per case; on any device JAX finds.

python scripts/bench_models.py --cases densenet121:224:4 resnet50:64:2
python scripts/bench_models.py --cases hrnet_w18:1024:8 --dtypes float32 bfloat16 --remats none layer

A case is architecture:size:batch. The step is the one that `cxrjax train` runs: images as bytes on the device, 14
findings, Adam. Each case has a process of its own, so that nothing is warm and the peak of memory is its own.

  trace_s, lower_s, compile_s   once; no compilation cache
  first_step_s                  the first call after that
  step_s, images_per_s          median over --steps calls, each waited for
  step_cpu_s                    median CPU time of all threads over a step: what to compare on a busy machine
  dispatch_ms, dispatch_cpu_ms  median time until such a call returns, while the device works on; on the clock, and of
                                the calling thread alone
  compiled_bytes                arguments, results and temporaries of the compiled step
  peak_bytes                    what the device says it held at most; null where it does not say (CPUs)
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

FINDINGS = 14


def measure(name: str, size: int, batch: int, dtype: str, remat: str, steps: int) -> dict[str, Any]:
    """One case, in this process, on its first device."""
    import jax
    import numpy as np
    import optax

    from cxrjax import config as configs
    from cxrjax.data.batch import Batch
    from cxrjax.data.placement import place
    from cxrjax.models import create
    from cxrjax.models.network import Network
    from cxrjax.parallel.mesh import batch_shardings, make_mesh, replicated
    from cxrjax.train.optimizer import make_optimizer
    from cxrjax.train.state import TrainState
    from cxrjax.train.step import make_train_step

    jax.config.update("jax_enable_compilation_cache", False)
    rng = np.random.default_rng(0)
    host = Batch(
        image=rng.integers(0, 256, (batch, size, size, 1), np.uint8),
        label=(rng.random((batch, FINDINGS)) < 0.1).astype(np.float32),
        known=np.ones((batch, FINDINGS), bool),
        valid=np.ones(batch, bool),
        record=np.arange(batch, dtype=np.int32),
    )
    mesh = make_mesh(1, 1)
    config = configs.default().optimizer
    config.name, config.clip = "adam", 0
    optimizer = make_optimizer(config)
    network = Network.of(create(name, classes=FINDINGS, dtype=dtype, remat=remat))
    state = jax.device_put(TrainState.create(network, optimizer, 0), replicated(mesh))
    placed = place(host, batch_shardings(mesh))
    step: Any = make_train_step(network, optimizer, optax.constant_schedule(1e-4), mesh)

    moments = [time.perf_counter()]
    traced = step.trace(state, placed)
    moments.append(time.perf_counter())
    lowered = traced.lower()
    moments.append(time.perf_counter())
    compiled = lowered.compile()
    moments.append(time.perf_counter())
    state, metrics = jax.block_until_ready(step(state, placed))
    moments.append(time.perf_counter())

    times = []
    for _ in range(steps + 2):
        start = time.perf_counter(), time.process_time(), time.thread_time()
        state, metrics = step(state, placed)
        returned = time.perf_counter() - start[0], time.thread_time() - start[2]
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1], *returned))
    step_s, step_cpu_s, dispatch, dispatch_cpu = map(statistics.median, zip(*times[2:], strict=True))
    memory, device = compiled.memory_analysis(), jax.devices()[0]
    names = ("trace_s", "lower_s", "compile_s", "first_step_s")
    return {
        **{name: round(after - before, 2) for name, before, after in zip(names, moments, moments[1:], strict=False)},
        "step_s": round(step_s, 4),
        "images_per_s": round(batch / step_s, 2),
        "step_cpu_s": round(step_cpu_s, 4),
        "dispatch_ms": round(1e3 * dispatch, 2),
        "dispatch_cpu_ms": round(1e3 * dispatch_cpu, 2),
        "compiled_bytes": memory
        and memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "loss": float(metrics["loss"]),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    """Prints one line per case, type and way of recomputing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", required=True, metavar="NAME:SIZE:BATCH")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16, float64")
    parser.add_argument("--remats", nargs="+", default=["none"], help="none, layer")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()

    for case in options.cases:
        for dtype in options.dtypes:
            for remat in options.remats:
                name, size, batch = case.split(":")
                if options.here:
                    row = {"network": name, "size": int(size), "batch": int(batch), "dtype": dtype, "remat": remat}
                    print(json.dumps(row | measure(**_case(row), steps=options.steps)), flush=True)
                else:
                    words = ["--cases", case, "--dtypes", dtype, "--remats", remat, "--steps", str(options.steps)]
                    subprocess.run([sys.executable, __file__, *words, "--here"], check=False)


def _case(row: dict[str, Any]) -> dict[str, Any]:
    return {"name": row["network"], **{key: row[key] for key in ("size", "batch", "dtype", "remat")}}


if __name__ == "__main__":
    main()
