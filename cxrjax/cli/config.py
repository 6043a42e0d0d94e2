"""Print the resolved config of a recipe: every key with its value and meaning.

Keys that differ from their default are marked with *.
"""

import argparse
from typing import Any

from cxrjax.cli.arguments import add_overrides_help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `config`."""
    parser.add_argument(
        "config", metavar="RECIPE[:ARG]", help="a recipe in configs/, or a Python file with get_config()"
    )
    add_overrides_help(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the config; returns it as nested dicts."""
    from cxrjax.config import flatten, load_config
    from cxrjax.config_keys import KEYS, Group, find_group

    config = load_config(arguments.config, arguments.overrides)
    flat = flatten(config)
    for name, key in KEYS.items():
        if isinstance(key, Group):
            entries = {entry: value for entry, value in flat.items() if find_group(entry) == name}
            _print_key(name, "{...}" if entries else "{}", key.meaning, changed=bool(entries))
            for entry, value in entries.items():
                _print_key(entry, repr(value), "", changed=True)
        else:
            _print_key(name, repr(flat[name]), key.meaning, changed=flat[name] != key.default)
    return config.to_dict()


def _print_key(name: str, value: str, meaning: str, *, changed: bool) -> None:
    from cxrjax.console import print_text

    print_text(f"{'*' if changed else ' '} {name} = {value}".ljust(50) + (f"  # {meaning}" if meaning else ""))
