"""Plans of many settings, and how plans are shown."""

from collections.abc import Sequence
from itertools import product

import jax
from rich import box
from rich.table import Table

from cxrjax.config import Config
from cxrjax.console import print_text, progress_bar
from cxrjax.errors import CxrError
from cxrjax.planning.accelerators import Accelerator
from cxrjax.planning.plan import USABLE_FRACTION, Plan, Planner

SIZES = (512, 1024, 2048)
MESHES = ((1, 1), (1, 4), (1, 8), (2, 4), (4, 2), (8, 1))


def sweep(
    config: Config, accelerator: Accelerator, planner: Planner, *, images_per_device: int = 1,
    sizes: Sequence[int] = SIZES, meshes: Sequence[tuple[int, int]] = MESHES, remats: Sequence[str] = ("none",),
) -> list[Plan]:  # fmt: skip
    """Plan every combination of size, mesh and rematerialisation; combinations that do not work are printed.

    Args:
      config: the recipe.
      accelerator: the device.
      planner: makes one plan.
      images_per_device: images for each device of the `data` axis.
      sizes: image sides in px.
      meshes: pairs of `data` and `space` devices.
      remats: values of `model.remat`.

    Raises:
      CxrError: no combination works.
    """
    plans, errors = [], []
    with progress_bar("compiling", len(sizes) * len(meshes) * len(remats), unit="steps") as advance:
        for size, (data, space), remat in product(sizes, meshes, remats):
            changed = config.copy_and_resolve_references()
            changed.data.image_size, changed.model.remat = size, remat
            try:
                batch_size = images_per_device * data
                plans.append(planner(changed, accelerator, data=data, space=space, batch_size=batch_size))
            except (CxrError, jax.errors.JaxRuntimeError) as error:
                errors.append(f"{size} px, {data} x {space}, {remat}: {error}")
            advance()
    if not plans:
        raise CxrError(errors[0])
    for error in errors:
        print_text(error)
    return plans


def plan_table(plans: Sequence[Plan]) -> Table:
    """Return a table with one row per plan; GB are 1e9 bytes on one device."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    with_program = any(plan.program for plan in plans)
    program_column = ["program"] if with_program else []
    columns = ("px", "mesh", "images", "remat", "state, GB", "other", *program_column, "peak", "free", "fits",
               "all-reduce", "permute", "gather", "sent, GB", "floor, ms")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        sizes = [plan.parameters + plan.optimizer, plan.inputs + plan.activations]
        if with_program:
            sizes.append(plan.program)
        counts = [plan.collectives.get(kind, 0) for kind in ("all-reduce", "collective-permute", "all-gather")]
        traffic = [*map(str, counts), f"{plan.bytes_sent / 1e9:.3f}"] if plan.traffic_known else ["?"] * 4
        steps = f"{plan.accumulation_steps} x " if plan.accumulation_steps > 1 else ""
        table.add_row(
            f"{plan.size}", f"{plan.data} x {plan.space}", f"{steps}{plan.microbatch}", plan.remat,
            *(f"{size / 1e9:.2f}" for size in (*sizes, plan.peak)), f"{plan.free / 1e9:.1f}",
            "yes" if plan.fits else "no", *traffic, f"{1e3 * plan.floor_s:.1f}",
        )  # fmt: skip
    return table


def describe(plan: Plan, accelerator: Accelerator) -> str:
    """Return a plan in sentences."""
    if plan.exceeded:
        source = "according to its XLA compiler, which stopped for lack of memory"
    elif plan.compiled:
        source = "according to its XLA compiler" + (
            "; a step with memory to spare uses more" if accelerator.tpu else ""
        )
    else:
        error = "; XLA's figures for TPUs are 0.6 to 1.9 times as high" if accelerator.tpu else ""
        source = f"estimated, without workspace and collectives{error}"
    fraction = (plan.peak + plan.prefetched) / accelerator.memory
    fits = f"fits, using {fraction:.0%} of the memory" if plan.fits else f"does not fit: {fraction:.0%} of the memory"
    if accelerator.gpu and 0.75 < fraction <= USABLE_FRACTION:
        fits += f"; set XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE_FRACTION}"
    sizes = {
        "parameters": plan.parameters, "optimizer": plan.optimizer, "images": plan.inputs,
        "prefetched images": plan.prefetched, "program": plan.program, "all else": plan.activations,
    }  # fmt: skip
    memory = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes.items() if size)
    times = {"arithmetic": plan.compute_s, "memory": plan.memory_s, "network": plan.network_s}
    known = {name: seconds for name, seconds in times.items() if seconds}
    slowest = max(known, key=lambda name: known[name])
    if not plan.traffic_known:
        slowest += " alone"
    bounds = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in known.items())
    accessed = f", {plan.bytes_accessed / 1e9:.3g} GB of memory traffic" if plan.traffic_known else ""
    counts = ", ".join(f"{count} {kind}" for kind, count in plan.collectives.items())
    sent = f", {plan.bytes_sent / 1e9:.3g} GB sent ({counts})" if counts else ""
    return (
        f"{accelerator.kind}, {accelerator.memory / 1e9:.0f} GB, {source}: {fits}. Memory of a device: {memory}. "
        f"A step has {plan.flops / 1e12:.3g} TFLOP{accessed}{sent} and takes at least {1e3 * plan.floor_s:.1f} ms, "
        f"limited by {slowest} ({bounds})."
    )
