"""The range of image pixels that each element of an array reads along one axis, and the rule of each JAX operation.

A rule is called as `rule(equation, i, range_, constants)`: operand number i reads `range_`; `constants` has the values
of operands that are constants, and None for the others. It returns an `IndexRange`, or a list of them, one per output.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np


@dataclass(frozen=True)
class IndexRange:
    """Pixels of one image axis that an array reads: element j reads first + steps·j to last + steps·j, inclusive."""

    steps: tuple[Fraction, ...]  # one per axis of the array
    first: Any  # Fraction; +inf if no local path leads to the image
    last: Any  # Fraction; -inf if no local path leads to the image
    whole: bool  # whether some path reads the whole axis
    length: int  # of the image axis, px

    @classmethod
    def from_image(cls, axis: int, shape: Sequence[int]) -> "IndexRange":
        """Return the range of the image itself, whose elements read their own pixels."""
        steps = tuple(Fraction(int(k == axis)) for k in range(len(shape)))
        return cls(steps, Fraction(0), Fraction(0), False, shape[axis])

    @property
    def local(self) -> bool:
        """Whether any path to the image is local."""
        return self.first <= self.last

    def whole_image(self, rank: int) -> "IndexRange":
        """Return the range of an array with `rank` axes that reads the whole image and has no local path."""
        return IndexRange((Fraction(0),) * rank, math.inf, -math.inf, True, self.length)

    def widened(self, low: Any, high: Any) -> "IndexRange":
        """Return a range with `low` more pixels before and `high` after; half an image or more counts as the whole."""
        if 2 * (high + low) >= self.length:
            return self.whole_image(len(self.steps))
        return replace(self, first=self.first - low, last=self.last + high)

    def read(self, axis: int, first: Any, last: Any, step: Any = 1) -> "IndexRange":
        """Return the range if element j now reads elements first + step·j to last + step·j of `axis`."""
        old = self.steps[axis]
        steps = (*self.steps[:axis], old * Fraction(step), *self.steps[axis + 1 :])
        low, high = sorted((old * Fraction(first), old * Fraction(last)))
        return replace(self, steps=steps).widened(-low, high)

    def rearranged(self, sources: Iterable[int | None]) -> "IndexRange":
        """Return the range of an array whose axis k is axis `sources[k]` of this one, or a new axis (None)."""
        return replace(self, steps=tuple(Fraction(0) if k is None else self.steps[k] for k in sources))

    def with_steps(self, steps: tuple[Fraction, ...], shape: Sequence[int]) -> "IndexRange":
        """Return the same or a larger range, expressed with other steps."""
        ends = [(s - t) * (n - 1) for s, t, n in zip(self.steps, steps, shape, strict=True)]
        loose = self.widened(-sum(min(d, 0) for d in ends), sum(max(d, 0) for d in ends))
        return replace(loose, steps=steps) if loose.local else loose

    def reshaped(self, old: Sequence[int], new: Sequence[int]) -> "IndexRange":
        """Return the range after a reshape, which merges each group of axes into one and splits that again."""
        steps: list[Fraction] = []
        range_ = self
        for (a, b), (c, d) in _axis_groups(old, new):
            step, range_ = range_._merged(range(a, b), old)
            steps += [step * math.prod(new[k + 1 : d]) for k in range(c, d)]
        return replace(range_, steps=tuple(steps)) if range_.local else range_.whole_image(len(new))

    def _merged(self, axes: range, shape: Sequence[int]) -> tuple[Fraction, "IndexRange"]:
        """Return the step of the axis that `axes` merge into, and the range, widened if the step is inexact."""
        weights = {k: math.prod(shape[k + 1 : axes.stop]) for k in axes if shape[k] > 1}
        if not weights:
            return Fraction(0), self

        def spread(step: Fraction) -> list[Fraction]:
            return [(self.steps[k] - step * w) * (shape[k] - 1) for k, w in weights.items()]

        outer = next(iter(weights))
        step = self.steps[outer] / weights[outer]
        # A stretch that is short compared with the image (pixels of a patch that become channels) is read at once.
        if 4 * sum(map(abs, spread(Fraction(0)))) < self.length:
            step = Fraction(0)
        ends = spread(step)
        return step, self.widened(-sum(min(d, 0) for d in ends), sum(max(d, 0) for d in ends))


def _axis_groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the shortest groups of old and new axes of equal size, in order."""
    a = c = 0
    while a < len(old) or c < len(new):
        b, d = min(a + 1, len(old)), min(c + 1, len(new))
        while math.prod(old[a:b]) != math.prod(new[c:d]):
            if math.prod(old[a:b]) < math.prod(new[c:d]):
                b += 1
            else:
                d += 1
        yield (a, b), (c, d)
        a, c = b, d


