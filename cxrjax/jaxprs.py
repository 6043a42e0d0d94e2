"""Walk jaxprs: the programs inside an equation, and the equations and inputs that results need."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var


def subjaxprs(equation: Any) -> list[ClosedJaxpr]:
    """Return the programs that an equation runs: the body of a call or loop, the branches of a conditional."""
    return [program for value in equation.params.values() for program in _programs(value)]


def _programs(value: Any) -> list[ClosedJaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value]
    if isinstance(value, Jaxpr):
        return [ClosedJaxpr(value, [])]
    return [program for item in value for program in _programs(item)] if isinstance(value, tuple | list) else []


def needed_equations(jaxpr: Jaxpr, results: Sequence[bool] | None = None) -> list[tuple[Any, list[bool]]]:
    """Return the equations that some results of a program need, in order; compilers drop the others.

    Args:
      jaxpr: the program.
      results: which of its results are needed; default: all.

    Returns:
      Each equation with flags of those of its own results that are needed. Equations with effects are always included.
    """
    results = [True] * len(jaxpr.outvars) if results is None else results
    needed = {var for var, used in zip(jaxpr.outvars, results, strict=True) if used and isinstance(var, Var)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        flags = [var in needed for var in equation.outvars]
        if any(flags) or equation.effects:
            needed.update(var for var in equation.invars if isinstance(var, Var))
            equations.append((equation, flags))
    return equations[::-1]


def needed_inputs(jaxpr: Jaxpr) -> list[bool]:
    """Return which inputs of a program its results depend on."""
    operands = [var for equation, _ in needed_equations(jaxpr) for var in equation.invars]
    needed = {var for var in [*operands, *jaxpr.outvars] if isinstance(var, Var)}
    return [var in needed for var in jaxpr.invars]
