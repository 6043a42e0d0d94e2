"""Theoretical receptive fields of any network, computed from its jaxpr.

The network is traced with abstract values: nothing is computed and no weight is read. For each array the tracer keeps
the range of image rows and columns that its elements can depend on. This is the arithmetic of Araujo, Norris & Sim,
"Computing receptive fields of convolutional neural networks" (Distill, 2019), for arbitrary graphs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

from cxrjax.errors import CxrError
from cxrjax.explain.index_range import RULES, IndexRange, merge_ranges
from cxrjax.explain.inputs import with_names
from cxrjax.jaxprs import subjaxprs
from cxrjax.models.network import Network


@dataclass(frozen=True)
class Window:
    """Pixels that a position of a feature map reads along one image axis.

    Position j reads pixels `first + stride·j` to `last + stride·j`, both included; those outside the image are padding.
    """

    first: Fraction
    last: Fraction
    stride: Fraction

    @property
    def size(self) -> int:
        """Number of pixels from the first to the last; 0 if no local path leads to the image."""
        return math.floor(self.last - self.first) + 1

    def at(self, position: int) -> tuple[int, int]:
        """Return the first and last pixel that `position` reads, both included and not clipped to the image."""
        return math.ceil(self.first + self.stride * position), math.floor(self.last + self.stride * position)


@dataclass(frozen=True)
class ReceptiveField:
    """The theoretical receptive field of one feature map.

    `rows` and `columns` come from local operations (convolution, local pooling, resampling). `whole` is true if some
    path also reads the whole image (squeeze-and-excitation, attention, global pooling): then every pixel can count, and
    `size` is that of the local paths only, 0 if there are none. With learned or interpolating upsampling the size is
    an upper bound, too large by less than two strides; otherwise it is exact.
    """

    name: str
    rows: Window
    columns: Window
    whole: bool

    @property
    def size(self) -> int:
        """Larger side, px."""
        return max(self.rows.size, self.columns.size)

    @property
    def stride(self) -> float:
        """Distance between the fields of neighbouring positions, px."""
        return float(max(self.rows.stride, self.columns.stride))


def receptive_fields(network: Network, *, image_size: int = 1024) -> dict[str, ReceptiveField]:
    """Return the theoretical receptive field of every feature map, in the backbone's order.

    The last map of DenseNet121 has 2071 px.

    Args:
      network: any network; its parameters are not read.
      image_size: side of the traced square, px. An operation that reads at least half of it at once counts as reading
        the whole image, so it should exceed twice every kernel and pooling window, in px. The field may be larger.
    """

    def features(images: jax.Array, network: Network) -> dict[str, jax.Array]:
        return network.model().features(images)

    image = jax.ShapeDtypeStruct((1, image_size, image_size, network.input_spec.channels), network.dtype)
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), network)
    return fields_of(features, image, abstract)


def fields_of(
    features: Callable[..., dict[str, Any]], image: jax.ShapeDtypeStruct, *rest: Any
) -> dict[str, ReceptiveField]:
    """Return the receptive field of each array f[B, h, w, c] of `features(images, *rest)`, by name.

    `image` has the images' shape B x H x W x C and dtype; `rest` counts as independent of them.

    Raises:
      CxrError: a value does not depend on the image.
    """
    program, maps = jax.make_jaxpr(lambda *args: with_names(features(*args)), return_shape=True)(image, *rest)
    pixels = (IndexRange.from_image(1, image.shape), IndexRange.from_image(2, image.shape))
    values = _propagate(program, [pixels, *[None] * (len(program.jaxpr.invars) - 1)])
    fields = {}
    for (name, out), value in zip(maps, values, strict=True):
        if not isinstance(value, tuple):
            raise CxrError(f"feature map {str(name)!r} does not depend on the image")
        rows, columns = (axis.read(3, 0, out.shape[3] - 1, 0) for axis in value)  # over all channels
        fields[str(name)] = ReceptiveField(
            str(name), _window(rows, 1), _window(columns, 2), rows.whole or columns.whole
        )
    return fields


def _window(axis_range: IndexRange, axis: int) -> Window:
    if not axis_range.local:
        return Window(Fraction(0), Fraction(-1), Fraction(0))
    return Window(axis_range.first, axis_range.last, axis_range.steps[axis])


_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_LARGEST_CONSTANT = 2**24  # elements; larger constants are not followed


def _propagate(program: ClosedJaxpr, inputs: list) -> list:
    """Follow the image through a program, from the values of its inputs to the values of its outputs.

    A value is a pair of ranges (rows, columns) if it depends on the image, an array if it is a known constant, and None
    otherwise (parameters).
    """
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *inputs], strict=True))

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
        return _propagate(subjaxprs(equation)[0], operands)
    if name == "cond" and not isinstance(operands[0], tuple | None):  # a known branch, such as that of this platform
        return _propagate(equation.params["branches"][int(operands[0])], operands[1:])
    dependent = [(i, value) for i, value in enumerate(operands) if isinstance(value, tuple)]
    if not dependent:
        if any(value is None for value in operands) or max(map(math.prod, shapes)) > _LARGEST_CONSTANT:
            return [None] * len(outvars)
        result = equation.primitive.bind(*operands, **equation.params)
        return list(result) if equation.primitive.multiple_results else [result]
    if not all(map(math.prod, shapes)):  # an array without elements reads nothing
        return [None] * len(outvars)

    constants = [None if isinstance(value, tuple) else value for value in operands]
    rows = [_apply_rule(equation, i, value[0], constants) for i, value in dependent]
    columns = [_apply_rule(equation, i, value[1], constants) for i, value in dependent]
    return [
        (merge_ranges([ranges[k] for ranges in rows], shape), merge_ranges([ranges[k] for ranges in columns], shape))
        for k, shape in enumerate(shapes)
    ]


def _apply_rule(equation: Any, i: int, operand: IndexRange, constants: list) -> list[IndexRange]:
    """Return the range of each output; an operation without a rule may read anything."""
    rule = RULES.get(equation.primitive.name)
    if rule is None:
        return [operand.whole_image(len(out.aval.shape)) for out in equation.outvars]
    result = rule(equation, i, operand, constants)
    return result if isinstance(result, list) else [result]
