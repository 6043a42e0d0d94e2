"""Show where a trained network looks: effective receptive field or saliency maps."""

import argparse
from typing import Any

from cxrjax.cli.arguments import (
    add_processes,
    add_run,
    given,
    join_processes,
    mesh_shape,
    names,
    positive_int,
    use_compilation_cache,
)  # fmt: skip
from cxrjax.errors import CxrError

ERF, SALIENCY = "erf", ("gradcam", "gradcam++", "layercam", "integrated")
_ERF_OPTIONS = ("estimator", "layers", "untrained", "width_cm")
_SALIENCY_OPTIONS = ("findings", "threshold", "regions", "baseline", "steps")
_INTEGRATED_OPTIONS = ("baseline", "steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `explain`."""
    add_run(parser)
    parser.add_argument(
        "what", choices=(ERF, *SALIENCY), metavar="METHOD",
        help="erf: effective receptive field; gradcam, gradcam++, layercam, integrated (gradients): saliency maps",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=positive_int,
        help="images to average (erf, default: 32) or to draw per finding (saliency maps, default: 8)",
    )  # fmt: skip
    maps = parser.add_argument_group("saliency maps")
    maps.add_argument("--findings", type=names, metavar="A,B,...", help="findings to explain (default: all)")
    maps.add_argument(
        "--threshold", type=float, metavar="T", help="mark pixels above this fraction of the maximum (default: 0.5)"
    )
    maps.add_argument(
        "--regions", choices=("peak", "all"),
        help="draw boxes around the region of the maximum or around all regions (default: peak)",
    )  # fmt: skip
    maps.add_argument(
        "--baseline", choices=("black", "mean"), help="baseline image of integrated gradients (default: black)"
    )
    maps.add_argument(
        "--steps", type=positive_int, metavar="N", help="integration steps of integrated gradients (default: 64)"
    )
    erf = parser.add_argument_group("erf")
    erf.add_argument(
        "--estimator", choices=("exact", "probe", "sum"), help="estimator of the gradient map (default: probe)"
    )
    erf.add_argument(
        "--layers", type=names, metavar="A,B,...", help="also measure these feature maps, or all (default: the last)"
    )
    erf.add_argument("--untrained", action="store_true", default=None, help="also measure the untrained network")
    erf.add_argument("--width-cm", type=float, metavar="CM", help="width of the imaged region, for the scale bar")
    add_processes(parser, "The first process explains, on its own devices.")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Explain the run; returns the result in the first process and None in the others."""
    from cxrjax.distributed.runtime import on_main_process

    join_processes(arguments)
    use_compilation_cache(arguments.run_directory)
    return on_main_process(lambda: _explain(arguments))


def _explain(arguments: argparse.Namespace) -> dict[str, Any]:
    run, method = arguments.run_directory, arguments.what
    options: dict[str, Any] = given(arguments, ("images",)) | {
        "split": arguments.split, "data_dir": arguments.data_dir, "mesh": mesh_shape(arguments.mesh),
    }  # fmt: skip
    if method == ERF:
        from cxrjax.runs.erf_run import measure_run_erf

        _reject(arguments, _SALIENCY_OPTIONS)
        return measure_run_erf(run, **options, **given(arguments, _ERF_OPTIONS))
    from cxrjax.runs.explain_run import SaliencyOptions, explain_run

    _reject(arguments, _ERF_OPTIONS + (() if method == "integrated" else _INTEGRATED_OPTIONS))
    reading = SaliencyOptions(method, **given(arguments, ("threshold", "regions", *_INTEGRATED_OPTIONS)))
    return explain_run(run, reading, findings=arguments.findings, **options)


def _reject(arguments: argparse.Namespace, options: tuple[str, ...]) -> None:
    """Raise an error for options that the method does not use."""
    for name in given(arguments, options):
        raise CxrError(f"--{name.replace('_', '-')} has no effect on {arguments.what}: leave it out")
