"""The theoretical receptive field of any network, by calculation from its jaxpr.

The network is traced with abstract values (nothing is computed, no weight is read) and, operation by operation, each
array keeps the range of image rows and columns that its elements can depend on. That is the arithmetic of Araujo,
Norris & Sim, "Computing receptive fields of convolutional neural networks" (Distill, 2019), for arbitrary graphs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from cxrjax.errors import CxrError
from cxrjax.explain.index_range import Reach, union
from cxrjax.explain.inputs import name_in, named
from cxrjax.explain.operations import RULES
from cxrjax.models.network import Network


@dataclass(frozen=True)
class Window:
    """What one position of a feature map reads along one axis of the image, in px.

    Position j reads pixels `first + stride·j` to `last + stride·j`, both included; those outside the image are padding.
    """

    first: Fraction
    last: Fraction
    stride: Fraction

    @property
    def size(self) -> int:
        """Pixels from the first to the last; 0 where no local path leads to the image."""
        return math.floor(self.last - self.first) + 1

    def at(self, position: int) -> tuple[int, int]:
        """First and last pixel (both included, not clipped to the image) that `position` reads."""
        return math.ceil(self.first + self.stride * position), math.floor(self.last + self.stride * position)


@dataclass(frozen=True)
class ReceptiveField:
    """The theoretical receptive field of one feature map.

    `rows` and `columns` come from the local operations (convolution, local pooling, resampling). `whole` is true where
    some path also reads the whole image (squeeze-and-excitation, attention, global pooling): then every pixel can
    count, and `size` is that of the local paths only, 0 where there are none. With learned or interpolating
    upsampling the size is an upper bound, too large by less than two strides; otherwise it is exact.
    """

    name: str
    rows: Window
    columns: Window
    whole: bool

    @property
    def size(self) -> int:
        """Side in px, the larger of the two."""
        return max(self.rows.size, self.columns.size)

    @property
    def stride(self) -> float:
        """Distance in px between the fields of neighbouring positions."""
        return float(max(self.rows.stride, self.columns.stride))


def theoretical(network: Network, name: str | None = None, *, image_size: int = 1024) -> ReceptiveField:
    """The theoretical receptive field of one feature map: 2071 px for the last of DenseNet121.

    Args:
      network: any network; its parameters are not read.
      name: which of the backbone's feature maps; the last (coarsest) by default.
      image_size: side in px of the square traced. An operation that reads at least half of that at once counts as
        reading the whole image, so it should exceed twice every single kernel and pooling window, measured in px.
        The field itself may be larger.

    Raises:
      CxrError: the network has no such feature map.
    """
    fields = receptive_fields(network, image_size=image_size)
    return fields[name_in(fields, name)]


def receptive_fields(network: Network, *, image_size: int = 1024) -> dict[str, ReceptiveField]:
    """The theoretical receptive field of every feature map, in the backbone's order; see `theoretical`."""

    def features(images: jax.Array, network: Network) -> dict[str, jax.Array]:
        return network.model().features(images)

    image = jax.ShapeDtypeStruct((1, image_size, image_size, network.input_spec.channels), network.dtype)
    return fields_of(features, image, jax.tree.map(_abstract, network))


def fields_of(
    features: Callable[..., dict[str, Any]], image: jax.ShapeDtypeStruct, *rest: Any
) -> dict[str, ReceptiveField]:
    """The receptive field of each value of `features(images, *rest)`.

    Args:
      features: traceable function to a dictionary of arrays f[B,h,w,c].
      image: shape B x H x W x C and type of the images.
      rest: further arguments, arrays or `jax.ShapeDtypeStruct`s; they count as independent of the images.

    Returns:
      A `ReceptiveField` per name.
    """
    program, maps = jax.make_jaxpr(lambda *args: named(features(*args)), return_shape=True)(image, *rest)
    pixels = (Reach.of_image(1, image.shape), Reach.of_image(2, image.shape))
    unknown = [None] * (len(program.jaxpr.invars) - 1)
    values = propagate(program.jaxpr, list(program.consts), [pixels, *unknown])
    fields = {}
    for (name, out), value in zip(maps, values, strict=True):
        if not isinstance(value, tuple):
            raise CxrError(f"feature map {str(name)!r} does not depend on the image")
        rows, columns = (reach.read(3, 0, out.shape[3] - 1, 0) for reach in value)  # over all channels
        fields[str(name)] = ReceptiveField(
            str(name), _window(rows, 1), _window(columns, 2), rows.whole or columns.whole
        )
    return fields


def _window(reach: Reach, axis: int) -> Window:
    if not reach.local:
        return Window(Fraction(0), Fraction(-1), Fraction(0))
    return Window(reach.first, reach.last, reach.steps[axis])


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


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
