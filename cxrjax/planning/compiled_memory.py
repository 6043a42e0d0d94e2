"""Memory, traffic and collectives of a compiled program, from XLA's analysis and its optimised HLO text."""

import hashlib
import json
import math
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from cxrjax.errors import requested_bytes
from cxrjax.files import write_json
from cxrjax.planning.accelerators import Accelerator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_COMPILERS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_EFFORTS = ("jax_optimization_level", "jax_memory_fitting_level", "jax_exec_time_optimization_effort",
            "jax_memory_fitting_effort")  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of `COLLECTIVES`.
      shapes: shapes of its results, such as `f32[2,64]`.
      bytes: size of its results.
      group_size: number of devices that take part; 0 for collective-permute, where the HLO does not say.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    group_size: int

    @property
    def bytes_sent(self) -> float:
        """Bytes that leave one device, with ring algorithms."""
        ring = (self.group_size - 1) / self.group_size if self.group_size else 1.0
        factors = {"all-reduce": 2 * ring, "reduce-scatter": self.group_size - 1.0, "collective-permute": 1.0}
        return self.bytes * factors.get(self.kind, ring)


@dataclass(frozen=True)
class CompiledMemory:
    """Resources of one call of a program on one device.

    Attributes:
      arguments: bytes of arguments and results; donated arguments count once.
      temporary: bytes of all other buffers at the peak: activations, gradients, workspace that XLA knows of.
      program: bytes of the program itself on TPUs, where it lies in the same memory; 0 on GPUs.
      collectives: its collective operations.
      bytes_accessed: bytes read from and written to device memory.
      exceeded: the compiler stopped because the device has too little memory; only `temporary` is known.
    """

    arguments: int
    temporary: int
    program: int
    collectives: tuple[Collective, ...]
    bytes_accessed: float
    exceeded: bool = False


def compile_memory(
    traced: Any, accelerator: Accelerator, options: dict[str, Any], iterations: int = 1
) -> CompiledMemory:
    """Compile a traced program for an accelerator and return what it needs, from the cache if possible.

    Compiling a training step takes minutes, so results are kept in `$XDG_CACHE_HOME/cxrjax/plans` (`~/.cache` by
    default). The key is the program, the accelerator, the options, the XLA flags and compiler settings, and the
    compiler versions.

    Args:
      traced: a traced jitted function with arguments on the accelerator's devices.
      accelerator: the device to compile for.
      options: compiler options.
      iterations: iterations of the program's outermost loop: the gradient accumulation steps of a training step.
    """
    lowered = traced.lower()
    settings = *(os.environ.get(name) for name in _FLAGS), *(getattr(jax.config, name, None) for name in _EFFORTS)
    settings_text = json.dumps([options, settings, iterations], sort_keys=True)
    key = "\n".join((lowered.as_text(), repr(accelerator), settings_text, *map(_version, _COMPILERS)))
    file = cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # missing or damaged
        return _read(file)
    try:
        memory = _analyze(lowered.compile(compiler_options=options), accelerator, iterations)
    except jax.errors.JaxRuntimeError as error:  # XLA for TPUs checks the memory before it generates code
        if not (requested := requested_bytes(error)):
            raise
        memory = CompiledMemory(0, requested, program=0, collectives=(), bytes_accessed=0.0, exceeded=True)
    with suppress(OSError):  # only costs another compilation next time
        write_json(file, asdict(memory))
    return memory


def cache_dir() -> Path:
    """Return the directory of cached results."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxrjax" / "plans"


def _read(file: Path) -> CompiledMemory:
    values = json.loads(file.read_text())
    collectives = tuple(
        Collective(**{**collective, "shapes": tuple(collective["shapes"])}) for collective in values.pop("collectives")
    )
    return CompiledMemory(collectives=collectives, **values)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _analyze(compiled: Any, accelerator: Accelerator, iterations: int) -> CompiledMemory:
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    once, in_loop = parse_collectives(hlo), parse_collectives(loop_body(hlo))
    arguments, temporary = argument_and_temporary_bytes(memory, tpu=bool(accelerator.tpu))
    return CompiledMemory(
        arguments=arguments,
        temporary=temporary,
        program=memory.generated_code_size_in_bytes if accelerator.tpu else 0,
        collectives=(*once, *in_loop * (iterations - 1)),
        bytes_accessed=bytes_accessed(compiled, iterations),
    )


def argument_and_temporary_bytes(memory: Any, *, tpu: bool) -> tuple[int, int]:
    """Return the bytes of arguments and results, and of all else, from a program's `memory_analysis()`."""
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    if tpu:  # libtpu counts gaps between buffers twice; counting them once is halfway to the bytes in use at the peak
        temporary = (temporary + min(temporary, memory.peak_memory_in_bytes - arguments)) // 2
    return arguments, temporary


