"""The verb `plan`: words in, plans out, as tables and for JSON."""

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

import jax
from rich import box
from rich.table import Table

from cxrjax.config import Config, load
from cxrjax.console import progress_bar, print_text, stderr, stdout
from cxrjax.distributed.mesh import parse_mesh
from cxrjax.errors import CxrError, check_choice
from cxrjax.planning.accelerators import TARGETS, Target
from cxrjax.planning.plan import USABLE, Plan, estimate, largest_batch, plan

SWEEP_SIZES = (512, 1024, 2048)
SWEEP_MESHES = ((1, 1), (1, 4), (1, 8), (2, 4), (4, 2), (8, 1))


def run(arguments: argparse.Namespace) -> Any:
    """Plan what the words say.

    Raises:
      CxrError: as of `plan`, or a mesh that cannot be read.
    """
    config = load(arguments.config, arguments.overrides)
    target = TARGETS[check_choice("--device", arguments.device, TARGETS)]
    _check(arguments)
    data, space = parse_mesh(arguments.mesh) if arguments.mesh else (config.mesh.data or 1, config.mesh.space)
    make = estimate if arguments.estimate or not _installed(target) else plan
    if arguments.sweep:
        sizes, remats = arguments.sizes or SWEEP_SIZES, arguments.remats or (config.model.remat,)
        meshes = [parse_mesh(mesh) for mesh in arguments.meshes] or SWEEP_MESHES
        plans = _sweep(config, target, arguments.batch or 1, make, sizes, meshes, remats)
    elif arguments.largest:
        batch, plans = largest_batch(config, target, make, data=data, space=space)
        estimated = ", by an estimate" if make is estimate else ""
        print_text(f"the largest batch that fits: {batch} images over {data} x {space} {target.kind}{estimated}")
        stdout.print(table(plans))
        return {"largest": batch, "plans": [each.as_dict() for each in plans]}
    else:
        plans = [make(config, target, data=data, space=space, batch=arguments.batch or 0)]
    stdout.print(table(plans))
    if len(plans) == 1:
        print_text(_sentences(plans[0], target))
    return {"plans": [each.as_dict() for each in plans]}


def _check(arguments: argparse.Namespace) -> None:
    if arguments.batch is not None and arguments.batch < 1:
        raise CxrError(f"--batch {arguments.batch} is not a positive number of images")
    if arguments.batch and arguments.largest:
        raise CxrError("--largest finds the batch, and takes no --batch")
    if arguments.sweep and arguments.largest:
        raise CxrError("--largest and --sweep cannot be asked for at once")
    if arguments.sweep and arguments.mesh:
        raise CxrError("--sweep takes --meshes, not --mesh")
    given = [name for name in ("sizes", "meshes", "remats") if getattr(arguments, name)]
    if given and not arguments.sweep:
        raise CxrError(
            f"--{given[0]} is for --sweep; one plan is of --config.data.size, --mesh and --config.model.remat"
        )


def _installed(target: Target) -> bool:
    try:
        target.devices(1 if target.gpu else 4)
    except CxrError as error:
        stderr.print(f"{error}. What follows is an estimate.", soft_wrap=True)
        return False
    return True


def _sweep(
    config: Config, target: Target, each: int, make: Any, sizes: Sequence[int], meshes: Sequence[tuple[int, int]],
    remats: Sequence[str],
) -> list[Plan]:  # fmt: skip
    plans, refused = [], []
    with progress_bar("compiling", len(sizes) * len(meshes) * len(remats), unit="steps") as advance:
        for size, (data, space), remat in product(sizes, meshes, remats):
            changed = config.copy_and_resolve_references()
            changed.data.size, changed.model.remat = size, remat
            try:
                plans.append(make(changed, target, data=data, space=space, batch=each * data))
            except (CxrError, jax.errors.JaxRuntimeError) as error:  # of this combination: what others cost is kept
                refused.append(f"{size} px, {data} x {space}, {remat}: {error}")
            advance()
    if not plans:
        raise CxrError(refused[0])
    for line in refused:
        print_text(line)
    return plans


def table(plans: list[Plan]) -> Table:
    """One line a plan; gigabytes are 1e9 bytes, of one device."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    program = ["program"] if any(each.program for each in plans) else []
    columns = ("px", "mesh", "images", "remat", "state, GB", "rest", *program, "peak", "left", "fits", "reduce",
               "permute", "gather", "sent, GB", "floor, ms")  # fmt: skip
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for each in plans:
        shown = (
            each.parameters + each.optimizer,
            each.inputs + each.activations,
            *[each.program] * len(program),
            each.peak,
        )
        calls = (str(each.collectives.get(k, 0)) for k in ("all-reduce", "collective-permute", "all-gather"))
        made.add_row(
            f"{each.size}", f"{each.data} x {each.space}",
            f"{each.parts} x {each.batch}" if each.parts > 1 else f"{each.batch}", each.remat,
            *(f"{value / 1e9:.2f}" for value in shown),
            f"{each.left / 1e9:.1f}", "yes" if each.fits else "no",
            *(calls if each.known else ("?",) * 3),
            f"{each.sent / 1e9:.3f}" if each.known else "?", f"{1e3 * each.floor_s:.1f}",
        )  # fmt: skip
    return made


def _sentences(made: Plan, target: Target) -> str:
    times = {"arithmetic": made.compute_s, "memory": made.memory_s, "network": made.network_s}
    known = {name: seconds for name, seconds in times.items() if seconds}
    slowest = max(known, key=lambda name: known[name])
    bounds = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in known.items())
    if made.refused:
        how = "as XLA's compiler for it says, which gave up"
    elif made.compiled:
        how = "as XLA's compiler for it says" + ("; a step that has room takes more" if target.tpu else "")
    else:
        rough = "; on TPUs the compiler says 0.6 to 1.9 times as much" if target.tpu else ""
        how = f"estimated, without workspace and collectives{rough}"
    share = (made.peak + made.waiting) / target.memory
    alone = "" if made.known else " alone"
    fits = f"fits, at {share:.0%} of its memory" if made.fits else f"does not fit: {share:.0%} of its memory"
    setting = f"; set XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}" if target.gpu and 0.75 < share <= USABLE else ""
    parts = {
        "parameters": made.parameters, "optimiser": made.optimizer, "images": made.inputs,
        "images of the next steps": made.waiting, "program": made.program, "all else": made.activations,
    }  # fmt: skip
    held = ", ".join(f"{name} {value / 1e9:.3g} GB" for name, value in parts.items() if value)
    calls = ", ".join(f"{count} {kind}" for kind, count in made.collectives.items())
    moved = f", {made.moved / 1e9:.3g} GB moved" if made.known else ""
    sent = f", {made.sent / 1e9:.3g} GB sent ({calls})" if calls else ""
    return (
        f"{target.kind}, {target.memory / 1e9:.0f} GB, {how}: {fits}{setting}. A device holds: {held}. "
        f"A step: {made.flops / 1e12:.3g} TFLOP{moved}{sent}; it takes at least {1e3 * made.floor_s:.1f} ms, for its "
        f"{slowest}{alone} ({bounds})."
    )
