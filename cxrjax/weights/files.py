"""Any file of weights: what it is, by its content, and the arrays in it by name."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cxrjax.errors import CxrError
from cxrjax.weights.pickles import Record
from cxrjax.weights.torchfile import LEGACY_MAGIC, ZIP_MAGIC, Tensor, read_torch

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params")
_DEPTH = 64  # of modules in modules
_MOST = 200_000  # modules, counted twice, and arrays in a module


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
      format: "safetensors", "PyTorch ZIP" or "PyTorch legacy".
      arrays: by the file's names, in the file's types; they may be views of the file.
      wrapper: where in the file they were, such as "state_dict"; empty where nothing is around them.
      beside: what else the file holds.
      module: the class of a whole module that was saved; empty for a plain state dict.
      labels: what the module says of its outputs, empty where it says nothing.
    """

    format: str
    arrays: dict[str, np.ndarray]
    wrapper: str = ""
    beside: tuple[str, ...] = ()
    module: str = ""
    labels: tuple[str, ...] = ()


def read_weights(file: Path, *, restricted: bool = False) -> dict[str, np.ndarray]:
    """The arrays in a safetensors or PyTorch file, by its own names; nothing in the file is executed.

    Raises:
      CxrError: as `read_contents`.
    """
    return read_contents(file, restricted=restricted).arrays


def read_contents(file: Path, *, restricted: bool = False) -> Contents:
    """All that is in a file of weights; its content decides what it is, not its name.

    Args:
      file: safetensors, or what `torch.save` wrote of a state dict, of a dict around one, or of a whole module.
      restricted: read PyTorch's files with the reader here, even where PyTorch is installed.

    Raises:
      CxrError: there is no such file; it is of another kind, damaged, or holds code; it holds no weights, or several.
    """
    file = Path(file)
    if not file.is_file():
        raise CxrError(f"there is no file {file}")
    with file.open("rb") as stream:
        head = stream.read(512)
    try:
        return _contents(file, head, restricted)
    except CxrError as error:
        raise CxrError(_one_line(str(error))) from None


def _contents(file: Path, head: bytes, restricted: bool) -> Contents:
    if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        form = "PyTorch ZIP" if head.startswith(ZIP_MAGIC) else "PyTorch legacy"
        return _of_torch(file, form, read_torch(file, restricted=restricted))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= file.stat().st_size:
        arrays = _safetensors(file)
        return Contents("safetensors", {_name(file, name): array for name, array in arrays.items()})
    raise CxrError(f"{file} {_what_it_is(head)}")


