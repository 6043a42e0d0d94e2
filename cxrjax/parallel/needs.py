"""What a program needs on a device that is not here: compiled once, and remembered by what it is."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from cxrjax.files import write_json
from cxrjax.parallel.collectives import Collective, bytes_of, collectives
from cxrjax.parallel.targets import Target

_COMPILERS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_EFFORTS = ("jax_optimization_level", "jax_memory_fitting_level", "jax_exec_time_optimization_effort",
            "jax_memory_fitting_effort")  # fmt: skip
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?(?P<name>%[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>[\w-]+)\((?P<takes>.*?)\)"
)
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
         "while", "conditional", "call", "iota"}  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """What one device needs for one call.

    Attributes:
      held: bytes of arguments and results; what is donated counts once.
      temporary: bytes of everything else at the peak: activations, gradients, workspace that XLA knows of.
      calls: its collectives.
      moved: bytes through the device's memory.
    """

    held: int
    temporary: int
    calls: tuple[Collective, ...]
    moved: float


def needs(traced: Any, target: Target, options: dict[str, Any]) -> Needs:
    """Compile a traced program for a target, or remember what was found when it last was.

    Compiling a training step takes minutes; a plan that is asked for again, the steps of a bisection among them, is
    read from `$XDG_CACHE_HOME/cxrjax/plans` (`~/.cache` by default). The key is the program, the target, the options,
    XLA's flags, JAX's settings for the compiler's effort, and the versions of the compilers.

    Args:
      traced: of a jitted function whose arguments lie on the target's devices.
      target: what it is compiled for.
      options: the compiler's.
    """
    lowered = traced.lower()
    settings = *(os.environ.get(name) for name in _FLAGS), *(getattr(jax.config, name, None) for name in _EFFORTS)
    parts = lowered.as_text(), repr(target), json.dumps([options, settings], sort_keys=True), *map(_version, _COMPILERS)
    key = "\n".join(parts)
    file = cache() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        return _read(file)
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not whole
        found = _of(lowered.compile(compiler_options=options))
    write_json(file, asdict(found))
    return found


def cache() -> Path:
    """Where what was found is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxrjax" / "plans"


def _read(file: Path) -> Needs:
    values = json.loads(file.read_text())
    calls = tuple(Collective(**{**call, "shapes": tuple(call["shapes"])}) for call in values.pop("calls"))
    return Needs(calls=calls, **values)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _of(compiled: Any) -> Needs:
    memory = compiled.memory_analysis()
    return Needs(
        held=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        calls=tuple(collectives(compiled.as_text())),
        moved=moved(compiled),
    )


def moved(compiled: Any) -> float:
    """Bytes that a compiled program moves through its device's memory, as XLA counts them or, for GPUs, as it would."""
    return float((compiled.cost_analysis() or {}).get("bytes accessed") or moved_by(compiled.as_text()))


def moved_by(text: str) -> int:
    """Bytes that the kernels of a program (`compiled.as_text()`) take and give.

    A fused kernel is taken to read each operand once, as XLA's own analysis does; what loops repeat counts not at all.
    """
    entry = text[text.find("\nENTRY ") + 1 :].split("\n}", 1)[0]
    sizes, total = {}, 0
    for line in entry.splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        sizes[found["name"]] = bytes_of(found["type"])
        if found["kind"] not in _FREE and not found["kind"].endswith("-done"):
            total += sizes[found["name"]] + sum(sizes.get(name, 0) for name in re.findall(r"%[\w.-]+", found["takes"]))
    return total
