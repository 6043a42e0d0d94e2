"""What a program holds at its peak, from its jaxpr: a first idea where no compiler for the device is at hand."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var

_SUMS = {"reduce_sum", "reduce_max", "reduce_min"}
"""Operations whose results compilers write to memory, while they compute what these take on the way."""

_WRITES = _SUMS | {"conv_general_dilated", "dot_general", "scan", "while", "sort", "gather", "scatter", "scatter-add",
                   "reduce_window_max", "reduce_window_sum", "reduce_window", "select_and_scatter_add", "cumsum",
                   "random_bits", "threefry2x32"}  # fmt: skip
"""And those for which they also write what these take. All others are fused: computed anew wherever they are read."""

Buffers = frozenset[int]


@dataclass(frozen=True)
class _Value:
    """An array: the buffers it is computed from, or where it is written, the one that holds it."""

    of: Buffers = frozenset()
    written: bool = False


_NOTHING = _Value()


@dataclass
class _Tape:
    """A program, flat: what it writes, in which order, and what for that is read."""

    size_of: Callable[[Any], int]
    sizes: list[int] = field(default_factory=list)
    steps: list[tuple[Buffers, Buffers, int]] = field(default_factory=list)  # read, written, bytes held meanwhile

    def write(self, taken: Buffers, avals: Sequence[Any], passing: int = 0) -> list[_Value]:
        """One operation."""
        first = len(self.sizes)
        self.sizes += [self.size_of(aval) for aval in avals]
        made = range(first, len(self.sizes))
        self.steps.append((taken, frozenset(made), passing))
        return [_Value(frozenset([buffer]), written=True) for buffer in made]

    def peak(self, kept: Buffers) -> int:
        """Bytes at the worst moment; what is kept is held to the end."""
        last = {buffer: time for time, (taken, made, _) in enumerate(self.steps) for buffer in taken | made}
        last |= dict.fromkeys(kept, len(self.steps))
        ends: dict[int, int] = {}
        for buffer, time in last.items():
            ends[time] = ends.get(time, 0) + self.sizes[buffer]
        now = peak = 0
        for time, (_, made, passing) in enumerate(self.steps):
            now += sum(self.sizes[buffer] for buffer in made)
            peak = max(peak, now + passing)
            now -= ends.get(time, 0)
        return peak


def peak_bytes(program: Jaxpr, size_of: Callable[[Any], int] | None = None) -> int:
    """The most that a program holds at once beside its arguments, if it computes in the order in which it was traced.

    What convolutions, matrix products and loops take and give, and what sums give, is in memory from when it is first
    needed to when it is last; so are the arguments of what is recomputed. Everything between is not.

    Args:
      program: without effects.
      size_of: bytes of an array by its `aval`; default all of it.
    """
    tape = _Tape(size_of or (lambda aval: math.prod(aval.shape) * aval.dtype.itemsize))
    there = [_Value(frozenset([number]), written=True) for number in range(len(program.invars))]
    tape.sizes = [0] * len(there)
    results = _run(program, there, tape, [True] * len(program.outvars))
    return tape.peak(_all(results))


def _run(jaxpr: Jaxpr, arguments: Sequence[_Value], tape: _Tape, wanted: Sequence[bool]) -> list[_Value]:
    """Put what the wanted results need on the tape."""
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    read = lambda of: known.get(of, _NOTHING) if isinstance(of, Var) else _NOTHING  # noqa: E731

    def in_memory(variables: Sequence[Any]) -> Buffers:
        for variable in variables:
            value = read(variable)
            if value.of and not value.written:
                known[variable] = tape.write(value.of, [variable.aval])[0]
        return _all(map(read, variables))

    for equation, used in _needed(jaxpr, wanted):
        name, programs, taken = equation.primitive.name, _programs(equation.params), equation.invars
        if name in _WRITES:
            passing = max((peak_bytes(each, tape.size_of) for each in programs), default=0)
            inputs = _all(map(read, taken)) if name in _SUMS else in_memory(taken)
            made = tape.write(inputs, [result.aval for result in equation.outvars], passing)
        elif programs:
            if equation.params.get("prevent_cse"):
                in_memory(taken)
            program = programs[-1]  # of several, one for each platform, the plain one
            given = [read(each) for each in taken[len(taken) - len(program.invars) :]]
            made = _run(program, given, tape, used)
        elif name == "optimization_barrier":
            in_memory(taken)
            made = [read(each) for each in taken]
        else:
            made = [_Value(_all(map(read, taken)))] * len(equation.outvars)
        known.update(zip(equation.outvars, made, strict=True))
    return [read(result) for result in jaxpr.outvars]


def _all(values: Iterable[_Value]) -> Buffers:
    return frozenset[int]().union(*(value.of for value in values))


def _needed(jaxpr: Jaxpr, wanted: Sequence[bool]) -> list[tuple[Any, list[bool]]]:
    """In their order the operations that the wanted results need, each with which of its own results are needed."""
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    needed = {result for result, is_wanted in pairs if is_wanted and isinstance(result, Var)}
    found = []
    for equation in reversed(jaxpr.eqns):
        used = [result in needed for result in equation.outvars]
        if any(used):
            needed.update(taken for taken in equation.invars if isinstance(taken, Var))
            found.append((equation, used))
    return found[::-1]


def _programs(parameters: dict[str, Any]) -> list[Jaxpr]:
    """Those that an operation runs."""
    values = [item for value in parameters.values() for item in (value if isinstance(value, tuple) else (value,))]
    programs = (value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in values)
    return [program for program in programs if isinstance(program, Jaxpr)]
