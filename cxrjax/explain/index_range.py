"""Which pixels of one image axis an array's elements read, and how operations change that."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Reach:
    """The pixels of one image axis that an array reads: its element j reads first + steps·j to last + steps·j."""

    steps: tuple[Fraction, ...]  # one per axis of the array
    first: Any  # Fraction; +inf where no local path leads to the image
    last: Any  # Fraction; -inf where no local path leads to the image
    whole: bool  # some path reads the whole axis
    length: int  # of the image axis, px

    @classmethod
    def of_image(cls, axis: int, shape: Sequence[int]) -> "Reach":
        """The image itself: each element reads its own pixel."""
        steps = tuple(Fraction(int(k == axis)) for k in range(len(shape)))
        return cls(steps, Fraction(0), Fraction(0), False, shape[axis])

    @property
    def local(self) -> bool:
        """Whether any path to the image is local."""
        return self.first <= self.last

    def everything(self, rank: int) -> "Reach":
        """An array of `rank` axes that reads the whole image and has no local path."""
        return Reach((Fraction(0),) * rank, math.inf, -math.inf, True, self.length)

    def widened(self, low: Any, high: Any) -> "Reach":
        """Reads `low` pixels more before and `high` more after; half an image at once is taken for the whole."""
        if 2 * (high + low) >= self.length:
            return self.everything(len(self.steps))
        return replace(self, first=self.first - low, last=self.last + high)

    def read(self, axis: int, first: Any, last: Any, step: Any = 1) -> "Reach":
        """An operation whose element j reads elements first + step·j to last + step·j along `axis`."""
        old = self.steps[axis]
        steps = (*self.steps[:axis], old * Fraction(step), *self.steps[axis + 1 :])
        low, high = sorted((old * Fraction(first), old * Fraction(last)))
        return replace(self, steps=steps).widened(-low, high)

    def placed(self, sources: Iterable[int | None]) -> "Reach":
        """The array whose axis k is axis `sources[k]` of this one, or new (None)."""
        return replace(self, steps=tuple(Fraction(0) if k is None else self.steps[k] for k in sources))

    def with_steps(self, steps: tuple[Fraction, ...], shape: Sequence[int]) -> "Reach":
        """The same or a larger range, written with other steps."""
        ends = [(s - t) * (n - 1) for s, t, n in zip(self.steps, steps, shape, strict=True)]
        loose = self.widened(-sum(min(d, 0) for d in ends), sum(max(d, 0) for d in ends))
        return replace(loose, steps=steps) if loose.local else loose

    def reshaped(self, old: Sequence[int], new: Sequence[int]) -> "Reach":
        """After a reshape: each run of axes is merged into one axis and that one split again."""
        steps: list[Fraction] = []
        reach = self
        for (a, b), (c, d) in _runs(old, new):
            step, reach = reach._merged(range(a, b), old)
            steps += [step * math.prod(new[k + 1 : d]) for k in range(c, d)]
        return replace(reach, steps=tuple(steps)) if reach.local else reach.everything(len(new))

    def _merged(self, axes: range, shape: Sequence[int]) -> tuple[Fraction, "Reach"]:
        """The step of the single axis that `axes` become, and the range, widened where they do not fit one step."""
        weights = {k: math.prod(shape[k + 1 : axes.stop]) for k in axes if shape[k] > 1}
        if not weights:
            return Fraction(0), self

        def spread(step: Fraction) -> list[Fraction]:
            return [(self.steps[k] - step * w) * (shape[k] - 1) for k, w in weights.items()]

        outer = next(iter(weights))
        step = self.steps[outer] / weights[outer]
        # A stretch short beside the image (the pixels of a patch, that become channels) is rather read at once.
        if 4 * sum(map(abs, spread(Fraction(0)))) < self.length:
            step = Fraction(0)
        ends = spread(step)
        return step, self.widened(-sum(min(d, 0) for d in ends), sum(max(d, 0) for d in ends))


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    """The shortest runs of axes of equal product, in order: which old axes became which new axes."""
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


def union(reaches: Sequence[Reach], shape: Sequence[int]) -> Reach:
    """What an array of this shape reads if it depends on all of these."""
    local = [r for r in reaches if r.local]
    if not local:
        return reaches[0]
    steps = max((r.steps for r in local), key=lambda steps: sum(map(abs, steps)))
    aligned = [r.with_steps(steps, shape) for r in local]
    local = [r for r in aligned if r.local]
    whole = any(r.whole for r in [*reaches, *aligned])
    return replace(local[0], first=min(r.first for r in local), last=max(r.last for r in local), whole=whole)
