"""List the networks: parameters, feature maps, receptive fields, GFLOPs, input specification."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `models`."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="list all feature maps of these networks (default: a line per network)"
    )
    parser.add_argument("--size", type=int, default=224, help="image side in px (default: 224)")
    parser.add_argument("--classes", type=int, default=14, help="number of findings (default: 14)")
    parser.epilog = (
        "GFLOPs: convolutions and matrix products of the forward pass of one image, two per multiply-add. Field: side "
        "of the theoretical receptive field."
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print one table of all networks, or one table per named network."""
    from cxrjax.console import stdout
    from cxrjax.planning.model_summary import detail_table, overview_table, summarize_models

    summaries = summarize_models(arguments.names, size=arguments.size, classes=arguments.classes)
    for table in map(detail_table, summaries) if arguments.names else [overview_table(summaries)]:
        stdout.print(table)
    return [summary.as_dict() for summary in summaries]
