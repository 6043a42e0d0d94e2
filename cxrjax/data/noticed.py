"""What a user should know of a data set that was prepared: one line each."""

from collections.abc import Mapping, Sequence

import numpy as np

from cxrjax.data.records import Records
from tfds_builders.sources import Selection, some


def about(records: Records, selection: Selection | None, published: Mapping[str, int]) -> list[str]:
    """All notes.

    Args:
      records: what is prepared.
      selection: what of the source; None where it is not known.
      published: how many images, patients, and images of each official part the publishers count.
    """
    missing, unlisted, notes = [], [], []
    if selection:
        missing, unlisted, notes = selection.missing, selection.unlisted, selection.notes
    return _left_out(len(records), missing, unlisted) + notes + _twins(records)


def _left_out(images: int, missing: Sequence[str], unlisted: Sequence[str]) -> list[str]:
    notes = []
    if missing:
        notes.append(
            f"subset: {images:,} of the {images + len(missing):,} images in the table are prepared, "
            f"{len(missing):,} are not in the source"
        )
    if unlisted:
        notes.append(f"{len(unlisted):,} images of the source are left out: they are not in the table")
    return notes


def _twins(records: Records) -> list[str]:
    """A note of images that are the same file under several patients."""
    _, first, which = np.unique(records.digests, return_index=True, return_inverse=True)
    twins = np.flatnonzero(records.patient != records.patient[first[which]])
    if not len(twins):
        return []
    pairs = [f"{records.id[row]} = {records.id[first[which[row]]]}" for row in twins.tolist()]
    return [
        f"{len(twins):,} images are the same file as another patient's ({some(pairs)}): parts that are drawn keep such "
        "patients together, but the source's own parts may have one in training and one in the test part; delete one "
        "of each, or give both the same patient"
    ]