def _one_line(text: str) -> str:
    """Without line breaks, and what else in a file's names could play tricks on a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _name(file: Path, name: str) -> str:
    """A name of an array, which must be one that can be shown."""
    if not name.isprintable():
        raise CxrError(f"{file} is damaged: an array is called {name[:80]!r}")
    return name


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise CxrError(f"{file} is a damaged safetensors file ({str(error)[:200]}): fetch it again") from None


def _what_it_is(head: bytes) -> str:
    """Why a file without the marks of weights is none."""
    if not head:
        return "is empty: fetch it again"
    if head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "is a pickle that torch.save did not write: nothing was run; save its arrays as safetensors"
    if head[257:262] == b"ustar":
        return "is a tar archive, which PyTorch before 0.1.10 wrote: load it with PyTorch and save it again"
    if head[:4] == b"\x89HDF":
        return "is an HDF5 file, as Keras writes: only safetensors and PyTorch files are read"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights it points to: fetch them with git lfs pull"
    if head[8:9] == b"{":
        return "is a safetensors file cut short: fetch it again"
    text = head.decode("ascii", "replace")
    if all(character.isprintable() or character.isspace() for character in text) and "\ufffd" not in text:
        return f"is a text file that begins {' '.join(text.split())[:40]!r}: a saved web page? fetch the file itself"
    return "is neither safetensors nor a PyTorch file, or it was not downloaded whole"


def _of_torch(file: Path, form: str, tree: Any) -> Contents:
    found = _weights_in(tree)
    if len(found) > 1:
        found = [entry for entry in found if set(entry[0]) <= set(_WRAPPERS)] or found
    if not found:
        raise CxrError(f"{file} holds no weights: there is no dict of tensors in it")
    if len(found) > 1:
        places = ", ".join(".".join(path) for path, _ in found[:8])
        raise CxrError(f"{file} holds several sets of weights ({places}): save the one you want alone")
    (path, value), module, labels = found[0], "", ()
    beside = [".".join([*path[:depth], key]) for depth, key in _neighbours(tree, path)]
    if isinstance(value, Record):
        module, labels = str(value.made_by), _labels(value)
        value = _state_dict(file, value)
    arrays = {}
    for name, leaf in value.items():
        if not isinstance(leaf, Tensor | np.ndarray):
            beside.append(".".join([*path, name]))
            continue
        try:
            arrays[_name(file, name)] = leaf.array() if isinstance(leaf, Tensor) else leaf
        except (ValueError, TypeError, OverflowError) as error:
            raise CxrError(f"{file} is damaged at {name}: {str(error)[:200]}") from None
    return Contents(form, arrays, _one_line(".".join(path)), tuple(map(_one_line, beside)), _one_line(module), labels)


def _weights_in(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Every module, and every dict with tensors in it, that is at most two dicts down; with the way to it."""
    found, level, seen = [], [((), tree)], set()
    for _ in range(3):
        below = []
        for path, value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if _is_module(value):
                found.append((path, value))
            elif isinstance(value, dict):
                named = {key: each for key, each in value.items() if isinstance(key, str)}
                if any(isinstance(each, Tensor | np.ndarray) for each in named.values()):
                    found.append((path, named))
                else:
                    below += [((*path, key), each) for key, each in named.items()]
        level = below
    return found


def _neighbours(tree: Any, path: tuple[str, ...]) -> list[tuple[int, str]]:
    """What lies beside the way to the weights, as depth and key."""
    beside = []
    for depth, taken in enumerate(path):
        names = [key if isinstance(key, str) else f"({type(key).__name__})" for key in tree if key != taken]
        beside += [(depth, name) for name in names]
        tree = tree[taken]
    return beside


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and isinstance(value.state, dict) and isinstance(value.state.get("_modules"), dict)


def _state_dict(file: Path, module: Record) -> dict[str, Any]:
    """What `state_dict()` of the module would give.

    Raises:
      CxrError: modules that hold each other, or more arrays than any network has.
    """
    arrays: dict[str, Any] = {}
    left = _MOST

    def collect(record: Record, prefix: str, depth: int) -> None:
        nonlocal left
        state = record.state
        parameters, buffers = state.get("_parameters") or {}, state.get("_buffers") or {}
        passing, children = state.get("_non_persistent_buffers_set") or [], state["_modules"]
        if not (isinstance(parameters, dict) and isinstance(buffers, dict) and isinstance(passing, list)):
            raise CxrError(f"{file} is damaged at module {prefix}: fetch it again")
        own = parameters | buffers
        left -= 1 + len(own) + len(passing) + len(children)
        if depth > _DEPTH or left < 0:
            raise CxrError(f"{file} holds modules that are nested without end")
        kept = own.keys() - {name for name in passing if isinstance(name, str)}
        arrays.update({f"{prefix}{name}": own[name] for name in own if own[name] is not None and name in kept})
        for name, child in children.items():
            if _is_module(child):
                collect(child, f"{prefix}{name}.", depth + 1)

    collect(module, "", 0)
    return arrays


def _labels(module: Record) -> tuple[str, ...]:
    """The names of its outputs, where a torchxrayvision model carries them."""
    for attribute in ("pathologies", "targets"):
        labels = module.state.get(attribute)
        if isinstance(labels, list) and labels and all(isinstance(each, str) for each in labels):
            return tuple(map(_one_line, labels))
    return ()
