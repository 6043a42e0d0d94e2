"""What a run starts from: converted weights, or the best network of another run."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from cxrjax.config import Config, read
from cxrjax.console import say
from cxrjax.errors import CxrError
from cxrjax.models.network import Network
from cxrjax.train.checkpoint import Checkpoints
from cxrjax.train.described import findings_of, network_of
from cxrjax.weights import Card, Converted, read_converted, start_from


def initial_network(network: Network, config: Config, findings: Sequence[str]) -> tuple[Network, str]:
    """The network filled as `model.init_from` says, and a fingerprint of what it was filled with.

    `DIR` fills the whole network, `MODULE=DIR, MODULE=DIR` the members of one that is made of several. A directory is
    one of `cxrjax weights convert`, or a run, whose best network counts.

    Raises:
      CxrError: nothing to start from there, or it does not fit; the message names the mend.
    """
    marks = []
    for module, directory in _entries(config.model.init_from):
        source = _source(Path(directory))
        marks.append(source[0].sha256)
        if module:
            network, notes = _fill_member(network, module, source, findings)
        else:
            network, notes = start_from(network, config.model.name, source, findings)
        for note in notes:
            say(f"{directory}: {note}")
    return network, ", ".join(marks)


def _entries(text: str) -> list[tuple[str, str]]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    pairs = [(module, directory) if found else ("", module) for module, found, directory in
             (entry.partition("=") for entry in entries)]  # fmt: skip
    if len(pairs) > 1 and not all(module for module, _ in pairs):
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
    member = Network.of(getattr(model, module))
    filled, notes = start_from(member, model.members[module], (card, model.adapt(module, arrays)), findings)
    params, stats = {**network.params, module: filled.params}, {**network.stats, module: filled.stats}
    return dataclasses.replace(network, params=params, stats=stats), notes


def _source(directory: Path) -> Converted:
    if (directory / "config.json").is_file():
        return _of_run(directory)
    card, arrays = read_converted(directory)
    return dataclasses.replace(card, source=str(directory)), arrays


def _of_run(directory: Path) -> Converted:
    """A run's best network as if it had been converted."""
    config, findings = read(directory / "config.json"), findings_of(directory)
    network = network_of(config, len(findings))
    with Checkpoints(directory / "checkpoints", reading=True) as checkpoints:
        best, _ = checkpoints.restore_best({"params": network.params, "stats": network.stats})
    flat = flatten_dict(best["params"]) | flatten_dict(best["stats"])
    arrays = {".".join(map(str, path)): np.asarray(array) for path, array in flat.items()}
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    card = Card(
        architecture=config.model.name, classes=len(findings), inputs=network.inputs, source=str(directory),
        source_sha256="", sha256=digest.hexdigest(), labels=findings,
    )  # fmt: skip
    return card, arrays
