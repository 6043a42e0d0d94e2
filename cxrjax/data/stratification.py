"""Iterative stratification: dealing groups into parts so that every part has its share of every label."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def stratify(
    positives: Int[np.ndarray, "G K"], sizes: Int[np.ndarray, " G"], shares: Sequence[float], seed: int | Sequence[int]
) -> Int[np.ndarray, " G"]:
    """Deal groups into parts, the rarest label first (Sechidis et al., ECML PKDD 2011, algorithm 1).

    The paper deals single examples. Here the unit is a group that must stay together (a patient): wants are counted in
    examples, and of the groups that have a label the one with most of it is dealt first, so that the small ones level
    out what the large ones left. A group goes where the want, with half of the group already there, is largest in
    relation to the part's share, as Webster's method deals seats: were it the absolute want, as in the paper, the
    largest part would get all of the largest groups. Between equal parts both rules are the same. Ties are drawn.

    Args:
      positives: how many examples of each group have each label.
      sizes: how many examples each group has.
      shares: of the examples, for each part, above 0; they add up to 1.
      seed: of the ties.

    Returns:
      The part of each group, an index into `shares`.
    """
    rng = np.random.default_rng(seed)
    share = np.asarray(shares)
    room = np.full(len(share), float(sizes.sum()))  # examples that a part still wants, over its share
    want = np.tile(positives.sum(0, dtype=float), (len(share), 1))  # and those of each label
    order = rng.permutation(len(sizes))  # ties between groups; those between parts follow from `tie`
    tie = rng.permuted(np.tile(np.arange(len(room)), (len(sizes), 1)), axis=1)
    part = np.full(len(sizes), -1)

    def deal(group: int, wanted: np.ndarray, amount: int) -> None:
        half = (room - sizes[group] / 2 / share, wanted - amount / 2 / share)
        chosen = np.lexsort((tie[group], *half))[-1]
        part[group] = chosen
        room[chosen] -= sizes[group] / share[chosen]
        want[chosen] -= positives[group] / share[chosen]

    while (left := positives[part < 0].sum(0)).any():
        label = int(np.argmin(np.where(left > 0, left, np.inf)))
        members = order[(part[order] < 0) & (positives[order, label] > 0)]
        for group in members[np.argsort(-positives[members, label], kind="stable")]:
            deal(group, want[:, label], int(positives[group, label]))
    rest = order[part[order] < 0]
    for group in rest[np.argsort(-sizes[rest], kind="stable")]:
        deal(group, room, int(sizes[group]))
    return part
