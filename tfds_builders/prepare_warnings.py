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
    sizes = selection.sizes if selection else {}
    return [
        *_left_out(len(records), missing, unlisted),
        *_totals(records, len(missing), published),
        *notes,
        *_twins(records),
        *_sizes(records, sizes),
    ]


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


def _totals(records: Records, missing: int, published: Mapping[str, int]) -> list[str]:
    """A note of counts that are not the published ones; of a subset only its table is compared."""
    if missing:
        listed = len(records) + missing
        wrong = published and listed != published["images"]
        return [f"the table lists {listed:,} images, and the published one {published['images']:,}"] if wrong else []
    found = {"images": len(records), "patients": len(np.unique(records.patient))}
    found |= {part: int((records.official == part).sum()) for part in published if part not in found}
    differ = [
        f"{found[name]:,} {name} (published: {count:,})" for name, count in published.items() if found[name] != count
    ]
    return [f"this is not the whole published data set: {', '.join(differ)}"] if differ else []


def _sizes(records: Records, told: Mapping[str, tuple[int, int]]) -> list[str]:
    """A note of images whose size is another than the source's tables tell."""
    if not told or "width" not in records.table.column_names:
        return []
    sizes = zip(records.table["width"].to_pylist(), records.table["height"].to_pylist(), strict=True)
    wrong = [
        f"{id} is {width} x {height} px, not {told[id][0]} x {told[id][1]}"
        for id, (width, height) in zip(records.id.tolist(), sizes, strict=True)
        if told.get(id, (width, height)) != (width, height)
    ]
    return [f"{len(wrong):,} images are of another size than the table says: {some(wrong)}"] if wrong else []
