"""Weight files of any format, recognised by their content: the arrays in them by name."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cxrjax.errors import CxrError
from cxrjax.weights.pickles import PickledObject
from cxrjax.weights.torchfile import LEGACY_MAGIC, ZIP_MAGIC, Tensor, read_torch

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params")
_MAX_DEPTH = 64  # of nested modules
_MAX_ENTRIES = 200_000  # modules, counted twice, and arrays in a module


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights.

    Attributes:
      format: "safetensors", "PyTorch ZIP" or "PyTorch legacy".
      arrays: by the file's names, in the file's types; they may be views of the file.
      wrapper: path of keys around them in the file, such as "state_dict"; empty if there is none.
      other_entries: what else the file holds.
      module: class of a whole module that was saved; empty for a plain state dict.
      labels: the module's names of its outputs; empty if it has none.
    """

    format: str
    arrays: dict[str, np.ndarray]
    wrapper: str = ""
    other_entries: tuple[str, ...] = ()
    module: str = ""
    labels: tuple[str, ...] = ()


def read_weight_file(file: Path, *, restricted: bool = False) -> WeightFile:
    """Read a file of weights; its content decides the format, not its name.

    Args:
      file: safetensors, or what `torch.save` wrote of a state dict, of a dict around one, or of a whole module.
      restricted: read PyTorch files with the reader here, even where PyTorch is installed.

    Raises:
      CxrError: the file is missing, of another kind, damaged, or holds code; it holds no weights, or several sets.
    """
    file = Path(file)
    if not file.is_file():
        raise CxrError(f"there is no file {file}")
    with file.open("rb") as stream:
        head = stream.read(512)
    try:
        return _read(file, head, restricted)
    except CxrError as error:
        raise CxrError(_printable(str(error))) from None


def _read(file: Path, head: bytes, restricted: bool) -> WeightFile:
    if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        format = "PyTorch ZIP" if head.startswith(ZIP_MAGIC) else "PyTorch legacy"
        return _from_torch(file, format, read_torch(file, restricted=restricted))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= file.stat().st_size:
        arrays = _read_safetensors(file)
        return WeightFile("safetensors", {_check_name(file, name): array for name, array in arrays.items()})
    raise CxrError(f"{file} {_describe_unknown(head)}")


