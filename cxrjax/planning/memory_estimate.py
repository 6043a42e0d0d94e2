"""Estimate the peak memory of a program from its jaxpr, for when no compiler for the device is available."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Jaxpr, Var

from cxrjax.jaxprs import needed_equations, subjaxprs

_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min"}
"""Compilers write their results to memory, and fuse what computes their operands."""

_MATERIALIZED = _REDUCTIONS | {
    "conv_general_dilated", "dot_general", "scan", "while", "sort", "gather", "scatter", "scatter-add",
    "reduce_window_max", "reduce_window_sum", "reduce_window", "select_and_scatter_add", "cumsum", "random_bits",
    "threefry2x32",
}  # fmt: skip
"""Operations whose results (and operands, except for reductions) are in memory. All others are fused into readers."""

Buffers = frozenset[int]


@dataclass(frozen=True)
class _Value:
    """An array: the buffers that it is computed from, or, if it is in memory itself, its own buffer."""

    buffers: Buffers = frozenset()
    in_memory: bool = False


_EMPTY = _Value()


@dataclass
class _Tape:
    """A flat program: the buffers that each step reads and writes, in order."""

    size_of: Callable[[Any], int]
    sizes: list[int] = field(default_factory=list)
    steps: list[tuple[Buffers, Buffers, int]] = field(default_factory=list)  # read, written, temporary bytes

    def write(self, operands: Buffers, avals: Sequence[Any], temporary: int = 0) -> list[_Value]:
        """Add a step that reads buffers and writes arrays of these avals."""
        first = len(self.sizes)
        self.sizes += [self.size_of(aval) for aval in avals]
        written = range(first, len(self.sizes))
        self.steps.append((operands, frozenset(written), temporary))
        return [_Value(frozenset([buffer]), in_memory=True) for buffer in written]

    def peak(self, results: Buffers) -> int:
        """Return the most bytes held at once; results are held to the end."""
        last = {buffer: time for time, (read, written, _) in enumerate(self.steps) for buffer in read | written}
        last |= dict.fromkeys(results, len(self.steps))
        freed: dict[int, int] = {}
        for buffer, time in last.items():
            freed[time] = freed.get(time, 0) + self.sizes[buffer]
        held = peak = 0
        for time, (_, written, temporary) in enumerate(self.steps):
            held += sum(self.sizes[buffer] for buffer in written)
            peak = max(peak, held + temporary)
            held -= freed.get(time, 0)
        return peak


def peak_bytes(program: Jaxpr, size_of: Callable[[Any], int] | None = None) -> int:
    """Estimate the most bytes that a program holds at once besides its arguments, computed in the order of tracing.

    Operands and results of convolutions, matrix products and loops, results of reductions, and the arguments of
    recomputed functions (`jax.checkpoint`) are in memory from their first to their last use. Everything else is taken
    to be fused.

    Args:
      program: without effects.
      size_of: bytes of an array, by its `aval`; default: its full size.
    """
    tape = _Tape(size_of or (lambda aval: math.prod(aval.shape) * aval.dtype.itemsize))
    arguments = [_Value(frozenset([number]), in_memory=True) for number in range(len(program.invars))]
    tape.sizes = [0] * len(arguments)
    results = _record(program, arguments, tape, [True] * len(program.outvars))
    return tape.peak(_union(results))


def _record(jaxpr: Jaxpr, arguments: Sequence[_Value], tape: _Tape, needed: Sequence[bool]) -> list[_Value]:
    """Put the steps that the needed results take on the tape; return the results."""
    values = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Value:
        return values.get(atom, _EMPTY) if isinstance(atom, Var) else _EMPTY

    def materialize(variables: Sequence[Any]) -> Buffers:
        for variable in variables:
            value = read(variable)
            if value.buffers and not value.in_memory:
                values[variable] = tape.write(value.buffers, [variable.aval])[0]
        return _union(map(read, variables))

    for equation, used in needed_equations(jaxpr, needed):
        name, operands = equation.primitive.name, equation.invars
        programs = [program.jaxpr for program in subjaxprs(equation)]
        if name in _MATERIALIZED:
            temporary = max((peak_bytes(program, tape.size_of) for program in programs), default=0)
            buffers = _union(map(read, operands)) if name in _REDUCTIONS else materialize(operands)
            results = tape.write(buffers, [result.aval for result in equation.outvars], temporary)
        elif programs:
            if equation.params.get("prevent_cse"):
                materialize(operands)
            program = programs[-1]  # of branches for several platforms, the last is the general one
            inputs = [read(operand) for operand in operands[len(operands) - len(program.invars) :]]
            results = _record(program, inputs, tape, used)
        elif name == "optimization_barrier":
            materialize(operands)
            results = [read(operand) for operand in operands]
        else:
            results = [_Value(_union(map(read, operands)))] * len(equation.outvars)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(result) for result in jaxpr.outvars]


def _union(values: Iterable[_Value]) -> Buffers:
    return frozenset[int]().union(*(value.buffers for value in values))
