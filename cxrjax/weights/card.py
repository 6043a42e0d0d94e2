"""A directory of converted weights: `weights.safetensors`, and `card.json`, which says what they are."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cxrjax.errors import CxrError
from cxrjax.files import beside, write_json
from cxrjax.models.inputs import NAMED, InputSpec

CARD, WEIGHTS = "card.json", "weights.safetensors"
_FORMAT = "cxrjax weights 1"


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


def write_converted(directory: Path, card: Card, arrays: dict[str, np.ndarray]) -> Card:
    """Write weights and card, both whole or not at all; returns the card, with the SHA-256 of the weights.

    Raises:
      CxrError: `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise CxrError(f"{directory} is a file: give --out a directory")
    with beside(directory / WEIGHTS) as temporary:
        save_file(arrays, temporary)
        card = dataclasses.replace(card, sha256=sha256(temporary))
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
            entries[name] = tuple(entries[name])
        entries["options"] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entries["options"].items()
        }
        return Card(**entries)
    except FileNotFoundError:
        raise CxrError(f"{file} is missing: make it with cxrjax weights convert FILE --out {file.parent}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CxrError(f"{file} is not a card of converted weights ({error}): convert them again") from None


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def called(inputs: InputSpec) -> str:
    """What a config calls these inputs; a description where it has no name for them."""
    return next((name for name, spec in NAMED.items() if spec == inputs), str(inputs))
