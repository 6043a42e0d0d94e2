"""One config for every run: defaults, recipes that change some of them, and checked overrides.

A recipe is a Python file with `get_config(arg="")` that starts from `default()`, changes values and returns the result.
`config_keys.py` has all keys.
"""

import ast
import difflib
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from cxrjax.config_keys import KEYS, Group, Key, find_group, find_key
from cxrjax.errors import CxrError

Config: TypeAlias = Any  # a ConfigDict; type checkers cannot know its attributes

_PACKAGE = Path(__file__).resolve().parent
RECIPES = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
"""The recipes that come with the project: inside the package in a wheel, at the top of the tree in a clone."""


def default() -> Config:
    """Return the config with every key at its default."""
    config: Config = ConfigDict()
    for name, key in KEYS.items():
        *groups, leaf = name.split(".")
        node = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict()
            node = node[group]
        node[leaf] = ConfigDict() if isinstance(key, Group) else key.default
    config.lock()
    return _unlock_groups(config)


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
      spec: `FILE` or `FILE:ARG`; a bare name means a recipe that comes with the project.
      overrides: `key=value` or `--config.key=value`, see `with_overrides`.

    Raises:
      CxrError: no such file, an unknown key (with the nearest known one), a value of the wrong type.
    """
    path, _, argument = spec.partition(":")
    file = next((f for f in (Path(path), RECIPES / f"{path}.py") if f.is_file()), None)
    if file is None:
        names = ", ".join(sorted(f.stem for f in RECIPES.glob("[a-z]*.py")))
        raise CxrError(f"no config file {path}; the recipes of the project are {names}")
    try:
        recipe = runpy.run_path(str(file)).get("get_config")
        if recipe is None:
            raise CxrError(f"{file} has no function get_config(arg='')")
        config = recipe(argument)
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise CxrError(f"{file}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise CxrError(f"{file}: get_config returned {type(config).__name__}, not a ConfigDict: start from default()")
    _reject_unknown(config, str(file))
    missing = [name for name, key in KEYS.items() if isinstance(key, Key) and name not in flatten(config)]
    if missing:
        raise CxrError(f"{file}: the config lacks {', '.join(missing)}: start from cxrjax.config.default()")
    return with_overrides(config, overrides)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a checked copy of a config with some keys changed.

    Args:
      config: remains unchanged.
      overrides: `key=value`. A tuple may be given as `PA,AP` or in Python's syntax, a whole group as a dict.
    """
    changed = config.copy_and_resolve_references()
    for override in overrides:
        name, equals, text = override.removeprefix("--config.").partition("=")
        if not equals:
            raise CxrError(f"override --config.{name} has no value: write --config.{name}=VALUE")
        _set(changed, name, _parse(name, text))
    return validate(changed)


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a checked copy of a config with the keys of a nested config changed, such as a stage of `train.stages`."""
    changed = config.copy_and_resolve_references()
    for name, value in flatten(ConfigDict(dict(changes))).items():
        _set(changed, name, value)
    return validate(changed)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into overrides, as `--config.key=value`, and the rest; `--config.key value` counts as one too."""
    overrides, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            value = next(arguments, None)
            overrides.append(argument if value is None else f"{argument}={value}")
    return overrides, rest


def read_config(file: Path) -> Config:
    """Read the `config.json` of a run; keys that it lacks have their defaults."""
    try:
        stored = json.loads(file.read_text())
    except FileNotFoundError:
        raise CxrError(f"{file} is missing: {file.parent} is not the directory of a run") from None
    except json.JSONDecodeError as error:
        raise CxrError(f"{file} is not JSON ({error}): restore it, or train again in another directory") from None
    _reject_unknown(ConfigDict(stored), str(file))
    return from_dict(stored)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Return the config with these nested values; lists, which is what JSON has, become tuples."""
    return with_changes(default(), values)


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Return the config as `{'a.b': value}`; an empty group has no entry."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return flat


def validate(config: Config) -> Config:
    """Check every value against its key, converting it to the key's type in place; return the config.

    Raises:
      CxrError: an unknown key, None, NaN, a value of the wrong type or out of range.
    """
    _reject_unknown(config, "")
    for name, value in flatten(config).items():
        key = find_key(name)
        if key is not None:
            _set(config, name, value)
        elif value is None or value != value:
            raise CxrError(f"config key {name} is {value}: give a number, a string, a bool or a tuple")
    return _unlock_groups(config)


def image_size(text: str | int) -> int:
    """Return the side of the images in px that a recipe's argument says."""
    if not str(text).isdecimal():
        raise ValueError(f"the argument is the side of the images in px, such as 256, not {text}")
    return int(text)


