"""A directory of converted weights: `weights.safetensors`, and `card.json`, which describes them."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.models import ARCHITECTURES, create
from cxrjax.models.input_spec import InputSpec, input_spec_name
from cxrjax.models.network import Network

CARD, WEIGHTS = "card.json", "weights.safetensors"
_FORMAT = "cxrjax weights 2"
_OUTPUT = "classifier.output."
_HEAD_OPTIONS = {"pooling", "hidden", "dropout"}
_CREATE_ARGUMENTS = {"classes", "dtype", "input_spec", "name", "remat", "seed"}  # of `create`, not a family's options


@dataclass(frozen=True)
class Card:
    """Description of converted weights.

    Attributes:
      architecture: name of the network, for `cxrjax.models.create`.
      classes: number of outputs; 0 if the head was dropped.
      input_spec: what the network expects of its images.
      source: name of the original file.
      source_sha256: its checksum.
      sha256: checksum of `weights.safetensors`.
      options: options of the architecture, where they are not its defaults.
      labels: names of the outputs, an empty one for an output without a meaning; () if they have none.
      notes: what the conversion changed.
    """

    architecture: str
    classes: int
    input_spec: InputSpec
    source: str
    source_sha256: str
    sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the card for JSON."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}


Converted = tuple[Card, dict[str, np.ndarray]]
"""A card, and the arrays by our dotted paths, in our layout."""


def check_destination(directory: Path, file: Path, architecture: str) -> None:
    """Raise a `CxrError` if converting `file` into `directory` would overwrite anything but the same conversion."""
    if directory.exists() and not directory.is_dir():
        raise CxrError(f"{directory} is a file: give --out a directory")
    if (directory / WEIGHTS).resolve() == file.resolve():
        raise CxrError(f"{file} would be overwritten: give another --out")
    if (directory / "config.json").exists():
        raise CxrError(f"{directory} is the directory of a run: give another --out")
    if (directory / CARD).exists():
        try:
            card = _read_card(directory / CARD)
        except CxrError:
            raise CxrError(f"{directory} holds a {CARD} that cannot be read: give another --out") from None
        if (card.architecture, card.source_sha256) != (architecture, sha256(file)):
            raise CxrError(f"{directory} holds {card.architecture} from {card.source} already: give another --out")
    elif (directory / WEIGHTS).exists():
        raise CxrError(f"{directory} holds a {WEIGHTS} without a {CARD}: give another --out")


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `directory` when the block succeeds, the card last."""
    is_new = not directory.exists()
    staging = directory / f".{os.getpid()}.partial"  # inside: `directory` may be its own file system
    try:
        staging.mkdir(parents=True, exist_ok=True)
        yield staging
        for file in sorted(staging.iterdir(), key=lambda file: (file.name == CARD, file.name)):
            os.replace(file, directory / file.name)
    except BaseException:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):
            shutil.rmtree(staging)


def write_converted(directory: Path, card: Card, arrays: dict[str, np.ndarray]) -> Card:
    """Write weights and card; return the card with the SHA-256 of the weights."""
    save_file(arrays, directory / WEIGHTS)
    card = dataclasses.replace(card, sha256=sha256(directory / WEIGHTS))
    write_json(directory / CARD, card.as_dict())
    return card


def read_converted(directory: Path) -> Converted:
    """Read card and arrays.

    Raises:
      CxrError: there are no converted weights, they are damaged, or the card is not of these weights.
    """
    card = _read_card(Path(directory) / CARD)
    file = Path(directory) / WEIGHTS
    try:
        if sha256(file) != card.sha256:
            raise CxrError(f"{file} is not the file that {CARD} describes: convert the weights again")
        return card, load_file(file)
    except (OSError, SafetensorError) as error:
        raise CxrError(f"{file} cannot be read ({error}): convert the weights again") from None


