"""What `torch.save` wrote, without running anything in it: ZIP files, and the format before PyTorch 1.6.

Where PyTorch is installed its own `weights_only` loader reads first. What it refuses, such as a whole module, is read
here, where tensors become arrays on the file's bytes and every other object stays a `Record`.
"""

import io
import mmap
import sys
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cxrjax.errors import CxrError
from cxrjax.weights.pickles import Global, RefusedError, Vocabulary, plain_key, read_pickle

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number 0x1950a86a20f9469cfc6c
LEGACY_PROTOCOL = 1001
_SIDES = 64  # PyTorch's own limit

_TYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_INERT_MODULES = (
    "torch.nn.", "torchvision.models.", "torchvision.ops.", "torchxrayvision.models.", "timm.models.", "timm.layers.",
)  # fmt: skip
_INERT = {
    Global("argparse", "Namespace"), Global("collections", "Counter"), Global("collections", "defaultdict"),
    Global("_codecs", "encode"), Global("torch", "device"), Global("numpy", "dtype"), Global("numpy", "ndarray"),
    *(Global(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(Global("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "bool", "uint8")),
    *(Global("torch", name) for name in ("int64", "int32", "int16", "int8")),
}  # fmt: skip


@dataclass(eq=False)
class Storage:
    """The values that one or more tensors show; `bytes` is None until it is known where in the file they are."""

    key: str
    dtype: np.dtype
    count: int
    bytes: memoryview | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize


@dataclass(eq=False)
class Tensor:
    """A tensor as the file describes it, in units of its type."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The values: a view of the file, not to be written.

        Raises:
          ValueError: they are not in the file.
        """
        step = self.storage.dtype.itemsize
        for number in (self.offset, *self.shape, *self.strides):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= sys.maxsize // step:
                raise ValueError(f"a tensor with a size, stride or offset of {number!r:.40}")
        count = 1
        for side in self.shape:
            count *= side
        if self.storage.bytes is None or count > self.storage.count:
            there = 0 if self.storage.bytes is None else self.storage.count
            raise ValueError(f"a tensor of {count:,} values, for which {there:,} are stored")
        strides = [stride * step for stride in self.strides]
        return np.ndarray(self.shape, self.storage.dtype, self.storage.bytes, self.offset * step, strides)


def read_torch(file: Path, *, restricted: bool = False) -> Any:
    """What is in the file: dicts, lists, tuples, numbers, text, and tensors as `Tensor` or arrays; modules as `Record`.

    Args:
      file: begins with `ZIP_MAGIC` or `LEGACY_MAGIC`.
      restricted: do not ask PyTorch, even where it is installed.

    Raises:
      CxrError: the file is damaged, holds code or foreign objects, or declares more than it holds.
    """
    try:
        with file.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        members = _members(file, content) if content[:4] == ZIP_MAGIC else None
        if not restricted and (tree := _ask_torch(file)) is not None:
            return tree
        return _read_legacy(content) if members is None else _read_zip(members)
    except RefusedError as refusal:
        raise CxrError(
            f"{file} {refusal}, which is no part of weights: nothing was run; "
            "if you trust it, save its state_dict alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except CxrError as error:
        raise CxrError(f"{file} {error}") from None
    except Exception as error:  # whatever a damaged file leads to
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        reason = " ".join(f"{kind}{error}".split())[:200]
        raise CxrError(f"{file} is damaged or was not downloaded whole ({reason}): fetch it again") from None


def _ask_torch(file: Path) -> Any:
    """What PyTorch's own restricted loader reads; None where there is no PyTorch, or where it refuses."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # earlier ones can be made to run code
        return None

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor of more values than are stored")
            value = value.detach()
            if value.dtype == torch.bfloat16:
                return value.view(torch.uint16).numpy().view(jnp.bfloat16)
            return value.numpy()
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plain(torch.load(file, map_location="cpu", weights_only=True))
    except Exception:  # the reader below says in one line what is wrong
        return None


def _members(file: Path, content: mmap.mmap) -> dict[str, memoryview]:
    """The members of a ZIP file, checked: stored as they are, whole, and no larger together than the file."""
    members, total, view = {}, 0, memoryview(content)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise CxrError("is not a whole ZIP file: it was not downloaded whole, fetch it again") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CxrError(f"holds a compressed member, {entry.filename}: torch.save writes none")
        total += entry.file_size
        if total > len(content):
            raise CxrError("declares more bytes than it has: fetch it again")
        head = content[entry.header_offset : entry.header_offset + 30]
        start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = view[start : start + entry.file_size]
        if head[:4] != ZIP_MAGIC or len(data) != entry.file_size:
            raise CxrError(f"is damaged at its member {entry.filename}: fetch it again")
        if entry.CRC and zlib.crc32(data) != entry.CRC:  # PyTorch can be told not to write it
            raise CxrError(f"is damaged at its member {entry.filename}, by its checksum: fetch it again")
        members[entry.filename] = data
    return members


def _read_zip(members: dict[str, memoryview]) -> Any:
    main = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(main) != 1:
        raise CxrError("is a ZIP file, but not one that torch.save wrote")
    folder = main[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise CxrError("is a TorchScript program: save the state_dict of the model that it was made from")
    if bytes(members.get(f"{folder}byteorder", b"little")) != b"little":
        raise CxrError("was written on a big-endian machine: save it again on another")
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        storage = _storage(identity, storages)
        if storage.bytes is None:
            storage.bytes = members[f"{folder}data/{storage.key}"]
            if len(storage.bytes) != storage.size:
                raise ValueError(f"storage {storage.key} of {storage.size:,} bytes has {len(storage.bytes):,}")
        return storage

    return read_pickle(io.BytesIO(members[main[0]]), _vocabulary(persistent))


def _read_legacy(content: mmap.mmap) -> Any:
    """Pickles of a magic number, the protocol, the system, the object and the storages' keys, then the storages."""
    storages: dict[str, Storage] = {}
    plain = Vocabulary({}, lambda found: False, lambda identity: None)
    content.seek(len(LEGACY_MAGIC))
    if read_pickle(content, plain) != LEGACY_PROTOCOL:
        raise CxrError("is of an unknown version of PyTorch's format: load it with PyTorch and save it again")
    if not read_pickle(content, plain).get("little_endian", True):
        raise CxrError("was written on a big-endian machine: save it again on another")
    tree = read_pickle(content, _vocabulary(lambda identity: _persistent(identity, storages)))
    view = memoryview(content)
    for key in read_pickle(content, plain):
        storage = storages[key]
        count = int.from_bytes(content.read(8), "little")
        start = content.tell()
        if count != storage.count or start + storage.size > len(content):
            raise ValueError(f"storage {key} of {storage.count:,} values has {(len(content) - start):,} bytes left")
        storage.bytes = view[start : start + storage.size]
        content.seek(start + storage.size)
    return tree


def _persistent(identity: Any, storages: dict[str, Storage]) -> Any:
    """A storage; or a module's class, which older versions of PyTorch kept with its source."""
    if isinstance(identity, tuple) and identity[0] == "module":
        return identity[1]
    return _storage(identity, storages)


def _storage(identity: Any, storages: dict[str, Storage]) -> Storage:
    kind, dtype, key, _, count, *view = identity
    if kind != "storage" or not isinstance(key, str) or any(part is not None for part in view):
        raise ValueError("a storage of an unknown kind")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0 or dtype.name not in _TYPES:
        raise ValueError(f"storage {key} of {count!r:.40} values of type {dtype}")
    storage = storages.setdefault(key, Storage(key, np.dtype(_TYPES[dtype.name]), count))
    if (storage.dtype, storage.count) != (np.dtype(_TYPES[dtype.name]), count):
        raise ValueError(f"storage {key} is declared twice, differently")
    return storage


def _vocabulary(persistent: Any) -> Vocabulary:
    return Vocabulary(_FUNCTIONS, _is_inert, persistent)


def _is_inert(found: Global) -> bool:
    module = f"{found.module}."
    storage = found.module in ("torch", "torch.cuda") and found.name in _TYPES
    return found in _INERT or storage or module.startswith(_INERT_MODULES)


def _tensor(storage: Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor of no storage")
    return Tensor(storage, offset, shape, strides)


def _size(sides: Sequence[int] = ()) -> tuple[int, ...]:
    if len(sides) > _SIDES:
        raise ValueError(f"a size of {len(sides):,} sides")
    return tuple(sides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _subclass(function: Global, _: Any, arguments: tuple, __: Any) -> Any:
    """A tensor that carries Python attributes."""
    if function not in _TENSORS:
        raise ValueError(f"a tensor made by {function}")
    return _TENSORS[function](*arguments)


_TENSORS = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
_FUNCTIONS = _TENSORS | {
    Global("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    Global("collections", "OrderedDict"): lambda pairs=(): {plain_key(key): value for key, value in pairs},
    Global("torch", "Size"): _size,
    **{Global(module, "set"): lambda values=(): list(values) for module in ("builtins", "__builtin__")},
}
