"""Score a table of predictions, from cxrjax or any other program."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `score`."""
    parser.add_argument(
        "--predictions", type=Path, required=True, help="CSV or Parquet with an id and prob_<finding> columns"
    )
    parser.add_argument(
        "--labels", type=Path,
        help="CSV or Parquet with labels, or NIH's Data_Entry_2017 table (default: the labels in --predictions)",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap resamples of patients; 0: no intervals (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap (default: 0)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score the predictions and print a table."""
    from cxrjax.console import stdout
    from cxrjax.metrics.scores import score_files
    from cxrjax.report.tables import terminal_scores

    scores = score_files(arguments.predictions, arguments.labels, resamples=arguments.resamples, seed=arguments.seed)
    rows = scores.rows()
    stdout.print(terminal_scores({"AUROC": rows}, [row["finding"] for row in rows if row["finding"] != "mean"]))
    return scores.as_dict()
