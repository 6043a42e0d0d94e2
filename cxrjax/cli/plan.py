"""Predict memory and time of a training step for a GPU or TPU, ahead of time and without that device."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cxrjax.cli.arguments import MESH_METAVAR, add_config, mesh_shape, positive_int
from cxrjax.errors import CxrError, check_choice

if TYPE_CHECKING:
    from cxrjax.planning.accelerators import Accelerator
    from cxrjax.planning.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    add_config(parser)
    parser.add_argument("--device", required=True, metavar="NAME", help="h200, h100, a100-80, a100-40, v5e, v5p or v6e")
    parser.add_argument(
        "--mesh", default="", metavar=MESH_METAVAR,
        help="split the batch over D devices and image rows over S (default: from the config)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per step, over all devices (default: from the config)"
    )
    parser.add_argument(
        "--largest", action="store_true", help="find the largest batch size that fits; compiles several times"
    )
    parser.add_argument(
        "--sweep", action="store_true",
        help="plan all combinations of --sizes, --meshes and --remats, with N images (default: 1) per data device",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=positive_int, nargs="+", metavar="PX", help="image sides of --sweep (default: 512 1024 2048)"
    )
    parser.add_argument(
        "--meshes", nargs="+", default=[], metavar=MESH_METAVAR,
        help="meshes of --sweep (default: 1 x 1, 1 x 4, 1 x 8, 2 x 4, 4 x 2 and 8 x 1)",
    )  # fmt: skip
    parser.add_argument(
        "--remats", nargs="+", choices=("none", "layer", "block", "full"),
        help="rematerialisation policies of --sweep (default: from the config)",
    )  # fmt: skip
    parser.add_argument(
        "--estimate", action="store_true", help="estimate from the traced step instead of compiling it for the device"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan one step, a sweep, or the largest batch size."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the device's compiler runs on the CPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from cxrjax.config import load_config
    from cxrjax.console import print_text, stdout
    from cxrjax.planning import sweep
    from cxrjax.planning.accelerators import ACCELERATORS
    from cxrjax.planning.plan import estimate_plan, largest_batch

    config = load_config(arguments.config, arguments.overrides)
    accelerator = ACCELERATORS[check_choice("--device", arguments.device, ACCELERATORS)]
    _check(arguments)
    data, space = mesh_shape(arguments.mesh) or (config.mesh.data or 1, config.mesh.space)
    planner = estimate_plan if arguments.estimate else _planner(accelerator)
    result: dict[str, Any] = {}
    if arguments.sweep:
        plans = sweep.sweep(
            config, accelerator, planner, images_per_device=arguments.batch_size or 1,
            sizes=arguments.sizes or sweep.SIZES, remats=arguments.remats or (config.model.remat,),
            meshes=[parsed for text in arguments.meshes if (parsed := mesh_shape(text))] or sweep.MESHES,
        )  # fmt: skip
    elif arguments.largest:
        batch_size, plans = largest_batch(config, accelerator, planner, data=data, space=space)
        result["largest"] = batch_size
        note = ", estimated" if planner is estimate_plan else ""
        print_text(f"largest batch size that fits: {batch_size} over {data} x {space} {accelerator.kind}{note}")
    else:
        plans = [planner(config, accelerator, data=data, space=space, batch_size=arguments.batch_size or 0)]
    stdout.print(sweep.plan_table(plans))
    if len(plans) == 1 and not arguments.largest:
        print_text(sweep.describe(plans[0], accelerator))
    return result | {"plans": [plan.as_dict() for plan in plans]}


def _check(arguments: argparse.Namespace) -> None:
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise CxrError(f"--batch-size {arguments.batch_size} is not a positive number of images")
    if arguments.batch_size and arguments.largest:
        raise CxrError("--largest finds the batch size: leave out --batch-size")
    if arguments.sweep and arguments.largest:
        raise CxrError("--largest and --sweep cannot be combined")
    if arguments.sweep and arguments.mesh:
        raise CxrError("--sweep takes --meshes, not --mesh")
    for name in ("sizes", "meshes", "remats"):
        if getattr(arguments, name) and not arguments.sweep:
            raise CxrError(
                f"--{name} is for --sweep; for one plan use --config.data.image_size, --mesh and --config.model.remat"
            )


def _planner(accelerator: "Accelerator") -> "Callable[..., Plan]":
    """Return the function that plans with the compiler of the device, or estimates if that is not installed."""
    from cxrjax.console import log
    from cxrjax.planning.plan import compile_plan, estimate_plan

    try:
        accelerator.devices(1 if accelerator.gpu else 4)
    except CxrError as error:
        log(f"{error}. Estimating instead.")
        return estimate_plan
    return compile_plan
