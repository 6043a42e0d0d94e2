"""What a program needs on a device that is not here: compiled once, and remembered by what it is."""

import hashlib
import json
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
from cxrjax.planning.accelerators import Target
from cxrjax.planning.collectives import Collective, bytes_of, collectives

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
      program: bytes of the program itself, where it lies in the same memory: on TPUs.
      calls: its collectives.
      moved: bytes through the device's memory.
      refused: the compiler gave up, for the device has less memory: only `temporary` is known, as it says.
    """

    held: int
    temporary: int
    program: int
    calls: tuple[Collective, ...]
    moved: float
    refused: bool = False


def needs(traced: Any, target: Target, options: dict[str, Any], rounds: int = 1) -> Needs:
    """Compile a traced program for a target, or remember what was found when it last was.

    Compiling a training step takes minutes; a plan that is asked for again, the steps of a bisection among them, is
    read from `$XDG_CACHE_HOME/cxrjax/plans` (`~/.cache` by default). The key is the program, the target, the options,
    the rounds, XLA's flags, JAX's settings for the compiler's effort, and the versions of the compilers.

    Args:
      traced: of a jitted function whose arguments lie on the target's devices.
      target: what it is compiled for.
      options: the compiler's.
      rounds: of the program's own loop, if it has one: of a training step, parts of a batch one after the other.
    """
    lowered = traced.lower()
    settings = *(os.environ.get(name) for name in _FLAGS), *(getattr(jax.config, name, None) for name in _EFFORTS)
    how = json.dumps([options, settings, rounds], sort_keys=True)
    key = "\n".join((lowered.as_text(), repr(target), how, *map(_version, _COMPILERS)))
    file = cache() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # not there, or not whole
        return _read(file)
    try:
        found = _of(lowered.compile(compiler_options=options), target, rounds)
    except jax.errors.JaxRuntimeError as error:  # of TPUs: XLA says what does not fit before it makes any code
        if not (asked := requested_bytes(error)):
            raise
        found = Needs(held=0, temporary=asked, program=0, calls=(), moved=0.0, refused=True)
    with suppress(OSError):  # then it is found again the next time
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


def _of(compiled: Any, target: Target, rounds: int) -> Needs:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    once, repeated = collectives(text), collectives(looped(text))
    held, temporary = held_and_temporary(memory, tpu=bool(target.tpu))
    return Needs(
        held=held,
        temporary=temporary,
        program=memory.generated_code_size_in_bytes if target.tpu else 0,
        calls=(*once, *repeated * (rounds - 1)),
        moved=moved(compiled, rounds),
    )


def held_and_temporary(memory: Any, *, tpu: bool) -> tuple[int, int]:
    """Bytes of arguments and results, and of everything else, from a compiled program's `memory_analysis()`."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    if tpu:  # libtpu counts gaps between buffers twice: once is halfway to what is in use at the peak
        temporary = (temporary + min(temporary, memory.peak_memory_in_bytes - held)) // 2
    return held, temporary


def moved(compiled: Any, rounds: int = 1) -> float:
    """Bytes that a compiled program moves through its device's memory, as XLA counts them or, for GPUs, as it would.

    XLA counts what a loop repeats once; of the program's own loop the `rounds` are counted.
    """
    text = compiled.as_text()
    counted = (compiled.cost_analysis() or {}).get("bytes accessed")
    body = moved_by(looped(text), "") if rounds > 1 else 0
    return float(counted + (rounds - 1) * body if counted else moved_by(text) + rounds * body)


def moved_by(text: str, computation: str = "ENTRY ") -> int:
    """Bytes that the kernels of a program (`compiled.as_text()`) take and give.

    A fused kernel is taken to read each operand once, or the slices of it that it takes, as XLA's own analysis does.
    What loops repeat counts not at all.
    """
    entry = text[text.find(f"\n{computation}") + 1 :].split("\n}", 1)[0]
    written = _written(text)
    sizes, total = {}, 0
    for line in entry.splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        sizes[found["name"]] = bytes_of(found["type"])
        if found["kind"] not in _FREE and not found["kind"].endswith("-done"):
            taken = [sizes.get(name, 0) for name in re.findall(r"%[\w.-]+", found["takes"])]
            if found["kind"] == "fusion" and (called := re.search(r" calls=(%[\w.-]+)", line)):
                for number, size in _sliced(written.get(called[1], "")).items():
                    taken[number] = min(size, taken[number])
            total += sizes[found["name"]] + sum(taken)
    return total


def _written(text: str) -> dict[str, str]:
    """A program's computations by their names."""
    return {part.split(" ", 1)[0]: part.split("\n}", 1)[0] for part in re.split(r"\n(?=%)", text)}


def _sliced(body: str) -> dict[int, int]:
    """Those operands of a kernel, by their numbers, of which it reads slices alone: the bytes of these."""
    numbers, slices, whole = dict[str, int](), dict[int, int](), set[int]()
    for line in body.splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        if found["kind"] == "parameter":
            numbers[found["name"]] = int(found["takes"])
        for name in re.findall(r"%[\w.-]+", found["takes"]):
            if name in numbers and found["kind"] == "slice":
                slices[numbers[name]] = slices.get(numbers[name], 0) + bytes_of(found["type"])
            elif name in numbers:
                whole.add(numbers[name])
    return {number: size for number, size in slices.items() if number not in whole}


def looped(text: str) -> str:
    """The computation that a program's own loop repeats, and all that it calls; empty where it has none."""
    body = re.search(r" while\(.*? body=(%[\w.-]+).*?op_name=\"jit\(\w+\)/while\"", text)
    if body is None:
        return ""
    written = _written(text)
    names, reached = [body[1]], dict[str, str]()
    while names:
        name = names.pop()
        reached[name] = part = written.get(name, "")
        calls = re.findall(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)", part)
        names += [each for each in dict.fromkeys(calls) if each not in reached and each not in names]
    return "".join(f"\n{part}\n}}\n" for part in reached.values())
