"""What to do where a device's memory did not suffice: the settings that need less, and what the plan says of them."""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jax
from rich import box
from rich.table import Table

from cxrjax.config import Config, load, with_overrides
from cxrjax.console import progress_bar, stderr
from cxrjax.distributed.runtime import HEARTBEAT, is_distributed
from cxrjax.errors import CxrError
from cxrjax.models.layers import REMATS
from cxrjax.planning.accelerators import Target, target_of
from cxrjax.planning.plan import Plan, estimate, plan

OTHERS = {
    "evaluate": "--batch N with N below the config's evaluate.batch",
    "predict": "--batch or --size below what they are",
    "explain": "fewer --images or --steps, or JAX_PLATFORMS=cpu, which is slow and has the host's memory",
}


def mend(arguments: argparse.Namespace) -> str:
    """The settings with which a verb needs less memory, as the end of a sentence."""
    if arguments.verb != "train":
        return OTHERS.get(arguments.verb, "a smaller data.size, train.per_device or evaluate.batch")
    config = load(arguments.config, arguments.overrides)
    return "; ".join([*(f"--config.{' --config.'.join(each)}" for each in less(config)), _in_validation(config)])


def advise(arguments: argparse.Namespace) -> None:
    """Print what the plan says of a training step as it is, and with less; where other processes ended, soon."""
    config = load(arguments.config, arguments.overrides)
    target, make = planned_for(jax.local_devices()[0])
    end = math.inf
    if is_distributed():
        make, end = estimate, time.monotonic() + HEARTBEAT / 5  # then JAX misses the others, and ends this one
    settings = [[], *less(config)]
    stderr.print(f"Planning {len(settings)} settings for {target.kind}; Ctrl-C leaves it at that.")
    made: list[tuple[str, Plan]] = []
    with progress_bar("planning", len(settings), unit="settings") as advance, suppress(KeyboardInterrupt):
        for changes in settings:
            if time.monotonic() > end:
                break
            changed = with_overrides(config, changes)
            data, space = _mesh(changed)
            with suppress(CxrError, jax.errors.JaxRuntimeError):  # the mesh, or the target's compiler, does not take it
                made.append((" ".join(changes) or "as it is", make(changed, target, data=data, space=space)))
            advance()
    stderr.print(_table(made, target.memory))
    if made and not made[0][1].compiled:
        stderr.print("Estimated from shapes, without fusion and workspace: a first idea.")


def less(config: Config) -> Iterator[list[str]]:
    """Changes that lower what a training step holds, the cheapest first."""
    for remat in REMATS[REMATS.index(config.model.remat) + 1 :]:
        yield [f"model.remat={remat}"]
    most = config.model.remat if config.model.remat == REMATS[-1] else "block"
    share = max(config.train.batch // _mesh(config)[0], 1)
    at_once = config.train.per_device or share
    fewer = next((n for n in range(at_once // 2, 0, -1) if share % n == 0), 0)
    if fewer:
        yield [f"train.per_device={fewer}"]
        yield [f"model.remat={most}", f"train.per_device={fewer}"]
    yield from _more_rows(config, at_once)
    if config.data.size > 64:
        yield [f"data.size={config.data.size // 2}"]


def _more_rows(config: Config, at_once: int) -> Iterator[list[str]]:
    """Twice as many devices for each image: such as are idle, or half as many images at once on all together."""
    (data, space), there = _mesh(config), len(jax.devices())
    if config.data.size % (2 * space):
        return
    if config.mesh.data and data * 2 * space <= there:
        yield [f"mesh.space={2 * space}"]
        return
    fewer = data // 2
    if fewer and data % 2 == 0 and config.train.batch % (fewer * at_once) == 0:
        given = [f"mesh.data={fewer}"] if config.mesh.data else []
        yield [*given, f"mesh.space={2 * space}", f"train.per_device={at_once}"]


def planned_for(device: Any) -> tuple[Target, Any]:
    """The device as the plan knows it, and what plans for it: its compiler if that is soon done, or an estimate."""
    target = target_of(device.device_kind)
    if target is None:
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
        return Target(device.device_kind, device.device_kind, memory, 1.0, 1.0, 1.0), estimate
    if target.tpu:  # several minutes for each setting
        return target, estimate
    try:
        target.devices(1)
    except CxrError:
        return target, estimate
    return target, plan


def _mesh(config: Config) -> tuple[int, int]:
    space = config.mesh.space
    return config.mesh.data or max(len(jax.devices()) // space, 1), space


def _in_validation(config: Config) -> str:
    return f"in validation, --config.evaluate.batch below {config.evaluate.batch}"


def _table(made: list[tuple[str, Plan]], memory: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("setting")
    for column in ("devices", "images at once", "GB of each", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, each in made:
        sure, unsure = ("yes", "likely"), ("no", "unlikely")
        fits = (sure if each.fits else unsure)[not each.compiled] if memory else "?"
        table.add_row(name, f"{each.data} x {each.space}", f"{each.batch}", f"{each.peak / 1e9:.3g}", fits)
    return table