def merge_ranges(ranges: Sequence[IndexRange], shape: Sequence[int]) -> IndexRange:
    """Return the range of an array of this shape that depends on all of these."""
    local = [r for r in ranges if r.local]
    if not local:
        return ranges[0]
    steps = max((r.steps for r in local), key=lambda steps: sum(map(abs, steps)))
    aligned = [r.with_steps(steps, shape) for r in local]
    local = [r for r in aligned if r.local]
    whole = any(r.whole for r in [*ranges, *aligned])
    return replace(local[0], first=min(r.first for r in local), last=max(r.last for r in local), whole=whole)


def _shape(equation: Any, i: int) -> tuple[int, ...]:
    return equation.invars[i].aval.shape


def _out_shape(equation: Any) -> tuple[int, ...]:
    return equation.outvars[0].aval.shape


def _elementwise(equation: Any, i: int, range_: IndexRange, constants: list) -> list[IndexRange]:
    rank = len(_out_shape(equation))
    return [range_ if len(range_.steps) == rank else range_.rearranged([None] * rank)] * len(equation.outvars)


def _convolution(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    out, p = equation.outvars[0].aval, equation.params
    if i != 0:
        return range_.whole_image(out.ndim)
    lhs, rhs, result = p["dimension_numbers"]
    kernel = [_shape(equation, 1)[k] for k in rhs[2:]]
    for axis, size, stride, pad, up, gap in zip(
        lhs[2:], kernel, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True
    ):
        range_ = _window(range_, axis, size, stride, pad[0], up, gap)
    range_ = range_.read(lhs[1], 0, _shape(equation, 0)[lhs[1]] - 1, 0)
    sources = dict(zip(result, lhs, strict=True))
    return range_.rearranged([sources[k] for k in range(out.ndim)])


def _pooling(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    p = equation.params
    parts = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    for axis, (size, stride, pad, up, gap) in enumerate(zip(*(p[part] for part in parts), strict=True)):
        range_ = _window(range_, axis, size, stride, pad[0], up, gap)
    return range_


def _window(range_: IndexRange, axis: int, size: int, stride: int, pad: int, up: int, gap: int) -> IndexRange:
    """Apply a sliding window of `size` taps, `gap` apart, to an axis with `up - 1` zeros between its elements."""
    return range_.read(axis, Fraction(-pad, up), Fraction(-pad + (size - 1) * gap, up), Fraction(stride, up))


def _reduction(equation: Any, i: int, range_: IndexRange, constants: list) -> list[IndexRange]:
    axes, shape = equation.params["axes"], _shape(equation, i)
    for axis in axes:
        range_ = range_.read(axis, 0, shape[axis] - 1, 0)
    return [range_.rearranged([k for k in range(len(shape)) if k not in axes])] * len(equation.outvars)


def _broadcast(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    shape, out = _shape(equation, i), _out_shape(equation)
    sources: list[int | None] = [None] * len(out)
    for k, target in enumerate(equation.params["broadcast_dimensions"]):
        sources[target] = k if shape[k] == out[target] else None
    return range_.rearranged(sources)


def _reshape(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    return range_.reshaped(_shape(equation, i), _out_shape(equation))


def _transpose(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    return range_.rearranged(equation.params["permutation"])


def _slice(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    starts = equation.params["start_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    for axis, (start, stride) in enumerate(zip(starts, strides, strict=True)):
        range_ = range_.read(axis, start, start, stride)
    return range_


def _split(equation: Any, i: int, range_: IndexRange, constants: list) -> list[IndexRange]:
    axis, sizes = equation.params["axis"], [int(n) for n in equation.params["sizes"]]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [range_.read(axis, start, start) for start in starts]


def _dynamic_slice(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    starts = constants[1:]
    if i != 0:
        return range_.whole_image(len(_out_shape(equation)))
    for axis, (size, part) in enumerate(zip(_shape(equation, 0), _out_shape(equation), strict=True)):
        start = starts[axis]
        if start is not None:
            start = min(max(int(start), 0), size - part)
        elif size == part:
            start = 0
        range_ = range_.read(axis, 0, size - part) if start is None else range_.read(axis, start, start)
    return range_


def _pad(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    if i != 0:
        return range_.rearranged([None] * len(_out_shape(equation)))
    for axis, (low, _, between) in enumerate(equation.params["padding_config"]):
        range_ = range_.read(axis, Fraction(-low, between + 1), Fraction(-low, between + 1), Fraction(1, between + 1))
    return range_


def _reverse(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    for axis in equation.params["dimensions"]:
        end = _shape(equation, 0)[axis] - 1
        range_ = range_.read(axis, end, end, -1)
    return range_


def _concatenate(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    axis = equation.params["dimension"]
    offset = sum(_shape(equation, k)[axis] for k in range(i))
    return range_.read(axis, -offset, -offset)


def _squeeze(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    dropped = equation.params["dimensions"]
    return range_.rearranged([k for k in range(len(range_.steps)) if k not in dropped])


def _expand(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    sources = iter(range(len(range_.steps)))
    rank = len(_out_shape(equation))
    return range_.rearranged([None if k in equation.params["dimensions"] else next(sources) for k in range(rank)])


def _dot(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    """Matrix product: attention and dense layers read the contracted axis; a constant matrix resamples it."""
    contracted, batch = equation.params["dimension_numbers"]
    shapes = _shape(equation, 0), _shape(equation, 1)
    free = [[k for k in range(len(shapes[s])) if k not in (*contracted[s], *batch[s])] for s in (0, 1)]
    other = constants[1 - i]
    sources: list[int | None] = [*batch[i], *(free[0] if i == 0 else [None] * len(free[0]))]
    sources += free[1] if i == 1 else [None] * len(free[1])
    if other is not None and np.ndim(other) == 2 and len(contracted[i]) == 1 and not batch[i]:
        matrix = np.asarray(other).T if contracted[1 - i][0] == 0 else np.asarray(other)  # [out, in]
        axis = contracted[i][0]
        sources[sources.index(None)] = axis
        used = matrix != 0
        low = np.where(used.any(1), used.argmax(1), -1)
        high = used.shape[1] - 1 - used[:, ::-1].argmax(1)
        return _resampled(range_, axis, used.shape[1], low, high).rearranged(sources)
    for axis in contracted[i]:
        range_ = range_.read(axis, 0, shapes[i][axis] - 1, 0)
    return range_.rearranged(sources)


def _gather(equation: Any, i: int, range_: IndexRange, constants: list) -> IndexRange:
    """Indexing: exact for constant indices along one axis (nearest-neighbour resizing), else the whole image."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, out = _shape(equation, 0), _out_shape(equation)
    axes = numbers.start_index_map
    free = [k for k in range(len(out)) if k not in numbers.offset_dims]
    one = len(axes) == 1 and len(free) == 1 and numbers.collapsed_slice_dims == axes
    if i != 0 or not one or constants[1] is None or numbers.operand_batching_dims:
        return range_.whole_image(len(out))
    index = np.asarray(constants[1]).reshape(-1)
    kept = iter(k for k in range(len(shape)) if k != axes[0])
    if any(sizes[k] != shape[k] for k in range(len(shape)) if k != axes[0]):
        return range_.whole_image(len(out))
    index = np.clip(index, 0, shape[axes[0]] - 1)
    range_ = _resampled(range_, axes[0], shape[axes[0]], index, index)
    return range_.rearranged([axes[0] if k in free else next(kept) for k in range(len(out))])


def _resampled(range_: IndexRange, axis: int, size: int, low: np.ndarray, high: np.ndarray) -> IndexRange:
    """Output j reads elements low[j] to high[j] of an axis of `size`; nothing if low[j] is negative."""
    outputs = np.flatnonzero(low >= 0)
    rows = [(int(j), int(low[j]), int(high[j])) for j in outputs]

    def ends(step: Fraction) -> tuple[Fraction, Fraction]:
        return min(a - step * j for j, a, _ in rows), max(b - step * j for j, _, b in rows)

    slope = Fraction(rows[-1][1] - rows[0][1], max(rows[-1][0] - rows[0][0], 1))
    step = min((Fraction(size, low.size), slope), key=lambda step: ends(step)[1] - ends(step)[0])
    return range_.read(axis, *ends(step), step)


_ELEMENTWISE = """
abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv erfc exp exp2 expm1
floor ge gt integer_pow is_finite le log log1p logistic lt max mesh_cast min mul name ne neg not optimization_barrier or
pow reduce_precision rem reshard round rsqrt select_n sharding_constraint sign sin sqrt square stop_gradient sub tan
tanh xor
"""
RULES: dict[str, Callable[[Any, int, IndexRange, list], Any]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(
        ["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"],
        _reduction,
    ),
    **dict.fromkeys(["reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"], _pooling),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": _expand,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
