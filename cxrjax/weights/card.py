"""A directory of converted weights: `weights.safetensors`, and `card.json`, which says what they are."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.models.inputs import NAMED, InputSpec

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
