"""Evaluate a run: predictions, scores with confidence intervals, and a report."""

import argparse
from typing import Any

from cxrjax.cli.arguments import (
    add_processes,
    add_run,
    join_processes,
    mesh_shape,
    positive_int,
    use_compilation_cache,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    add_run(parser)
    parser.add_argument("--batch-size", type=positive_int, help="images per batch (default: from the config)")
    parser.add_argument("--resamples", type=int, help="bootstrap resamples of patients (default: from the config)")
    add_processes(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate the run; returns the scores in the first process and None in the others."""
    from cxrjax.runs.evaluate_run import evaluate_run

    join_processes(arguments)
    use_compilation_cache(arguments.run_directory)
    return evaluate_run(
        arguments.run_directory, split=arguments.split, data_dir=arguments.data_dir, resamples=arguments.resamples,
        batch_size=arguments.batch_size, mesh=mesh_shape(arguments.mesh),
    )  # fmt: skip
