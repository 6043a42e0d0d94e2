"""Predict probabilities for image files; unreadable files are listed.

The table has the probability of each finding (calibrated, if `cxrjax evaluate` has fitted temperatures on the
validation split), the uncertainty, and whether it exceeds the threshold chosen there. The exit code is 1 if some files
could not be read; the others are still predicted.
"""

import argparse
from pathlib import Path

from cxrjax.cli.arguments import PartialResult, read_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `predict`."""
    parser.add_argument(
        "directory", type=Path, metavar="RUN", help="the directory of a trained run or of converted weights"
    )
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE",
        help="files or folders; .npy: a float array N x H x W x C, normalised as the network expects",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=0, help="image side in px (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch (default: 16)")
    parser.add_argument("--out", type=Path, help="write a table (.csv, .csv.gz or .parquet) that `score` can read")
    parser.add_argument(
        "--passes", type=int, metavar="T",
        help="Monte Carlo dropout passes, if the network has dropout (default: as in `evaluate`, else 100); 0: none, "
        "and the uncertainty is the entropy of the probabilities",
    )  # fmt: skip
    parser.add_argument(
        "--uncertainty-threshold", type=float, metavar="X",
        help="flag images with a higher uncertainty (default: chosen on the validation split by `evaluate`)",
    )  # fmt: skip
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="write Grad-CAM overlays, DIR/FINDING/IMAGE.png")
    parser.add_argument(
        "--findings", default="", metavar="A,B,...",
        help="findings to overlay on every image (default: those above their thresholds)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> PartialResult:
    """Predict the images."""
    from cxrjax.runs.predict_run import predict_files

    result = predict_files(
        arguments.directory, arguments.images, size=arguments.size, batch_size=arguments.batch_size,
        passes=arguments.passes, threshold=arguments.uncertainty_threshold, out=arguments.out,
        overlays=arguments.overlays, findings=read_names(arguments.findings),
    )  # fmt: skip
    return PartialResult(result, result["failed"])