def use_phantom(config: Config, *, size: int = 64) -> Config:
    """Change a recipe to the phantom (`cxrjax prepare cxr_phantom --size 64`), short enough for two CPU cores."""
    config.title = f"{config.title}: phantom"
    config.data.dataset = "cxr_phantom"
    config.data.stored_size = str(size)
    config.data.image_size = size
    config.split.name = "official"
    config.split.subset_fraction = 1.0
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.init_from = ""
    config.model.init_members = {}
    config.train.batch_size = 16
    config.train.steps_per_epoch = 0
    config.train.epochs = 3
    config.evaluate.batch_size = 100
    config.mesh.data = 1
    return config


def _reject_unknown(config: Config, where: str) -> None:
    for name in flatten(config):
        try:
            find_key(name)
        except KeyError:
            raise CxrError(f"{where}: {_unknown(name)}" if where else _unknown(name)) from None


def _unknown(name: str) -> str:
    group = find_group(name)
    prefix = f"{group}.{name.removeprefix(f'{group}.').partition('.')[0]}." if group else ""
    inside = name.removeprefix(prefix)
    leaves = {key.rpartition(".")[2]: key for key in KEYS}
    near = difflib.get_close_matches(inside, list(KEYS), 1, 0.5)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(inside.rpartition(".")[2], list(leaves), 1, 0.5)]
    if group and (not near or near[0] == inside):
        return f"unknown config key {name}: {group} holds {KEYS[group].meaning}"
    hint = f"did you mean {prefix}{near[0]}?" if near else "`cxrjax config RECIPE` lists all keys"
    return f"unknown config key {name}; {hint}"


def _parse(name: str, text: str) -> Any:
    """The value that an override's text has for this key."""
    try:
        key = find_key(name)
    except KeyError:
        if any(other == name or other.startswith(f"{name}.") for other in KEYS) or find_group(name):
            return _literal(text)
        raise CxrError(_unknown(name)) from None
    if key is not None and isinstance(key.default, str):
        return text
    if key is not None and isinstance(key.default, tuple) and not text.strip().startswith(("(", "[")):
        items = [item.strip() for item in text.split(",") if item.strip()]
        return tuple(item.strip("'\"") if key.element is str else _literal(item) for item in items)
    value = _literal(text)
    if key is not None and isinstance(key.default, tuple) and not isinstance(value, tuple | list):
        return (value,)  # ("PA") is a string in Python
    return value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _unlock_groups(config: Config) -> Config:
    """Let the user choose the entries of groups; everything else stays locked."""
    for name, key in KEYS.items():
        if isinstance(key, Group):
            node = config
            for part in name.split("."):
                node = node[part]
            node.unlock()
    return config


def _set(config: Config, name: str, value: Any) -> None:
    *groups, leaf = name.split(".")
    node: Any = config
    for depth, group in enumerate(groups, start=1):
        if group not in node:  # inside a group whose entries the user chooses
            with node.unlocked():
                node[group] = ConfigDict()
        node = node[group]
        if not isinstance(node, ConfigDict):
            above = ".".join(groups[:depth])
            raise CxrError(f"config key {name} is inside {above}, which is {node!r} and holds no keys")
    held: Any = node.get(leaf)
    if isinstance(held, ConfigDict) != isinstance(value, dict | ConfigDict) and leaf in node:
        inside = f"holds keys ({', '.join(held) or 'none'})" if isinstance(held, ConfigDict) else "holds no keys"
        raise CxrError(f"config key {name} {inside}: it cannot be set to {value!r}")
    try:
        key = find_key(name)
    except KeyError:  # a whole group, or an unknown key; `validate` checks what is inside
        key = None
    value = tuple(value) if isinstance(value, list) else value  # as JSON has tuples
    with node.unlocked(), node.ignore_type():
        node[leaf] = ConfigDict(value) if isinstance(value, dict) else key.check(name, value) if key else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())
