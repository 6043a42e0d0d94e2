"""The words of `cxrjax prepare`, apart from the work itself, whose libraries take a second to load."""

import argparse
import shlex
from pathlib import Path
from typing import Any

_OPTIONS = (
    "aspect",
    "patients",
    "seed",
    "labels",
    "name",
    "table",
    "image_column",
    "label_columns",
    "class_column",
    "patient_column",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `prepare` takes."""
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="chestxray14, mimic_cxr_jpg, six_class or cxr_phantom; or folder or table, for radiographs of your own",
    )
    parser.add_argument(
        "--source", type=Path, help="folder with the images and tables; without it chestxray14 is downloaded"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="where prepared data sets lie (default: data)"
    )
    parser.add_argument(
        "--size",
        type=_size,
        nargs="+",
        default=[None],
        help="stored sides in px, or native: all are made in one pass (default: native; the phantom's is 256)",
    )
    parser.add_argument(
        "--aspect",
        choices=("stretch", "pad"),
        help="how images become squares: stretched as the papers do (default), or in the middle of a black square",
    )
    parser.add_argument("--allow-missing", action="store_true", help="go on when images of the table are not on disk")
    parser.add_argument("--repair", action="store_true", help="make damaged shards of prepared data anew")
    parser.add_argument("--workers", type=count, help="threads; default: one a core, with --beam one a worker")
    parser.add_argument("--beam", action="store_true", help="make the shards with Apache Beam, on many machines")
    parser.add_argument(
        "--beam-options",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="Beam's, as one word: --beam-options='--runner=...'",
    )
    parser.add_argument("--patients", type=count, help="cxr_phantom: how many patients to draw (default: 2600)")
    parser.add_argument("--seed", type=int, help="cxr_phantom: of the patients (default: 0)")
    parser.add_argument("--labels", metavar="LABELLER", help="mimic_cxr_jpg: chexpert (default) or negbio")
    parser.add_argument("--name", help="folder, six_class, table: what the data set is to be called (data.dataset)")
    parser.add_argument("--table", type=Path, metavar="F", help="table: a CSV of one row an image, or .csv.gz")
    parser.add_argument("--image-column", metavar="C", help="table: the images' paths, from --source or the table on")
    parser.add_argument(
        "--label-columns", type=_names, metavar="A,B", help="table: one per finding: 1, 0, -1 (uncertain) or empty"
    )
    parser.add_argument("--class-column", metavar="C", help="table: instead, the names of exclusive classes")
    parser.add_argument(
        "--patient-column", metavar="P", help="table: who; without it no leak between parts can be noticed"
    )


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as `prepare` takes them."""
    return {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}


def count(text: str) -> int:
    """A whole number above 0, for `argparse`."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(text: str) -> int | None:
    return None if text == "native" else int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
