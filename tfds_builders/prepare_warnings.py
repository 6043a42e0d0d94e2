"""Notes on a prepared data set: missing images, unpublished counts, duplicates, and wrong sizes."""

from collections.abc import Mapping, Sequence

import numpy as np

from cxrjax.data.records import Records
from cxrjax.errors import list_some
from tfds_builders.sources import Selection


def collect_notes(records: Records, selection: Selection | None, published: Mapping[str, int]) -> list[str]:
    """Collect all notes, one line each.

    Args:
      records: the prepared records.
      selection: how they were selected from the source; None if the source was not read.
      published: numbers of images, patients, and images of each official split in the published data set.
    """
    missing, unlisted, notes, sizes = [], [], [], {}
    if selection:
        missing, unlisted, notes, sizes = selection.missing, selection.unlisted, selection.notes, selection.sizes
    return [
        *_note_mismatches(len(records), missing, unlisted),
        *note_counts(records, len(missing), published),
        *notes,
        *_note_duplicates(records),
        *_note_wrong_sizes(records, sizes),
    ]


def _note_mismatches(images: int, missing: Sequence[str], unlisted: Sequence[str]) -> list[str]:
    notes = []
    if missing:
        notes.append(
            f"subset: {images:,} of the {images + len(missing):,} images in the table are prepared, "
            f"{len(missing):,} are not in the source"
        )
    if unlisted:
        notes.append(f"{len(unlisted):,} images of the source are skipped because they are not in the table")
    return notes


def note_counts(records: Records, missing: int, published: Mapping[str, int]) -> list[str]:
    """Note counts that differ from the published ones; for a subset only the length of its table is compared."""
    if missing:
        listed = len(records) + missing
        differs = published and listed != published["images"]
        return [f"the table lists {listed:,} images, the published one {published['images']:,}"] if differs else []
    counts = {"images": len(records), "patients": len(np.unique(records.patient))}
    counts |= {split: int((records.official == split).sum()) for split in published if split not in counts}
    different = [
        f"{counts[name]:,} {name} (published: {count:,})" for name, count in published.items() if counts[name] != count
    ]
    return [f"this is not the whole published data set: {', '.join(different)}"] if different else []


def _note_duplicates(records: Records) -> list[str]:
    """Note images that are the same file under several patients."""
    _, first, inverse = np.unique(records.digests, return_index=True, return_inverse=True)
    duplicates = np.flatnonzero(records.patient != records.patient[first[inverse]])
    if not len(duplicates):
        return []
    pairs = [f"{records.id[row]} = {records.id[first[inverse[row]]]}" for row in duplicates.tolist()]
    return [
        f"{len(duplicates):,} images are the same file as another patient's ({list_some(pairs)}): random splits keep "
        "such patients together, but the source's own splits may have one in train and one in test; delete one of "
        "each, or give both the same patient"
    ]


def _note_wrong_sizes(records: Records, expected: Mapping[str, tuple[int, int]]) -> list[str]:
    """Note images whose size differs from that in the source's tables."""
    if not expected:
        return []
    sizes = zip(records.table["width"].to_pylist(), records.table["height"].to_pylist(), strict=True)
    wrong = [
        f"{id} is {width} x {height} px, not {expected[id][0]} x {expected[id][1]}"
        for id, (width, height) in zip(records.id.tolist(), sizes, strict=True)
        if expected.get(id, (width, height)) != (width, height)
    ]
    return [f"{len(wrong):,} images have another size than the table says: {list_some(wrong)}"] if wrong else []
