"""Converted weights, into networks: whole, or as the start of a training."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.models.registry import ARCHITECTURES
from cxrjax.weights.card import Card, called, read_converted

Converted = tuple[Card, dict[str, np.ndarray]]
_OUTPUT = "classifier.output."


def load_converted(
    directory: Path, *, dtype: Any = "float32", remat: str = "none", classes: int | None = None
) -> Network:
    """The network that a directory of converted weights describes.

    Args:
      directory: of `convert`.
      dtype: compute type.
      remat: what the backward pass recomputes: "none", "layer", "block" or "full".
      classes: for weights without a head: the number of outputs of a fresh one.

    Raises:
      CxrError: there are no such weights; they have no head and `classes` is None; they have one of another number.
    """
    card, arrays = read_converted(directory)
    if not card.classes and classes is None:
        raise CxrError(f"{directory} holds weights without a head: fine-tune them, or convert them with --head keep")
    if card.classes and classes not in (None, card.classes):
        raise CxrError(f"{directory} holds {card.classes} outputs, not {classes}: convert with --head drop")
    model = create(
        card.architecture,
        classes=card.classes or classes or 0,
        dtype=dtype,
        remat=remat,
        inputs=card.inputs,
        **card.options,
    )
    network = Network.of(model)
    left = () if card.classes else model.replaceable
    filled, faults = _fill(network, arrays, left)
    if faults:
        raise CxrError(f"{directory} does not fit {card.architecture} of this version: {faults[0]}; convert it again")
    return filled


def start_from(
    network: Network,
    architecture: str,
    source: Path | Converted,
    findings: Sequence[str],
    *,
    options: Mapping[str, Any] | None = None,
) -> tuple[Network, tuple[str, ...]]:
    """A network with converted weights in place of its initial values; what does not fit of its head stays fresh.

    Outputs are taken by name, if the weights name every finding. Modules that the family calls replaceable are taken
    if they fit. All others must fit.

    Args:
      network: with initial values, of as many outputs as there are findings.
      architecture: its name.
      source: a directory of `convert`, or a card and arrays, whose origin `card.source` names.
      findings: what its outputs mean.
      options: the network's, to be compared with those of the weights; None where nobody knows them.

    Returns:
      The network, and a line for everything that was not simply taken.

    Raises:
      CxrError: weights of another architecture, for other inputs, or of other shapes; the message names the mend.
    """
    directory = source if isinstance(source, Path) else source[0].source
    card, arrays = read_converted(source) if isinstance(source, Path) else source
    if card.architecture != architecture:
        raise CxrError(
            f"{directory} holds weights of {card.architecture}, and the network is {architecture}: "
            f"give --config.model.name={card.architecture}"
        )
    if card.inputs != network.inputs:
        raise CxrError(
            f"the weights in {directory} expect inputs {called(card.inputs)}, and the network takes "
            f"{called(network.inputs)}: give --config.model.inputs={called(card.inputs)}"
        )
    shapes = {name: leaf.shape for name, leaf in _leaves(network)}
    arrays, notes = _with_findings(card, arrays, findings)
    notes += _other_options(architecture, card.options, options) if options is not None else []
    fresh = []
    for module in network.model().replaceable:
        own = {name for name in shapes if name.split(".")[0] == module}
        if any(name not in arrays or arrays[name].shape != shapes[name] for name in own):
            fresh.append(module)
        if any(name.split(".")[0] == module for name in arrays.keys() - own):
            fresh.append(module)
    taken = {name: array for name, array in arrays.items() if name.split(".")[0] not in fresh}
    filled, faults = _fill(network, taken, fresh)
    if faults:
        told = ", ".join(f"{name}={value}" for name, value in card.options.items()) or "none"
        raise CxrError(
            f"{directory} does not fit the network: {faults[0]}"
            + (f" and {len(faults) - 1} more" if len(faults) > 1 else "")
            + f"; its options are: {told}; set model.options alike"
        )
    notes += [f"{module} starts from initial values" for module in dict.fromkeys(fresh)]
    return filled, tuple(notes)


def _other_options(architecture: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each option, but the head's, that the weights were trained with and the network does not have."""
    settings = ARCHITECTURES[architecture].settings
    both = [{**settings, **{k: tuple(v) if isinstance(v, list) else v for k, v in of.items()}} for of in (theirs, ours)]
    return [
        f"option {name} is {both[1].get(name, 'the default')} here, and was {both[0].get(name, 'the default')} there"
        for name in sorted({*both[0], *both[1]} - {"pooling", "hidden", "dropout"})
        if both[0].get(name) != both[1].get(name)
    ]


def _with_findings(
    card: Card, arrays: dict[str, np.ndarray], findings: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays with the outputs of these findings, in their order; without any where the weights lack one."""
    if not card.classes:
        return arrays, ["the weights have no head"]
    absent = [finding for finding in findings if finding not in card.labels]
    if absent:
        said = f"no output for {', '.join(absent)}" if card.labels else f"no names for their {card.classes} outputs"
        return {name: array for name, array in arrays.items() if not name.startswith(_OUTPUT)}, [
            f"the weights have {said}"
        ]
    columns = [card.labels.index(finding) for finding in findings]
    return {name: array[..., columns] if name.startswith(_OUTPUT) else array for name, array in arrays.items()}, [
        f"the outputs for {', '.join(findings)} are those of the weights"
    ]


def _leaves(network: Network) -> list[tuple[str, jax.Array]]:
    """The network's arrays by dotted path."""
    flat, _ = jax.tree_util.tree_flatten_with_path((network.params, network.stats))
    return [(".".join(str(entry.key) for entry in path[1:]), leaf) for path, leaf in flat]


def _fill(network: Network, arrays: dict[str, np.ndarray], left: Sequence[str]) -> tuple[Network, list[str]]:
    """The network with these arrays in it, and all that does not fit; modules in `left` may lack arrays."""
    leaves, faults, values = _leaves(network), [], []
    for name, leaf in leaves:
        array = arrays.get(name)
        if array is None and name.split(".")[0] not in left:
            faults.append(f"{name} is missing")
        elif array is not None and array.shape != leaf.shape:
            faults.append(f"{name} has shape {array.shape}, and the network's has {leaf.shape}")
        values.append(leaf if array is None else jnp.array(array, leaf.dtype))
    faults += [f"{name} is not in the network" for name in sorted(arrays.keys() - {name for name, _ in leaves})]
    tree = jax.tree.structure((network.params, network.stats))
    params, stats = jax.tree.unflatten(tree, values)
    return dataclasses.replace(network, params=params, stats=stats), faults
