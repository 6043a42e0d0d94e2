"""The words of `cxrjax explain`, apart from the work itself, whose libraries take seconds to load."""

import argparse
from typing import Any

from cxrjax.errors import CxrError

FIELD, MAPS = "erf", ("gradcam", "gradcam++", "layercam", "integrated")
_OF_MAPS = ("findings", "threshold", "regions", "baseline", "steps")
_OF_FIELD = ("estimator", "layers", "untrained", "width_cm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `explain` takes beside a run."""
    parser.add_argument(
        "what", choices=(FIELD, *MAPS), metavar="WHAT",
        help="erf: the effective receptive field; or maps of where findings come from: gradcam, gradcam++, layercam, "
        "or integrated (gradients)",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=_positive, help="erf: averaged (default: 32); maps: pictures a finding (default: 8)"
    )
    maps = parser.add_argument_group("maps")
    maps.add_argument("--findings", metavar="A,B,...", help="which (default: all)")
    maps.add_argument("--threshold", type=float, metavar="T", help="share of its maximum a map marks (default: 0.5)")
    maps.add_argument(
        "--regions", choices=("peak", "all"), help="boxes around the region of the maximum, or all (default: peak)"
    )
    maps.add_argument("--baseline", choices=("black", "mean"), help="of integrated gradients (default: black)")
    maps.add_argument("--steps", type=_positive, metavar="N", help="of integrated gradients (default: 64)")
    field = parser.add_argument_group("erf")
    field.add_argument(
        "--estimator", choices=("exact", "probe", "sum"), help="how equation 1 is computed (default: probe)"
    )
    field.add_argument("--layers", metavar="A,B,...", help="size against depth: these feature maps too, or all")
    field.add_argument("--untrained", action="store_true", default=None, help="beside it, the network before training")
    field.add_argument("--width-cm", type=float, metavar="CM", help="of what an image shows, for the scale bar")


def explain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what the words say; the result is ready for JSON."""
    from cxrjax.distributed.mesh import mesh_of

    what, run = arguments.what, arguments.run_directory
    mesh = mesh_of(arguments.mesh) if arguments.mesh else None
    common: dict[str, Any] = {"part": arguments.split, "data_dir": arguments.data_dir, "mesh": mesh}
    if what == FIELD:
        from cxrjax.runs.erf_run import erf_run

        _unused(arguments, _OF_MAPS)
        given = _given(arguments, ("images", *_OF_FIELD))
        given["layers"] = _names(arguments.layers)
        return erf_run(run, **common, **given)
    from cxrjax.runs.saliency_run import Reading, saliency_run

    _unused(arguments, _OF_FIELD + (() if what == "integrated" else ("baseline", "steps")))
    reading = Reading(what, **_given(arguments, ("threshold", "regions", "baseline", "steps")))
    return saliency_run(run, reading, findings=_names(arguments.findings), **common, **_given(arguments, ("images",)))


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Options that were given; the others keep the work's own defaults."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _unused(arguments: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Refuse options that would change nothing."""
    for name in _given(arguments, names):
        raise CxrError(f"--{name.replace('_', '-')} changes nothing of {arguments.what}: leave it out")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value
