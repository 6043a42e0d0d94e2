"""A directory of converted weights: `weights.safetensors`, and `card.json`, which says what they are."""

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
from cxrjax.models import create
from cxrjax.models.input_spec import NAMED, InputSpec
from cxrjax.models.network import Network
from cxrjax.models.registry import ARCHITECTURES

CARD, WEIGHTS = "card.json", "weights.safetensors"
_FORMAT = "cxrjax weights 1"
_COMMON = {"classes", "dtype", "inputs", "name", "remat", "seed"}  # what `create` takes beside a family's options


@dataclass(frozen=True)
class Card:
    """What converted weights are.

    Attributes:
      architecture: the name of the network, as `cxrjax.models.create` takes it.
      classes: number of outputs; 0 where the head was dropped.
      inputs: what the network expects of its images.
      source: name of the file that they came from.
      source_sha256: of that file.
      sha256: of `weights.safetensors`.
      options: of the architecture, where they are not its defaults.
      labels: names of the outputs, an empty one for an output that means nothing; none where nobody gave them.
      notes: what the conversion changed.
    """

    architecture: str
    classes: int
    inputs: InputSpec
    source: str
    source_sha256: str
    sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}


def check_destination(directory: Path, file: Path, architecture: str) -> None:
    """Raise a `CxrError` if converting `file` into `directory` would write over anything but the same conversion."""
    if directory.exists() and not directory.is_dir():
        raise CxrError(f"{directory} is a file: give --out a directory")
    if (directory / WEIGHTS).resolve() == file.resolve():
        raise CxrError(f"{file} would be written over: give another --out")
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
def together(directory: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `directory` when the block ends well, the card last."""
    new = not directory.exists()
    temporary = directory / f".{os.getpid()}.partial"  # inside: `directory` may be a file system of its own
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == CARD, file.name)):
            os.replace(file, directory / file.name)
    except BaseException:
        if new:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)


def write_converted(directory: Path, card: Card, arrays: dict[str, np.ndarray]) -> Card:
    """Write weights and card; returns the card, with the SHA-256 of the weights."""
    save_file(arrays, directory / WEIGHTS)
    card = dataclasses.replace(card, sha256=sha256(directory / WEIGHTS))
    write_json(directory / CARD, card.as_dict())
    return card


def read_converted(directory: Path) -> tuple[Card, dict[str, np.ndarray]]:
    """The card, and the arrays by our dotted paths, in our layout.

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
        entries["inputs"] = InputSpec(**entries["inputs"])
        for name in ("labels", "notes"):
            if not isinstance(entries[name], list) or not all(isinstance(each, str) for each in entries[name]):
                raise ValueError(f"its {name} are not a list of texts")
            entries[name] = tuple(entries[name])
        classes, labels = entries["classes"], entries["labels"]
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
            raise ValueError(f"its classes are {classes!r:.40}")
        if len(labels) not in (0, classes):
            raise ValueError(f"it has {len(labels)} labels for {classes} outputs")
        check_options(entries["options"])
        entries["options"] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entries["options"].items()
        }
        return Card(**entries)
    except FileNotFoundError:
        raise CxrError(f"{file} is missing: make it with cxrjax weights convert FILE --out {file.parent}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CxrError) as error:
        raise CxrError(f"{file} is not a card of converted weights ({error}): convert them again") from None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a `CxrError` for options that are not the architecture's own, or that no card can hold."""
    for option in options:
        if option in _COMMON:
            raise CxrError(f"{option} is no option of an architecture: leave it out")
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CxrError(f"options must be numbers, texts, and lists of them: {error}") from None


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def called(inputs: InputSpec) -> str:
    """What a config calls these inputs; a description where it has no name for them."""
    return next((name for name, spec in NAMED.items() if spec == inputs), str(inputs))


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
    network = Network.from_model(model)
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