def _printable(text: str) -> str:
    """Replace line breaks, and what else in a file's names could manipulate a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _check_name(file: Path, name: str) -> str:
    if not name.isprintable():
        raise CxrError(f"{file} is damaged: an array is called {name[:80]!r}")
    return name


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise CxrError(f"{file} is a damaged safetensors file ({str(error)[:200]}): download it again") from None


def _describe_unknown(head: bytes) -> str:
    """Say what a file that is not one of weights seems to be, and what to do."""
    if not head:
        return "is empty: download it again"
    if head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "is a pickle that torch.save did not write: nothing was run; save its arrays as safetensors"
    if head[257:262] == b"ustar":
        return "is a tar archive, which PyTorch before 0.1.10 wrote: load it with PyTorch and save it again"
    if head[:4] == b"\x89HDF":
        return "is an HDF5 file, as Keras writes: only safetensors and PyTorch files are read"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights it points to: get them with git lfs pull"
    if head[8:9] == b"{":
        return "is a truncated safetensors file: download it again"
    text = head.decode("ascii", "replace")
    if all(character.isprintable() or character.isspace() for character in text) and "\ufffd" not in text:
        start = " ".join(text.split())[:40]
        return f"is a text file that begins {start!r}: a saved web page? download the file itself"
    return "is neither safetensors nor a PyTorch file, or its download is incomplete"


def _from_torch(file: Path, format: str, tree: Any) -> WeightFile:
    candidates = _find_weights(tree)
    if len(candidates) > 1:
        candidates = [candidate for candidate in candidates if set(candidate[0]) <= set(_WRAPPERS)] or candidates
    if not candidates:
        raise CxrError(f"{file} holds no weights: there is no dict of tensors in it")
    if len(candidates) > 1:
        paths = ", ".join(".".join(path) for path, _ in candidates[:8])
        raise CxrError(f"{file} holds several sets of weights ({paths}): save the one you want on its own")
    (path, value), module, labels = candidates[0], "", ()
    other_entries = [".".join([*path[:depth], key]) for depth, key in _siblings(tree, path)]
    if isinstance(value, PickledObject):
        module, labels = str(value.constructor), _labels(value)
        value = _state_dict(file, value)
    arrays = {}
    for name, leaf in value.items():
        if not isinstance(leaf, Tensor | np.ndarray):
            other_entries.append(".".join([*path, name]))
            continue
        try:
            arrays[_check_name(file, name)] = leaf.array() if isinstance(leaf, Tensor) else leaf
        except (ValueError, TypeError, OverflowError) as error:
            raise CxrError(f"{file} is damaged at {name}: {str(error)[:200]}") from None
    wrapper, others = _printable(".".join(path)), tuple(map(_printable, other_entries))
    return WeightFile(format, arrays, wrapper, others, _printable(module), labels)


def _find_weights(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Return every module and every dict with tensors that is at most two dicts down, with its path."""
    candidates, level, seen = [], [((), tree)], set()
    for _ in range(3):
        next_level = []
        for path, value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if _is_module(value):
                candidates.append((path, value))
            elif isinstance(value, dict):
                named = {key: entry for key, entry in value.items() if isinstance(key, str)}
                if any(isinstance(entry, Tensor | np.ndarray) for entry in named.values()):
                    candidates.append((path, named))
                else:
                    next_level += [((*path, key), entry) for key, entry in named.items()]
        level = next_level
    return candidates


def _siblings(tree: Any, path: tuple[str, ...]) -> list[tuple[int, str]]:
    """Return the entries next to the path to the weights, as depth and key."""
    siblings = []
    for depth, step in enumerate(path):
        names = [key if isinstance(key, str) else f"({type(key).__name__})" for key in tree if key != step]
        siblings += [(depth, name) for name in names]
        tree = tree[step]
    return siblings


def _is_module(value: Any) -> bool:
    is_object = isinstance(value, PickledObject) and isinstance(value.state, dict)
    return is_object and isinstance(value.state.get("_modules"), dict)


def _state_dict(file: Path, module: PickledObject) -> dict[str, Any]:
    """Return what `state_dict()` of the module would return.

    Raises:
      CxrError: modules that contain each other, or more arrays than any network has.
    """
    arrays: dict[str, Any] = {}
    budget = _MAX_ENTRIES

    def collect(module: PickledObject, prefix: str, depth: int) -> None:
        nonlocal budget
        state = module.state
        parameters, buffers = state.get("_parameters") or {}, state.get("_buffers") or {}
        non_persistent, children = state.get("_non_persistent_buffers_set") or [], state["_modules"]
        if not (isinstance(parameters, dict) and isinstance(buffers, dict) and isinstance(non_persistent, list)):
            raise CxrError(f"{file} is damaged at module {prefix}: download it again")
        entries = parameters | buffers
        budget -= 1 + len(entries) + len(non_persistent) + len(children)
        if depth > _MAX_DEPTH or budget < 0:
            raise CxrError(f"{file} holds modules that are nested without end")
        saved = entries.keys() - {name for name in non_persistent if isinstance(name, str)}
        arrays.update(
            {f"{prefix}{name}": value for name, value in entries.items() if value is not None and name in saved}
        )
        for name, child in children.items():
            if _is_module(child):
                collect(child, f"{prefix}{name}.", depth + 1)

    collect(module, "", 0)
    return arrays


def _labels(module: PickledObject) -> tuple[str, ...]:
    """Return the names of the outputs that a torchxrayvision model carries."""
    for attribute in ("pathologies", "targets"):
        labels = module.state.get(attribute)
        if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
            return tuple(map(_printable, labels))
    return ()
