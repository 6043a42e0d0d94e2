"""Which record comes next in training: every one once an epoch, or findings and data sets in given proportions."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int

from cxrjax.errors import CxrError

NAMES = ("shuffle", "balanced")


class Stratum(NamedTuple):
    """Examples that share a part of the draws: which ones, and how large a part in relation to the others'."""

    places: Int[np.ndarray, " m"]
    weight: float


@dataclass(frozen=True)
class Sampling:
    """How training draws its examples.

    A stratum's examples come in random order, all of them before one comes again, then in another order. Strata follow
    each other in their proportions, kept over any stretch of draws to within one draw and, as Grain counts, one percent
    of the smallest.

    Attributes:
      name: "shuffle" takes every example once an epoch. "balanced" gives every finding that is known positive somewhere
        the same number of draws, and as many to the examples that are positive for none: class-balanced sampling (Kang
        et al., ICLR 2020; of chest X-rays Holste et al., DALI 2022), each class a cycle of its own as in Shen et al.
        (ECCV 2016). An example of several findings belongs to each of them, so that common findings that accompany rare
        ones come more often than others.
      weights: parts of the draws that the data sets have, which are then sampled each by itself; empty: all data sets
        are sampled as one.
    """

    name: str = "shuffle"
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.name not in NAMES:
            raise CxrError(f"sampling {self.name!r} is not one of {', '.join(NAMES)}")
        if any(not 0 < weight < np.inf for weight in self.weights):
            raise CxrError(f"weights of data sets {self.weights} must all be above 0; leave out what is not to be used")

    def strata(
        self,
        label: Float32[np.ndarray, "n K"],
        label_mask: Bool[np.ndarray, "n K"],
        origin: Int[np.ndarray, " n"] | None,
    ) -> list[Stratum]:
        """The examples by what they are drawn for; one of several findings is in several strata.

        Args:
          label: target values; above 0.5 is positive.
          label_mask: whether each target is known.
          origin: number of the data set that each comes from; only weights need it.

        Raises:
          CxrError: a data set that has a weight has no examples.
        """
        groups = [np.arange(len(label))]
        if self.weights:
            groups = [np.flatnonzero(origin == number) for number in range(len(self.weights))]
        found = []
        for number, (places, weight) in enumerate(zip(groups, self.weights or (1.0,), strict=True)):
            if not len(places):
                raise CxrError(f"data set {number} of the weighted ones has no records to train on")
            classes = [np.arange(len(places))]
            if self.name == "balanced":
                classes = _classes(label[places], label_mask[places])
            found += [Stratum(places[of], weight / len(classes)) for of in classes]
        return found


def order(strata: list[Stratum], batch_size: int, seed: int) -> grain.MapDataset:
    """The endless order of draws: element k is the place of the k-th example."""
    if len(strata) == 1:
        places = strata[0].places
        return grain.MapDataset.range(len(places)).map(lambda index: places[index]).shuffle(seed).repeat()
    cycles = [_Cycle(stratum.places, seed, number) for number, stratum in enumerate(strata)]
    mixed = grain.MapDataset.mix(
        [grain.MapDataset.source(cycle) for cycle in cycles], [stratum.weight for stratum in strata]
    )
    return grain.MapDataset.source(_Mingled(mixed, batch_size, seed))


class _Cycle:
    """A stratum over and over, each time in another order; Grain's shuffle is slow for a few examples."""

    def __init__(self, places: Int[np.ndarray, " m"], seed: int, number: int):
        self._places = places
        self._turn = lru_cache(2)(lambda turn: np.random.default_rng((seed, number, turn)).permutation(places))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        turn, place = divmod(int(index), len(self._places))
        return int(self._turn(turn)[place])


class _Mingled:
    """Strata, which follow each other in a pattern, in random order within each batch.

    So no device, and no accumulated part of a batch, gets always the same ones.
    """

    def __init__(self, mixed: grain.MapDataset, batch_size: int, seed: int):
        self._mixed, self._size = mixed, batch_size
        self._within = lru_cache(8)(lambda batch: np.random.default_rng((seed, batch)).permutation(batch_size))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        batch, place = divmod(int(index), self._size)
        return cast(int, self._mixed[batch * self._size + int(self._within(batch)[place])])


def _classes(label: Float32[np.ndarray, "n K"], label_mask: Bool[np.ndarray, "n K"]) -> list[Int[np.ndarray, " m"]]:
    """The examples of every finding that has some, and those that are positive for none."""
    positive = label_mask & (label > 0.5)
    columns = [*positive.T, ~positive.any(1)]
    return [np.flatnonzero(column) for column in columns if column.any()]
