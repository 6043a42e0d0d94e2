"""Files of `torch.save`, read without running anything in them: ZIP files, and the format before PyTorch 1.6.

Where PyTorch is installed its own `weights_only` loader reads first. What it refuses, such as a whole module, is read
here: tensors become arrays on the file's bytes, and every other object stays a `PickledObject`.
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
from cxrjax.weights.pickles import AllowedGlobals, ForbiddenGlobalError, Global, check_key, read_pickle

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number 0x1950a86a20f9469cfc6c
LEGACY_PROTOCOL = 1001
_MAX_DIMENSIONS = 64  # PyTorch's own limit

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
    """The values of one or more tensors; `bytes` is None until their place in the file is known."""

    key: str
    dtype: np.dtype
    count: int
    bytes: memoryview | None = None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize


@dataclass(eq=False)
class Tensor:
    """A tensor as the file declares it; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Return the values as a read-only view of the file.

        Raises:
          ValueError: they are not in the file.
        """
        itemsize = self.storage.dtype.itemsize
        for number in (self.offset, *self.shape, *self.strides):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= sys.maxsize // itemsize:
                raise ValueError(f"a tensor with a size, stride or offset of {number!r:.40}")
        count = 1
        for side in self.shape:
            count *= side
        if self.storage.bytes is None or count > self.storage.count:
            stored = 0 if self.storage.bytes is None else self.storage.count
            raise ValueError(f"a tensor of {count:,} values, for which {stored:,} are stored")
        strides = [stride * itemsize for stride in self.strides]
        return np.ndarray(self.shape, self.storage.dtype, self.storage.bytes, self.offset * itemsize, strides)


def read_torch(file: Path, *, restricted: bool = False) -> Any:
    """Return the file's value: dicts, lists, tuples, numbers, text, `Tensor` or arrays; modules as `PickledObject`.

    Args:
      file: begins with `ZIP_MAGIC` or `LEGACY_MAGIC`.
      restricted: do not use PyTorch, even where it is installed.

    Raises:
      CxrError: the file is damaged, holds code or foreign objects, or declares more than it holds.
    """
    try:
        with file.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        members = _zip_members(file, content) if content[:4] == ZIP_MAGIC else None
        if not restricted and (tree := _read_with_torch(file)) is not None:
            return tree
        return _read_legacy(content) if members is None else _read_zip(members)
    except ForbiddenGlobalError as refusal:
        raise CxrError(
            f"{file} {refusal}, which does not belong to weights: nothing was run; "
            "if you trust it, save its state_dict alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except CxrError as error:
        raise CxrError(f"{file} {error}") from None
    except Exception as error:  # a damaged file can lead to any
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        reason = " ".join(f"{kind}{error}".split())[:200]
        raise CxrError(f"{file} is damaged or its download is incomplete ({reason}): download it again") from None


def _read_with_torch(file: Path) -> Any:
    """Return what PyTorch's `weights_only` loader reads; None without a safe PyTorch, or if it refuses."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # earlier ones can be made to run code
        return None

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor of more values than are stored")
            value = value.detach()
            if value.dtype == torch.bfloat16:
                return value.view(torch.uint16).numpy().view(jnp.bfloat16)
            return value.numpy()
        if isinstance(value, dict):
            return {key: to_numpy(entry) for key, entry in value.items()}
        return type(value)(map(to_numpy, value)) if type(value) in (list, tuple) else value

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return to_numpy(torch.load(file, map_location="cpu", weights_only=True))
    except Exception:  # our own reader then says in one line what is wrong
        return None