def bytes_accessed(compiled: Any, iterations: int = 1) -> float:
    """Return the bytes that a compiled program reads and writes in device memory.

    XLA's own count is used where there is one, else `hlo_bytes_accessed` (GPUs). Both count the body of a loop once;
    the body of the outermost loop is counted `iterations` times.
    """
    hlo = compiled.as_text()
    counted = (compiled.cost_analysis() or {}).get("bytes accessed")
    body = hlo_bytes_accessed(loop_body(hlo), "") if iterations > 1 else 0
    if counted:
        return float(counted + (iterations - 1) * body)
    return float(hlo_bytes_accessed(hlo) + iterations * body)


# Optimised HLO text (`compiled.as_text()`)

_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32,
         "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([0-9,]*)\}|\[(\d+),(\d+)\]|mesh\[(.*?)\] \{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?(?P<name>%[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>[\w-]+)\((?P<operands>.*?)\)"
)
_NO_TRAFFIC = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
               "replica-id", "while", "conditional", "call", "iota"}  # fmt: skip


def parse_collectives(hlo: str) -> list[Collective]:
    """Return the collectives of a program; those in loops once."""
    collectives = []
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        shapes = _SHAPE.findall(match["type"])
        if match["start"] and match["kind"] != "all-reduce":  # (operands, results, ...)
            shapes = [shape for shape in shapes if shape[1]]
            shapes = shapes[len(shapes) // 2 :]
        collectives.append(
            Collective(
                kind=match["kind"],
                shapes=tuple(f"{dtype}[{extents}]" for dtype, extents in shapes),
                bytes=sum(_shape_bytes(dtype, extents) for dtype, extents in shapes),
                group_size=_group_size(line),
            )
        )
    return collectives


def _group_size(line: str) -> int:
    match = _GROUPS.search(line)
    if match is None:
        return 0
    members, _, size, mesh_axes, group_axes = match.groups()
    if members is not None:
        return len(members.split(","))
    if size is not None:
        return int(size)
    return math.prod(int(extent) for axis, extent in _AXIS.findall(mesh_axes) if f"'{axis}'" in group_axes)


def _type_bytes(hlo_type: str) -> int:
    """Return the bytes of an HLO type such as `f32[2,64]{1,0}`, or of a tuple of them."""
    return sum(_shape_bytes(dtype, extents) for dtype, extents in _SHAPE.findall(hlo_type))


def _shape_bytes(dtype: str, extents: str) -> int:
    return math.prod(int(extent or 1) for extent in extents.split(",")) * _BITS.get(dtype, 32) // 8


def hlo_bytes_accessed(hlo: str, computation: str = "ENTRY ") -> int:
    """Return the bytes that the kernels of a program read and write, without the bodies of loops.

    As in XLA's own analysis, a fused kernel reads each operand once, or only the slices that it takes of it.
    """
    entry = hlo[hlo.find(f"\n{computation}") + 1 :].split("\n}", 1)[0]
    computations = _computations(hlo)
    sizes, total = {}, 0
    for line in entry.splitlines()[1:]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        sizes[match["name"]] = _type_bytes(match["type"])
        if match["kind"] not in _NO_TRAFFIC and not match["kind"].endswith("-done"):
            operands = [sizes.get(name, 0) for name in re.findall(r"%[\w.-]+", match["operands"])]
            if match["kind"] == "fusion" and (called := re.search(r" calls=(%[\w.-]+)", line)):
                for number, size in _sliced_operands(computations.get(called[1], "")).items():
                    operands[number] = min(size, operands[number])
            total += sizes[match["name"]] + sum(operands)
    return total


def _computations(hlo: str) -> dict[str, str]:
    """Return the text of each named computation."""
    return {text.split(" ", 1)[0]: text.split("\n}", 1)[0] for text in re.split(r"\n(?=%)", hlo)}


def _sliced_operands(computation: str) -> dict[int, int]:
    """Return the bytes read of each operand of which a computation only reads slices, by operand number."""
    numbers, slices, read_whole = dict[str, int](), dict[int, int](), set[int]()
    for line in computation.splitlines()[1:]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        if match["kind"] == "parameter":
            numbers[match["name"]] = int(match["operands"])
        for name in re.findall(r"%[\w.-]+", match["operands"]):
            if name in numbers and match["kind"] == "slice":
                slices[numbers[name]] = slices.get(numbers[name], 0) + _type_bytes(match["type"])
            elif name in numbers:
                read_whole.add(numbers[name])
    return {number: size for number, size in slices.items() if number not in read_whole}


def loop_body(hlo: str) -> str:
    """Return the body of the program's outermost loop and all computations that it calls; empty without a loop."""
    match = re.search(r" while\(.*? body=(%[\w.-]+).*?op_name=\"jit\(\w+\)/while\"", hlo)
    if match is None:
        return ""
    computations = _computations(hlo)
    pending, reached = [match[1]], dict[str, str]()
    while pending:
        name = pending.pop()
        reached[name] = text = computations.get(name, "")
        called = re.findall(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)", text)
        pending += [other for other in dict.fromkeys(called) if other not in reached and other not in pending]
    return "".join(f"\n{text}\n}}\n" for text in reached.values())
