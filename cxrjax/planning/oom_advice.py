"""Advice after an out-of-memory error: settings that need less memory, and a plan of each."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jax
from rich import box
from rich.table import Table

from cxrjax.config import Config, with_overrides
from cxrjax.console import log, progress_bar, stderr
from cxrjax.distributed.runtime import HEARTBEAT, is_distributed
from cxrjax.errors import CxrError
from cxrjax.models.layers import REMATS
from cxrjax.planning.accelerators import Accelerator, find_accelerator
from cxrjax.planning.plan import Plan, Planner, compile_plan, estimate_plan

_ADVICE = {
    "evaluate": "--batch-size N with N below the config's evaluate.batch_size",
    "predict": "a lower --batch-size or --size",
    "explain": "fewer --images or --steps, or JAX_PLATFORMS=cpu, which is slow but uses the host's memory",
}


def advice(command: str, config: Config | None = None) -> str:
    """Return the settings with which a command needs less memory.

    Args:
      command: name of the command that ran out of memory.
      config: the config of a training run; None for the other commands.
    """
    if config is None:
        return _ADVICE.get(command, "a smaller data.image_size, train.per_device_batch_size or evaluate.batch_size")
    settings = [" ".join(f"--config.{override}" for override in overrides) for overrides in smaller_settings(config)]
    return "; ".join([*settings, f"in validation, --config.evaluate.batch_size below {config.evaluate.batch_size}"])


def print_plans(config: Config) -> None:
    """Print a plan of the training step as configured and of each smaller setting.

    A distributed run only has until JAX ends this process for missing the others, so it is estimated and cut short.
    """
    accelerator, planner = planner_for(jax.local_devices()[0])
    deadline = math.inf
    if is_distributed():
        planner, deadline = estimate_plan, time.monotonic() + HEARTBEAT / 3
    settings = [[], *smaller_settings(config)]
    log(f"Planning {len(settings)} settings for {accelerator.kind}; press Ctrl-C to stop.")
    plans: dict[str, Plan] = {}
    with progress_bar("planning", len(settings), unit="settings") as advance, suppress(KeyboardInterrupt):
        for overrides in settings:
            if time.monotonic() > deadline:
                break
            changed = with_overrides(config, overrides)
            data, space = _mesh_shape(changed)
            with suppress(CxrError, jax.errors.JaxRuntimeError):  # skip settings that cannot be planned
                plans[" ".join(overrides) or "as configured"] = planner(changed, accelerator, data=data, space=space)
            advance()
    stderr.print(_table(plans, accelerator.memory))
    if not all(plan.compiled for plan in plans.values()):
        log("Estimated from shapes, without fusion and workspace.")


def planner_for(device: Any) -> tuple[Accelerator, Planner]:
    """Return the accelerator of a JAX device, and its compiler if that is fast, else the estimate."""
    accelerator = find_accelerator(device.device_kind)
    if accelerator is None:
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
        return Accelerator(device.device_kind, device.device_kind, memory, 1.0, 1.0, 1.0), estimate_plan
    if accelerator.tpu:  # compiling takes minutes per setting
        return accelerator, estimate_plan
    try:
        accelerator.devices(1)
    except CxrError:
        return accelerator, estimate_plan
    return accelerator, compile_plan


def smaller_settings(config: Config) -> Iterator[list[str]]:
    """Yield overrides with which a training step needs less memory, the cheapest first."""
    for remat in REMATS[REMATS.index(config.model.remat) + 1 :]:
        yield [f"model.remat={remat}"]
    strongest = config.model.remat if config.model.remat == REMATS[-1] else "block"
    images = max(config.train.batch_size // _mesh_shape(config)[0], 1)
    microbatch = config.train.per_device_batch_size or images
    smaller = next((n for n in range(microbatch // 2, 0, -1) if images % n == 0), 0)
    if smaller:
        yield [f"train.per_device_batch_size={smaller}"]
        yield [f"model.remat={strongest}", f"train.per_device_batch_size={smaller}"]
    yield from _more_devices_per_image(config, microbatch)
    if config.data.image_size > 64:
        yield [f"data.image_size={config.data.image_size // 2}"]


def _more_devices_per_image(config: Config, microbatch: int) -> Iterator[list[str]]:
    """Yield overrides that split each image over twice as many devices, idle ones if there are enough.

    Without idle devices half as many images are processed at once.
    """
    data, space = _mesh_shape(config)
    if config.data.image_size % (2 * space):
        return
    if config.mesh.data and data * 2 * space <= len(jax.devices()):
        yield [f"mesh.space={2 * space}"]
        return
    halved = data // 2
    if halved and data % 2 == 0 and config.train.batch_size % (halved * microbatch) == 0:
        data_override = [f"mesh.data={halved}"] if config.mesh.data else []
        yield [*data_override, f"mesh.space={2 * space}", f"train.per_device_batch_size={microbatch}"]


def _mesh_shape(config: Config) -> tuple[int, int]:
    space = config.mesh.space
    return config.mesh.data or max(len(jax.devices()) // space, 1), space


def _table(plans: dict[str, Plan], memory: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("setting")
    for column in ("devices", "images at once", "GB per device", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for setting, plan in plans.items():
        answers = ("no", "yes") if plan.compiled else ("unlikely", "likely")
        fits = answers[plan.fits] if memory else "?"
        table.add_row(setting, f"{plan.data} x {plan.space}", f"{plan.microbatch}", f"{plan.peak / 1e9:.3g}", fits)
    return table