def _read_card(file: Path) -> Card:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if entries.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        entries["input_spec"] = InputSpec(**entries["input_spec"])
        for name in ("labels", "notes"):
            if not isinstance(entries[name], list) or not all(isinstance(text, str) for text in entries[name]):
                raise ValueError(f"its {name} are not a list of texts")
            entries[name] = tuple(entries[name])
        classes, labels = entries["classes"], entries["labels"]
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
            raise ValueError(f"its classes are {classes!r:.40}")
        if len(labels) not in (0, classes):
            raise ValueError(f"it has {len(labels)} labels for {classes} outputs")
        check_architecture_options(entries["options"])
        entries["options"] = _as_tuples(entries["options"])
        return Card(**entries)
    except FileNotFoundError:
        raise CxrError(f"{file} is missing: make it with cxrjax weights convert FILE --out {file.parent}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CxrError) as error:
        raise CxrError(f"{file} is not a card of converted weights ({error}): convert them again") from None


def _as_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def check_architecture_options(options: Mapping[str, Any]) -> None:
    """Raise a `CxrError` for options that are not the architecture's own, or that a card cannot hold."""
    for option in options:
        if option in _CREATE_ARGUMENTS:
            raise CxrError(f"{option} is not an option of an architecture: leave it out")
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CxrError(f"options must be numbers, texts, and lists of them: {error}") from None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_converted(directory: Path) -> Network:
    """Return the float32 network of a directory that `convert` wrote.

    Raises:
      CxrError: there are no such weights, or they have no head.
    """
    card, arrays = read_converted(directory)
    if not card.classes:
        raise CxrError(f"{directory} holds weights without a head: fine-tune them, or convert them with --head keep")
    model = create(card.architecture, classes=card.classes, input_spec=card.input_spec, **card.options)
    network, faults = _fill(Network.from_model(model), arrays, ())
    if faults:
        raise CxrError(f"{directory} does not fit {card.architecture} of this version: {faults[0]}; convert it again")
    return network


def init_from_converted(
    network: Network,
    architecture: str,
    source: Path | Converted,
    findings: Sequence[str],
    *,
    options: Mapping[str, Any] | None = None,
) -> tuple[Network, tuple[str, ...]]:
    """Replace a network's initial values by converted weights; what does not fit of the head stays initial.

    Outputs are taken by name, if the weights have one for every finding. Modules that the family calls replaceable are
    taken if they fit. All others must fit.

    Args:
      network: with initial values, and as many outputs as findings.
      architecture: its name.
      source: a directory written by `convert`, or card and arrays, whose origin is `card.source`.
      findings: meaning of its outputs.
      options: the network's, to be compared with those of the weights; None if they are not known.

    Returns:
      The network, and a line for everything that was not simply taken.

    Raises:
      CxrError: weights of another architecture, for other inputs, or of other shapes; the message says what to do.
    """
    directory = source if isinstance(source, Path) else source[0].source
    card, arrays = read_converted(source) if isinstance(source, Path) else source
    if card.architecture != architecture:
        raise CxrError(
            f"{directory} holds weights of {card.architecture}, and the network is {architecture}: "
            f"set --config.model.name={card.architecture}"
        )
    if card.input_spec != network.input_spec:
        expected = input_spec_name(card.input_spec)
        raise CxrError(
            f"the weights in {directory} expect inputs {expected}, and the network takes "
            f"{input_spec_name(network.input_spec)}: set --config.model.input_spec={expected}"
        )
    shapes = {name: leaf.shape for name, leaf in _leaves(network)}
    arrays, notes = _select_outputs(card, arrays, findings)
    notes += _compare_options(architecture, card.options, options) if options is not None else []
    initial = []
    for module in network.model().replaceable:
        expected = {name for name in shapes if name.split(".")[0] == module}
        present = {name for name in arrays if name.split(".")[0] == module}
        if present != expected or any(arrays[name].shape != shapes[name] for name in expected):
            initial.append(module)
    arrays = {name: array for name, array in arrays.items() if name.split(".")[0] not in initial}
    filled, faults = _fill(network, arrays, initial)
    if faults:
        trained_with = ", ".join(f"{name}={value}" for name, value in card.options.items()) or "none"
        raise CxrError(
            f"{directory} does not fit the network: {faults[0]}"
            + (f" and {len(faults) - 1} more" if len(faults) > 1 else "")
            + f"; its options are: {trained_with}; set model.options to the same"
        )
    notes += [f"{module} starts from initial values" for module in initial]
    return filled, tuple(notes)


def _compare_options(architecture: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return a line for each option, except the head's, that differs from the one the weights were trained with."""
    defaults = ARCHITECTURES[architecture].options
    theirs, ours = ({**defaults, **_as_tuples(options)} for options in (theirs, ours))
    return [
        f"option {name} is {ours.get(name, 'the default')} here, and was {theirs.get(name, 'the default')} there"
        for name in sorted({*theirs, *ours} - _HEAD_OPTIONS)
        if theirs.get(name) != ours.get(name)
    ]


def _select_outputs(
    card: Card, arrays: dict[str, np.ndarray], findings: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays with these findings' outputs, in their order; without outputs if one is missing."""
    if not card.classes:
        return arrays, ["the weights have no head"]
    absent = [finding for finding in findings if finding not in card.labels]
    if absent:
        lacking = f"no output for {', '.join(absent)}" if card.labels else f"no names for their {card.classes} outputs"
        body = {name: array for name, array in arrays.items() if not name.startswith(_OUTPUT)}
        return body, [f"the weights have {lacking}"]
    columns = [card.labels.index(finding) for finding in findings]
    selected = {name: array[..., columns] if name.startswith(_OUTPUT) else array for name, array in arrays.items()}
    return selected, [f"the outputs for {', '.join(findings)} are those of the weights"]


def _leaves(network: Network) -> list[tuple[str, jax.Array]]:
    """The network's arrays by dotted path."""
    flat, _ = jax.tree_util.tree_flatten_with_path((network.params, network.stats))
    return [(".".join(str(entry.key) for entry in path[1:]), leaf) for path, leaf in flat]


def _fill(network: Network, arrays: dict[str, np.ndarray], optional: Sequence[str]) -> tuple[Network, list[str]]:
    """Return the network with these arrays, and all that does not fit; modules in `optional` may lack arrays."""
    leaves, faults, values = _leaves(network), [], []
    for name, leaf in leaves:
        array = arrays.get(name)
        if array is None and name.split(".")[0] not in optional:
            faults.append(f"{name} is missing")
        elif array is not None and array.shape != leaf.shape:
            faults.append(f"{name} has shape {array.shape}, and the network's has {leaf.shape}")
        values.append(leaf if array is None else jnp.array(array, leaf.dtype))
    faults += [f"{name} is not in the network" for name in sorted(arrays.keys() - {name for name, _ in leaves})]
    tree = jax.tree.structure((network.params, network.stats))
    params, stats = jax.tree.unflatten(tree, values)
    return dataclasses.replace(network, params=params, stats=stats), faults
