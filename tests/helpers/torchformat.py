"""Files as `torch.save` writes them, written without PyTorch: stubs of its classes, and both formats."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip
DTYPES = [np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name) for name in STORAGES]
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Tensor:
    """A tensor with any declared count, offset, shape and strides, right or wrong."""

    def __init__(self, values: np.ndarray, *, count=None, offset=0, shape=None, strides=None):
        self.values = np.ascontiguousarray(values).reshape(np.shape(values))
        self.count = self.values.size if count is None else count
        self.offset = offset
        self.shape = self.values.shape if shape is None else shape
        steps = [stride // self.values.itemsize for stride in self.values.strides]
        self.strides = tuple(steps) if strides is None else strides


class Module:
    """An object with the `__dict__` of a `torch.nn.Module`, from arrays by dotted names."""

    def __init__(self, arrays: dict[str, Any], **attributes: Any):
        direct = {name: array for name, array in arrays.items() if "." not in name}
        buffers = {name for name in direct if name.startswith(("running", "num_batches", "op_"))}
        self.training = False
        self._parameters = OrderedDict((name, direct[name]) for name in direct if name not in buffers)
        self._buffers = OrderedDict((name, direct[name]) for name in direct if name in buffers)
        self._non_persistent_buffers_set = set()
        self._modules = OrderedDict()
        for child in dict.fromkeys(name.partition(".")[0] for name in arrays if "." in name):
            nested = {
                name.removeprefix(f"{child}."): array for name, array in arrays.items() if name.startswith(f"{child}.")
            }
            self._modules[child] = _make("torch.nn.modules.container", "Sequential", nested)
        self.__dict__.update(attributes)


class _Storage:
    def __init__(self, tensor: Tensor, key: str):
        self.tensor, self.key = tensor, key


def _make(module: str, name: str, *arguments: Any, **attributes: Any) -> Any:
    return getattr(sys.modules[module], name)(*arguments, **attributes)


def whole_module(kind: str, arrays: dict[str, Any], **attributes: Any) -> Any:
    """Return a value that `write` saves as `torch.save(model)` saves a model of class `kind`."""
    return lambda: _make(*kind.rsplit(".", 1), arrays, **attributes)


def _stub_modules() -> dict[str, types.ModuleType]:
    """Modules with PyTorch's names and the few globals that its pickles name."""

    def module(name: str, **members: Any) -> types.ModuleType:
        stub = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__, member.__name__ = name, key, key
            setattr(stub, key, member)
        return stub

    def function() -> Any:
        return lambda *arguments: None

    stubs = [
        module("torch", **{name: type(name, (), {}) for name in STORAGES.values()}, Size=type("Size", (tuple,), {})),
        module("torch._utils", _rebuild_tensor_v2=function(), _rebuild_parameter=function()),
        module("torch.nn"),
        module("torch.nn.modules"),
        module("torch.nn.modules.container", Sequential=type("Sequential", (Module,), {})),
        module("torchxrayvision"),
        module("torchxrayvision.models", DenseNet=type("DenseNet", (Module,), {})),
        module("elsewhere", Network=type("Network", (Module,), {})),
    ]
    return {stub.__name__: stub for stub in stubs}


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, legacy: bool):
        super().__init__(stream, protocol=2)
        self.legacy = legacy
        self.storages: dict[int, _Storage] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = getattr(sys.modules["torch"], STORAGES[value.tensor.values.dtype.name])
        return ("storage", kind, value.key, "cuda:0", value.tensor.count, *([None] if self.legacy else []))

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = Tensor(value)
        if not isinstance(value, Tensor):
            return NotImplemented
        storage = self.storages.setdefault(id(value), _Storage(value, str(len(self.storages))))
        size = sys.modules["torch"].Size(value.shape)
        rest = (False, OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (storage, value.offset, size, value.strides, *rest)


def write(file: Path, value: Any, *, legacy: bool = False, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a value as `torch.save` does: arrays and `Tensor` as tensors, `whole_module` as a module."""
    with mock.patch.dict(sys.modules, _stub_modules()):
        stream = io.BytesIO()
        if legacy:
            for head in (MAGIC, 1001, SYSTEM):
                pickle.dump(head, stream, protocol=2)
        pickler = _Pickler(stream, legacy)
        pickler.dump(value() if callable(value) else value)
    storages = pickler.storages.values()
    if legacy:
        pickle.dump([storage.key for storage in storages], stream, protocol=2)
        for storage in storages:
            stream.write(storage.tensor.count.to_bytes(8, "little"))
            stream.write(storage.tensor.values.tobytes())
        file.write_bytes(stream.getvalue())
        return file
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", "little")
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.tensor.values.tobytes())
        archive.writestr("archive/version", "3\n")
    return file
