"""What a run starts from: random weights, converted weights, or the best network of another run."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cxrjax.config import Config, read_config
from cxrjax.console import print_text
from cxrjax.errors import CxrError
from cxrjax.models.network import Network
from cxrjax.train.run_directory import has_checkpoint, load_best_network
from cxrjax.weights import Card, Converted, init_from_converted, read_converted


@dataclasses.dataclass(frozen=True)
class InitialNetwork:
    """A network before training.

    Attributes:
      network: the network with its initial weights.
      fingerprint: of the weights it was loaded with; "" for random weights.
      random_modules: modules that kept random weights although weights were loaded.
    """

    network: Network
    fingerprint: str = ""
    random_modules: tuple[str, ...] = ()


def resolve_init_paths(config: Config, directory: Path) -> Config:
    """Return the config with absolute paths in `model.init_from` and `model.init_members`.

    If these paths do not exist and `directory` has a run that started from directories of the same names, the paths of
    that run are used: it may be resumed from another working directory.
    """
    sources = _sources(config)
    if not all(path.is_dir() for path in sources.values()) and has_checkpoint(directory):
        stored = _sources(read_config(directory / "config.json"))
        if {name: path.name for name, path in stored.items()} == {name: path.name for name, path in sources.items()}:
            sources = stored
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        for member, path in sources.items():
            if member:
                resolved.model.init_members[member] = str(path.resolve())
            else:
                resolved.model.init_from = str(path.resolve())
    return resolved


def missing_init(network: Network, config: Config, directory: Path) -> InitialNetwork | None:
    """Return a placeholder if a resumed run started from a directory that no longer exists; else None.

    The checkpoint replaces the placeholder's weights; its fingerprint is the one stored with the run.
    """
    sources = _sources(config)
    missing = [path for path in sources.values() if not path.is_dir()]
    if not missing or not has_checkpoint(directory) or _sources(read_config(directory / "config.json")) != sources:
        return None
    try:
        fingerprint = json.loads((directory / "run.json").read_text())["identity"]["initial weights"]
    except (OSError, ValueError, KeyError):
        return None
    print_text(f"{missing[0]}, which this run started from, no longer exists: resuming from the checkpoint")
    return InitialNetwork(network, fingerprint)


def load_initial_network(network: Network, config: Config, findings: Sequence[str]) -> InitialNetwork:
    """Load the weights that `model.init_from` or `model.init_members` name.

    A directory is one of `cxrjax weights convert`, or a run, whose best network is taken.

    Raises:
      CxrError: the directory has no weights, or they do not fit; the message says what to change.
    """
    fingerprints, untrained = [], network
    for member, path in _sources(config).items():
        card, arrays = _read_source(path)
        fingerprints.append(card.sha256)
        if member:
            network, notes = _load_member(network, member, (card, arrays), findings)
        else:
            options = config.model.options.to_dict()
            network, notes = init_from_converted(network, config.model.name, (card, arrays), findings, options=options)
        for note in notes:
            print_text(f"{path}: {note}")
    random_modules = _unchanged_modules(untrained, network) if fingerprints else ()
    return InitialNetwork(network, ", ".join(fingerprints), random_modules)


def _sources(config: Config) -> Mapping[str, Path]:
    """The directories to load, by the member that each is for; "" is the whole network."""
    members = config.model.init_members.to_dict()
    if config.model.init_from and members:
        raise CxrError("config keys model.init_from and model.init_members are both set: keep one of them")
    paths = members or ({"": config.model.init_from} if config.model.init_from else {})
    return {member: Path(path) for member, path in paths.items() if path}


def _unchanged_modules(before: Network, after: Network) -> tuple[str, ...]:
    """Modules whose parameters are still the very same arrays."""
    leaves = {name: [jax.tree.leaves(network.params[name]) for network in (before, after)] for name in before.params}
    return tuple(str(name) for name, pair in leaves.items() if all(a is b for a, b in zip(*pair, strict=True)))


def _load_member(
    network: Network, name: str, source: Converted, findings: Sequence[str]
) -> tuple[Network, tuple[str, ...]]:
    model = network.model()
    if name not in model.members:
        members = ", ".join(model.members) or "none"
        raise CxrError(f"config key model.init_members names {name}; the members of this network are: {members}")
    card, arrays = source
    member = Network.from_model(getattr(model, name))
    converted = (card, model.member_arrays(name, arrays))
    loaded, notes = init_from_converted(member, model.members[name], converted, findings)
    params, stats = {**network.params, name: loaded.params}, {**network.stats, name: loaded.stats}
    return dataclasses.replace(network, params=params, stats=stats), notes


def _read_source(directory: Path) -> Converted:
    if (directory / "config.json").is_file():
        return _read_run(directory)
    card, arrays = read_converted(directory)
    return dataclasses.replace(card, source=str(directory)), arrays


def _read_run(directory: Path) -> Converted:
    """The best network of a run, in the form of converted weights."""
    config, findings, network, _ = load_best_network(directory)
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
