"""Convert published PyTorch or safetensors weights.

Every key is loaded, or listed with the reason it was skipped.
"""

import argparse
import ast
from pathlib import Path
from typing import Any

from cxrjax.cli.arguments import read_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `weights`."""
    parser.add_argument("what", choices=("convert",), metavar="convert", help="write weights.safetensors and card.json")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a safetensors or PyTorch file; its pickled code is never executed"
    )
    parser.add_argument("--arch", required=True, metavar="NAME", help="the network of the weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output directory")
    parser.add_argument(
        "--head", choices=("keep", "drop"), default="keep", help="keep or drop the classification head (default: keep)"
    )
    parser.add_argument(
        "--labels", default="", metavar="A,B,...", help="findings of the outputs, or a file with one per line"
    )
    parser.add_argument(
        "--inputs", metavar="NAME", help="input specification of the weights: imagenet, unit, grey or xrv"
    )
    parser.add_argument("--channels", type=int, choices=(1,), help="fold the first convolution to 1 channel")
    parser.add_argument(
        "--option", type=_key_value, action="append", default=[], metavar="KEY=VALUE",
        help="an option of the network; repeatable",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert the file and print what was loaded and skipped."""
    from cxrjax.console import print_text
    from cxrjax.weights import convert

    report = convert(
        arguments.file, arguments.arch, arguments.out, head=arguments.head, labels=read_names(arguments.labels),
        input_spec=arguments.inputs, channels=arguments.channels, options=dict(arguments.option),
    )  # fmt: skip
    for line in report.lines():
        print_text(line)
    return report.as_dict()


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
