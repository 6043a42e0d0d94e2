"""Measure speed and memory of training and inference on the local devices."""

import argparse

from cxrjax.cli.arguments import MESH_METAVAR, PartialResult, add_config
from cxrjax.errors import CxrError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="ARCH:SIZE:BATCH",
        help="network, image side in px and batch size",
    )
    add_config(parser, required=False, default="none")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), help="compute types (default: bfloat16)"
    )
    parser.add_argument(
        "--remats", nargs="+", choices=("none", "layer", "block", "full"),
        help="what the backward pass recomputes (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", default="", metavar=MESH_METAVAR,
        help="split the batch over D devices and image rows over S (default: one device)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="report medians over N steps (default: 10)")
    parser.add_argument("--no-inference", dest="inference", action="store_false", help="measure only training steps")


def run(arguments: argparse.Namespace) -> PartialResult:
    """Measure all cases and print a table."""
    from cxrjax.config import load_config
    from cxrjax.console import print_text, progress_bar, stdout
    from cxrjax.planning import benchmark

    cases = benchmark.parse_cases(
        arguments.cases, arguments.dtypes, arguments.remats, steps=arguments.steps, mesh=arguments.mesh
    )
    if arguments.config:
        cases.append(benchmark.Case.from_config(load_config(arguments.config, arguments.overrides), arguments.steps))
    if not cases:
        raise CxrError("nothing to measure: give ARCH:SIZE:BATCH, such as densenet121:1024:8, or --config RECIPE")
    rows = []
    with progress_bar("measuring", len(cases), unit="cases") as advance:
        for row in benchmark.run_cases(cases, inference=arguments.inference):
            rows.append(row)
            advance()
    failures = benchmark.failures(rows)
    for case, error in failures.items():
        print_text(f"{case}: {error}")
    if all("error" in row for row in rows):
        raise CxrError("nothing could be measured")
    stdout.print(benchmark.results_table(rows))
    return PartialResult(rows, failures)
