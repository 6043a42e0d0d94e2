"""Follow the image through a jaxpr: which rows and columns of it each array can depend on."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from cxrjax.explain.operations import RULES
from cxrjax.explain.reach import Reach, union

_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_LARGEST_CONSTANT = 2**24  # elements; larger constants are not followed


def propagate(jaxpr: Jaxpr, consts: list, inputs: list) -> list:
    """Follow the image through a jaxpr.

    A value is a pair of reaches (rows, columns) where it depends on the image, an array where it is a known constant,
    and None otherwise (parameters).

    Args:
      jaxpr: the program.
      consts: the values of its constants.
      inputs: the values of its inputs.

    Returns:
      The values of its outputs.
    """
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, _outputs(equation, operands), strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, operands: list) -> list:
    name, outvars = equation.primitive.name, equation.outvars
    shapes = [out.aval.shape for out in outvars]
    if name in _CALLS:
        inner = equation.params.get("call_jaxpr") or equation.params["jaxpr"]
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, [])
        return propagate(closed.jaxpr, list(closed.consts), operands)
    if name == "cond" and not isinstance(operands[0], tuple | None):  # a branch that is known, such as this platform's
        branch = equation.params["branches"][int(operands[0])]
        return propagate(branch.jaxpr, list(branch.consts), operands[1:])
    dependent = [(i, value) for i, value in enumerate(operands) if isinstance(value, tuple)]
    if not dependent:
        if any(value is None for value in operands) or max(map(math.prod, shapes)) > _LARGEST_CONSTANT:
            return [None] * len(outvars)
        result = equation.primitive.bind(*operands, **equation.params)
        return list(result) if equation.primitive.multiple_results else [result]
    if not all(map(math.prod, shapes)):  # an array without elements reads nothing
        return [None] * len(outvars)

    known = [None if isinstance(value, tuple) else value for value in operands]
    rows = [_applied(equation, i, value[0], known) for i, value in dependent]
    columns = [_applied(equation, i, value[1], known) for i, value in dependent]
    return [
        (union([reach[k] for reach in rows], shape), union([reach[k] for reach in columns], shape))
        for k, shape in enumerate(shapes)
    ]


def _applied(equation: Any, i: int, reach: Reach, known: list) -> list[Reach]:
    """The rule's answer; an operation without a rule may read anything."""
    rule = RULES.get(equation.primitive.name)
    if rule is None:
        return [reach.everything(len(out.aval.shape)) for out in equation.outvars]
    result = rule(equation, i, reach, known)
    return result if isinstance(result, list) else [result]