def _zip_members(file: Path, content: mmap.mmap) -> dict[str, memoryview]:
    """Return the members of a ZIP file after checks: uncompressed, complete, and together no larger than the file."""
    members, total, view = {}, 0, memoryview(content)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise CxrError("is not a complete ZIP file: its download is incomplete, download it again") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CxrError(f"holds a compressed member, {entry.filename}: torch.save writes none")
        total += entry.file_size
        if total > len(content):
            raise CxrError("declares more bytes than it has: download it again")
        head = content[entry.header_offset : entry.header_offset + 30]
        start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = view[start : start + entry.file_size]
        if head[:4] != ZIP_MAGIC or len(data) != entry.file_size:
            raise CxrError(f"is damaged at its member {entry.filename}: download it again")
        if entry.CRC and zlib.crc32(data) != entry.CRC:  # PyTorch can be told not to write it
            raise CxrError(f"is damaged at its member {entry.filename}, by its checksum: download it again")
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

    def persistent_load(identity: Any) -> Any:
        storage = _declare_storage(identity, storages)
        if storage.bytes is None:
            storage.bytes = members[f"{folder}data/{storage.key}"]
            if len(storage.bytes) != storage.size:
                raise ValueError(f"storage {storage.key} of {storage.size:,} bytes has {len(storage.bytes):,}")
        return storage

    return read_pickle(io.BytesIO(members[main[0]]), AllowedGlobals(_FUNCTIONS, _is_inert, persistent_load))


def _read_legacy(content: mmap.mmap) -> Any:
    """Read pickles of the magic number, protocol, system, object and storage keys, then the storages."""
    storages: dict[str, Storage] = {}
    nothing = AllowedGlobals({}, lambda named: False, lambda identity: None)
    content.seek(len(LEGACY_MAGIC))
    if read_pickle(content, nothing) != LEGACY_PROTOCOL:
        raise CxrError("is of an unknown version of PyTorch's format: load it with PyTorch and save it again")
    if not read_pickle(content, nothing).get("little_endian", True):
        raise CxrError("was written on a big-endian machine: save it again on another")

    def persistent_load(identity: Any) -> Any:
        if isinstance(identity, tuple) and identity[0] == "module":  # older PyTorch stored a module's class and source
            return identity[1]
        return _declare_storage(identity, storages)

    tree = read_pickle(content, AllowedGlobals(_FUNCTIONS, _is_inert, persistent_load))
    view = memoryview(content)
    for key in read_pickle(content, nothing):
        storage = storages[key]
        count = int.from_bytes(content.read(8), "little")
        start = content.tell()
        if count != storage.count or start + storage.size > len(content):
            raise ValueError(f"storage {key} of {storage.count:,} values has {(len(content) - start):,} bytes left")
        storage.bytes = view[start : start + storage.size]
        content.seek(start + storage.size)
    return tree


def _declare_storage(identity: Any, storages: dict[str, Storage]) -> Storage:
    """Return the storage of a persistent id, which is added to `storages` if it is new."""
    kind, dtype, key, _, count, *view = identity
    if kind != "storage" or not isinstance(key, str) or any(field is not None for field in view):
        raise ValueError("a storage of an unknown kind")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0 or dtype.name not in _TYPES:
        raise ValueError(f"storage {key} of {count!r:.40} values of type {dtype}")
    storage = storages.setdefault(key, Storage(key, np.dtype(_TYPES[dtype.name]), count))
    if (storage.dtype, storage.count) != (np.dtype(_TYPES[dtype.name]), count):
        raise ValueError(f"storage {key} is declared twice, differently")
    return storage


def _is_inert(named: Global) -> bool:
    is_storage = named.module in ("torch", "torch.cuda") and named.name in _TYPES
    return named in _INERT or is_storage or f"{named.module}.".startswith(_INERT_MODULES)


def _rebuild_tensor(storage: Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor of no storage")
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Global, _: Any, arguments: tuple, __: Any) -> Any:
    """Rebuild a tensor that carries Python attributes."""
    if function not in _TENSOR_FUNCTIONS:
        raise ValueError(f"a tensor made by {function}")
    return _TENSOR_FUNCTIONS[function](*arguments)


def _size(sides: Sequence[int] = ()) -> tuple[int, ...]:
    if len(sides) > _MAX_DIMENSIONS:
        raise ValueError(f"a size of {len(sides):,} sides")
    return tuple(sides)


_TENSOR_FUNCTIONS = {
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
_FUNCTIONS = _TENSOR_FUNCTIONS | {
    Global("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    Global("collections", "OrderedDict"): lambda pairs=(): {check_key(key): value for key, value in pairs},
    Global("torch", "Size"): _size,
    **{Global(module, "set"): lambda values=(): list(values) for module in ("builtins", "__builtin__")},
}
