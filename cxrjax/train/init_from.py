"""What a run starts from: converted weights, or the best network of another run."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cxrjax.config import Config, read, with_overrides
from cxrjax.console import print_text
from cxrjax.errors import CxrError
from cxrjax.models.network import Network
from cxrjax.train.described import best_network
from cxrjax.train.run_directory import has_checkpoint
from cxrjax.weights import Card, Converted, init_from_converted, read_converted


@dataclasses.dataclass(frozen=True)
class Start:
    """A network before training.

    Attributes:
      network: with its values.
      mark: fingerprint of the weights that it was filled with; "" for random initial values.
      fresh: modules that kept random initial values although weights were given.
    """

    network: Network
    mark: str = ""
    fresh: tuple[str, ...] = ()


def located(config: Config, directory: Path) -> Config:
    """The config with absolute paths in `model.init_from`, so that it holds in any working directory.

    Where there is nothing at those paths, and `directory` has a run to go on with that started from directories of the
    same names, its own paths are taken: it may be continued from another working directory.
    """
    entries = _entries(config.model.init_from)
    if not all(Path(place).is_dir() for _, place in entries) and has_checkpoint(directory):
        stored = _entries(read(directory / "config.json").model.init_from)
        names = [[(module, Path(place).name) for module, place in each] for each in (entries, stored)]
        entries = stored if names[0] == names[1] else entries
    texts = [f"{module}={Path(place).resolve()}" if module else str(Path(place).resolve()) for module, place in entries]
    return with_overrides(config, [f"model.init_from={', '.join(texts)}"])


def missing_init(network: Network, config: Config, directory: Path) -> Start | None:
    """What stands for a start that is not there any more, of a run that goes on from its checkpoint; else None.

    The network's values do not matter then; the mark is the one that the run noted.
    """
    gone = [place for _, place in _entries(config.model.init_from) if not Path(place).is_dir()]
    if not gone or not has_checkpoint(directory) or read(directory / "config.json").model.init_from != config.model.init_from:
        return None
    try:
        mark = json.loads((directory / "run.json").read_text())["identity"]["initial weights"]
    except (OSError, ValueError, KeyError):
        return None
    print_text(f"{gone[0]}, which this run started from, is not there any more: it goes on from its checkpoint")
    return Start(network, mark)


def initial_network(network: Network, config: Config, findings: Sequence[str]) -> Start:
    """The network filled as `model.init_from` says.

    `DIR` fills the whole network, `MODULE=DIR, MODULE=DIR` the members of one that is made of several. A directory is
    one of `cxrjax weights convert`, or a run, whose best network counts.

    Raises:
      CxrError: nothing to start from there, or it does not fit; the message names the mend.
    """
    marks, initial = [], network
    for module, directory in _entries(config.model.init_from):
        source = _source(Path(directory))
        marks.append(source[0].sha256)
        if module:
            network, notes = _fill_member(network, module, source, findings)
        else:
            options = config.model.options.to_dict()
            network, notes = init_from_converted(network, config.model.name, source, findings, options=options)
        for note in notes:
            print_text(f"{directory}: {note}")
    return Start(network, ", ".join(marks), _untouched(initial, network) if marks else ())


def _untouched(before: Network, after: Network) -> tuple[str, ...]:
    """Modules whose parameters are still the very same arrays."""
    leaves = {name: [jax.tree.leaves(of.params[name]) for of in (before, after)] for name in before.params}
    return tuple(str(name) for name, pair in leaves.items() if all(a is b for a, b in zip(*pair, strict=True)))


def _entries(text: str) -> list[tuple[str, str]]:
    text = text.strip()
    if not text or Path(text).is_dir() or not re.match(r"[a-z_]\w*\s*=", text):  # a path may hold "=" and ","
        return [("", text)] if text else []
    pairs = [(module.strip(), directory.strip()) for module, _, directory in
             (entry.partition("=") for entry in text.split(","))]  # fmt: skip
    modules = [module for module, directory in pairs if directory]
    if len(set(modules)) < len(pairs) or not all(modules):
        raise CxrError(f"config key model.init_from = {text!r}: write DIR, or MODULE=DIR, MODULE=DIR")
    return pairs


def _fill_member(
    network: Network, module: str, source: Converted, findings: Sequence[str]
) -> tuple[Network, tuple[str, ...]]:
    model = network.model()
    if module not in model.members:
        known = ", ".join(model.members) or "none"
        raise CxrError(f"config key model.init_from names {module}; the networks that this one is made of: {known}")
    card, arrays = source
    member = Network.from_model(getattr(model, module))
    filled, notes = init_from_converted(member, model.members[module], (card, model.member_arrays(module, arrays)), findings)
    params, stats = {**network.params, module: filled.params}, {**network.stats, module: filled.stats}
    return dataclasses.replace(network, params=params, stats=stats), notes


def _source(directory: Path) -> Converted:
    if (directory / "config.json").is_file():
        return _of_run(directory)
    card, arrays = read_converted(directory)
    return dataclasses.replace(card, source=str(directory)), arrays


def _of_run(directory: Path) -> Converted:
    """A run's best network as if it had been converted."""
    config, findings, network, _ = best_network(directory)
    flat = flatten_dict(network.params) | flatten_dict(network.stats)
    arrays = {".".join(map(str, path)): np.asarray(array) for path, array in flat.items()}
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    card = Card(
        architecture=config.model.name, classes=len(findings), input_spec=network.input_spec, source=str(directory),
        source_sha256="", sha256=digest.hexdigest(), labels=findings, options=config.model.options.to_dict(),
    )  # fmt: skip
    return card, arrays
