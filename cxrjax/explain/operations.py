"""The rules of `dataflow.py`: what one operation's output reads of the image, given what its operand reads.

A rule is called with (equation, i, reach, known): operand number i reads `reach`; `known` has the value of every
operand that is a constant, None for the others. It answers with a `Reach`, or a list of them, one per output.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from cxrjax.explain.index_range import Reach


def _shape(equation: Any, i: int) -> tuple[int, ...]:
    return equation.invars[i].aval.shape


def _out_shape(equation: Any) -> tuple[int, ...]:
    return equation.outvars[0].aval.shape


def _elementwise(equation: Any, i: int, reach: Reach, known: list) -> list[Reach]:
    rank = len(_out_shape(equation))
    return [reach if len(reach.steps) == rank else reach.placed([None] * rank)] * len(equation.outvars)


def _convolution(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    out, p = equation.outvars[0].aval, equation.params
    if i != 0:
        return reach.everything(out.ndim)
    lhs, rhs, result = p["dimension_numbers"]
    kernel = [_shape(equation, 1)[k] for k in rhs[2:]]
    for axis, size, stride, pad, up, gap in zip(
        lhs[2:], kernel, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True
    ):
        reach = _window(reach, axis, size, stride, pad[0], up, gap)
    reach = reach.read(lhs[1], 0, _shape(equation, 0)[lhs[1]] - 1, 0)
    sources = dict(zip(result, lhs, strict=True))
    return reach.placed([sources[k] for k in range(out.ndim)])


def _pooling(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    p = equation.params
    for axis, (size, stride, pad, up, gap) in enumerate(
        zip(
            p["window_dimensions"],
            p["window_strides"],
            p["padding"],
            p["base_dilation"],
            p["window_dilation"],
            strict=True,
        )
    ):
        reach = _window(reach, axis, size, stride, pad[0], up, gap)
    return reach


def _window(reach: Reach, axis: int, size: int, stride: int, pad: int, up: int, gap: int) -> Reach:
    """A sliding window of `size` taps, `gap` apart, over an axis with `up - 1` zeros put between its elements."""
    return reach.read(axis, Fraction(-pad, up), Fraction(-pad + (size - 1) * gap, up), Fraction(stride, up))


def _reduction(equation: Any, i: int, reach: Reach, known: list) -> list[Reach]:
    axes, shape = equation.params["axes"], _shape(equation, i)
    for axis in axes:
        reach = reach.read(axis, 0, shape[axis] - 1, 0)
    return [reach.placed([k for k in range(len(shape)) if k not in axes])] * len(equation.outvars)


def _broadcast(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    shape, out = _shape(equation, i), _out_shape(equation)
    sources: list[int | None] = [None] * len(out)
    for k, target in enumerate(equation.params["broadcast_dimensions"]):
        sources[target] = k if shape[k] == out[target] else None
    return reach.placed(sources)


def _reshape(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    return reach.reshaped(_shape(equation, i), _out_shape(equation))


def _transpose(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    return reach.placed(equation.params["permutation"])


def _slice(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    starts = equation.params["start_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    for axis, (start, stride) in enumerate(zip(starts, strides, strict=True)):
        reach = reach.read(axis, start, start, stride)
    return reach


def _split(equation: Any, i: int, reach: Reach, known: list) -> list[Reach]:
    axis, sizes = equation.params["axis"], [int(n) for n in equation.params["sizes"]]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [reach.read(axis, start, start) for start in starts]


def _dynamic_slice(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    starts = known[1:]
    if i != 0:
        return reach.everything(len(_out_shape(equation)))
    for axis, (size, part) in enumerate(zip(_shape(equation, 0), _out_shape(equation), strict=True)):
        start = starts[axis]
        if start is not None:
            start = min(max(int(start), 0), size - part)
        elif size == part:
            start = 0
        reach = reach.read(axis, 0, size - part) if start is None else reach.read(axis, start, start)
    return reach


def _pad(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    if i != 0:
        return reach.placed([None] * len(_out_shape(equation)))
    for axis, (low, _, between) in enumerate(equation.params["padding_config"]):
        reach = reach.read(axis, Fraction(-low, between + 1), Fraction(-low, between + 1), Fraction(1, between + 1))
    return reach


def _reverse(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    for axis in equation.params["dimensions"]:
        end = _shape(equation, 0)[axis] - 1
        reach = reach.read(axis, end, end, -1)
    return reach


def _concatenate(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    axis = equation.params["dimension"]
    offset = sum(_shape(equation, k)[axis] for k in range(i))
    return reach.read(axis, -offset, -offset)


def _squeeze(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    dropped = equation.params["dimensions"]
    return reach.placed([k for k in range(len(reach.steps)) if k not in dropped])


def _expand(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    sources = iter(range(len(reach.steps)))
    rank = len(_out_shape(equation))
    return reach.placed([None if k in equation.params["dimensions"] else next(sources) for k in range(rank)])


def _dot(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    """A product of matrices: attention or a dense layer reads the contracted axis, a constant matrix resamples it."""
    contracted, batch = equation.params["dimension_numbers"]
    shapes = _shape(equation, 0), _shape(equation, 1)
    free = [[k for k in range(len(shapes[s])) if k not in (*contracted[s], *batch[s])] for s in (0, 1)]
    other = known[1 - i]
    sources: list[int | None] = [*batch[i], *(free[0] if i == 0 else [None] * len(free[0]))]
    sources += free[1] if i == 1 else [None] * len(free[1])
    if other is not None and np.ndim(other) == 2 and len(contracted[i]) == 1 and not batch[i]:
        matrix = np.asarray(other).T if contracted[1 - i][0] == 0 else np.asarray(other)  # [out, in]
        axis = contracted[i][0]
        sources[sources.index(None)] = axis
        used = matrix != 0
        low = np.where(used.any(1), used.argmax(1), -1)
        high = used.shape[1] - 1 - used[:, ::-1].argmax(1)
        return _resampled(reach, axis, used.shape[1], low, high).placed(sources)
    for axis in contracted[i]:
        reach = reach.read(axis, 0, shapes[i][axis] - 1, 0)
    return reach.placed(sources)


def _gather(equation: Any, i: int, reach: Reach, known: list) -> Reach:
    """Indexing: exact where constant indices pick along one axis (nearest-neighbour resizing), else the whole axis."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, out = _shape(equation, 0), _out_shape(equation)
    axes = numbers.start_index_map
    free = [k for k in range(len(out)) if k not in numbers.offset_dims]
    one = len(axes) == 1 and len(free) == 1 and numbers.collapsed_slice_dims == axes
    if i != 0 or not one or known[1] is None or numbers.operand_batching_dims:
        return reach.everything(len(out))
    index = np.asarray(known[1]).reshape(-1)
    kept = iter(k for k in range(len(shape)) if k != axes[0])
    if any(sizes[k] != shape[k] for k in range(len(shape)) if k != axes[0]):
        return reach.everything(len(out))
    index = np.clip(index, 0, shape[axes[0]] - 1)
    reach = _resampled(reach, axes[0], shape[axes[0]], index, index)
    return reach.placed([axes[0] if k in free else next(kept) for k in range(len(out))])


def _resampled(reach: Reach, axis: int, size: int, low: np.ndarray, high: np.ndarray) -> Reach:
    """Output j reads elements low[j] to high[j] of an axis of `size`, or nothing where low[j] is negative."""
    outputs = np.flatnonzero(low >= 0)
    rows = [(int(j), int(low[j]), int(high[j])) for j in outputs]

    def ends(step: Fraction) -> tuple[Fraction, Fraction]:
        return min(a - step * j for j, a, _ in rows), max(b - step * j for j, _, b in rows)

    slope = Fraction(rows[-1][1] - rows[0][1], max(rows[-1][0] - rows[0][0], 1))
    step = min((Fraction(size, low.size), slope), key=lambda step: ends(step)[1] - ends(step)[0])
    return reach.read(axis, *ends(step), step)


_ELEMENTWISE = """
abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv erfc exp exp2 expm1
floor ge gt integer_pow is_finite le log log1p logistic lt max mesh_cast min mul name ne neg not optimization_barrier or
pow reduce_precision rem reshard round rsqrt select_n sharding_constraint sign sin sqrt square stop_gradient sub tan
tanh xor
"""
RULES: dict[str, Callable[[Any, int, Reach, list], Any]] = {
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
