"""Convert a data set of radiographs to sharded records, at one or several sizes."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from cxrjax.cli.arguments import given, names, positive_int

_BUILDER_OPTIONS = ("aspect", "patients", "seed", "labels", "name", "table", "image_column", "label_columns",
                    "class_column", "patient_column")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prepare`."""
    parser.add_argument(
        "dataset", metavar="DATASET",
        help="chestxray14, mimic_cxr_jpg, six_class or cxr_phantom; folder or table for your own radiographs",
    )  # fmt: skip
    parser.add_argument(
        "--source", type=Path, help="folder with the images and tables; chestxray14 is downloaded without it"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="output directory (default: data)")
    parser.add_argument(
        "--size", type=_size, nargs="+", default=[None],
        help="side of the stored images in px, or native; several sizes are written in one pass (default: native, or "
        "256 for cxr_phantom)",
    )  # fmt: skip
    parser.add_argument(
        "--aspect", choices=("stretch", "pad"),
        help="make images square by stretching them, as the papers do, or by padding with black (default: stretch)",
    )  # fmt: skip
    parser.add_argument("--allow-missing", action="store_true", help="skip images of the table that are not on disk")
    parser.add_argument("--repair", action="store_true", help="rewrite damaged shards of a prepared data set")
    parser.add_argument(
        "--workers", type=positive_int, help="number of threads (default: one per core; with --beam one per worker)"
    )
    parser.add_argument("--beam", action="store_true", help="write the shards with Apache Beam, on several machines")
    parser.add_argument(
        "--beam-options", type=shlex.split, default=[], metavar="FLAGS",
        help="flags for Beam, as one argument: --beam-options='--runner=...'",
    )  # fmt: skip
    phantom = parser.add_argument_group("cxr_phantom")
    phantom.add_argument("--patients", type=positive_int, help="number of patients to draw (default: 2600)")
    phantom.add_argument("--seed", type=int, help="random seed (default: 0)")
    mimic = parser.add_argument_group("mimic_cxr_jpg")
    mimic.add_argument("--labels", metavar="LABELLER", help="chexpert (default) or negbio")
    own = parser.add_argument_group("your own radiographs (folder, six_class, table)")
    own.add_argument("--name", help="name of the prepared data set, for data.dataset")
    own.add_argument("--table", type=Path, metavar="FILE", help="table: a CSV (.csv or .csv.gz) with a row per image")
    own.add_argument(
        "--image-column", metavar="COLUMN", help="table: image paths, relative to --source or to the table"
    )
    own.add_argument(
        "--label-columns", type=names, metavar="A,B,...",
        help="table: a column per finding with 1, 0, -1 (uncertain) or empty (not mentioned)",
    )  # fmt: skip
    own.add_argument(
        "--class-column", metavar="COLUMN", help="table: class names of exclusive classes, instead of --label-columns"
    )
    own.add_argument(
        "--patient-column", metavar="COLUMN", help="table: patient ids; without it, leakage cannot be detected"
    )


def run(arguments: argparse.Namespace) -> Any:
    """Prepare the data set; returns one result per size."""
    from cxrjax.console import print_text
    from tfds_builders.prepare import prepare_sizes

    results = prepare_sizes(
        arguments.dataset, arguments.size, source=arguments.source, data_dir=arguments.data_dir,
        allow_missing=arguments.allow_missing, workers=arguments.workers, repair=arguments.repair,
        beam=arguments.beam_options if arguments.beam else None, **given(arguments, _BUILDER_OPTIONS),
    )  # fmt: skip
    for prepared in results:
        status = "already prepared" if prepared.reused else f"prepared in {prepared.seconds:.0f} s"
        print_text(
            f"{prepared.images:,} images of {prepared.patients:,} patients, {prepared.bytes / 1e6:,.0f} MB, {status}: "
            f"{prepared.directory}\nfingerprint {prepared.fingerprint}"
        )
    values = [{**vars(prepared), "directory": str(prepared.directory)} for prepared in results]
    return values[0] if len(values) == 1 else values


def _size(text: str) -> int | None:
    return None if text == "native" else int(text)
