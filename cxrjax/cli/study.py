"""Train and compare several runs and write one report."""

import argparse
from typing import Any

from cxrjax.cli.arguments import add_config, add_processes, add_workdir, join_processes, use_compilation_cache
from cxrjax.errors import CxrError

STUDIES = ("resolution", "fhrnet", "transfer", "attention_fusion", "sequential_cnn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `study`."""
    parser.add_argument(
        "what", choices=STUDIES, metavar="STUDY",
        help="resolution: train at each size, in each fold, and combine the runs in ensembles; fhrnet, transfer, "
        "attention_fusion, sequential_cnn: reproduce a published system and compare its variants with the paper",
    )  # fmt: skip
    add_config(parser, required=False, default="the recipe of the study")
    add_workdir(parser)
    parser.add_argument(
        "--only", default="", metavar="NAME",
        help="resolution: train only WORKDIR/runs/NAME, such as 1024px-fold3, so that separate jobs can share a "
        "WORKDIR. Without it, missing runs are trained and the report is written",
    )  # fmt: skip
    add_processes(parser, "All processes train and predict; the first explains and writes the report.")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Run the study; returns the result in the first process and None in the others."""
    recipe = arguments.config or arguments.what
    join_processes(arguments, stops_together=True)
    use_compilation_cache(arguments.workdir)
    if arguments.what == "resolution":
        from cxrjax.studies.resolution import run_resolution_study

        return run_resolution_study(recipe, arguments.overrides, arguments.workdir, arguments.only)
    if arguments.only:
        raise CxrError(f"--only is for the resolution study; {arguments.what} trains all of its runs")
    from cxrjax.studies.systems import run_system_study

    return run_system_study(arguments.what, recipe, arguments.overrides, arguments.workdir)
