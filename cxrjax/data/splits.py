"""Splits into training, validation and test by patient, checked for leakage and saved as a CSV of `id,split`."""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Int, Int32

from cxrjax.console import log
from cxrjax.data.records import Records
from cxrjax.errors import CxrError, list_some
from cxrjax.files import atomic_path, read_text
from cxrjax.findings import POSITIVE

SplitRows = Mapping[str, Int32[np.ndarray, " n"]]
"""Rows of the records' table, by split name."""
SplitFiles = Path | str | Mapping[str, Path | str] | Sequence[Path | str]

SPLITS = ("train", "validation", "test")
STRATEGIES = ("official", "random", "stratified", "folds", "small", "files")
OFFICIAL_SPLITS = (*SPLITS, "train_val")
"""Values of a record's official split; `train_val` is divided into train and validation."""
SPLIT_ALIASES = MappingProxyType({
    "train": "train", "training": "train", "validation": "validation", "validate": "validation", "valid": "validation",
    "val": "validation", "test": "test", "testing": "test",
})  # fmt: skip
_FINGERPRINT = re.compile(r"^# cxrjax split .* fingerprint ([0-9a-f]{64})$")


@dataclass(frozen=True)
class DataSplit:
    """Assignment of records to splits.

    Attributes:
      name: the strategy that made it, one of `STRATEGIES`.
      rows: rows of the records' table for each split, ascending.
      fingerprint: sha256 of the ids and their splits; equal for equal assignments.
    """

    name: str
    rows: SplitRows
    fingerprint: str


def make_split(
    records: Records,
    name: str,
    *,
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    files: SplitFiles | None = None,
    sizes: Mapping[str, int] | Sequence[int] | None = None,
    folds: int = 5,
    fold: int = 0,
    subset_fraction: float = 1.0,
    by: str = "patient",
) -> DataSplit:
    """Split the records so that no patient is in two splits.

    Random strategies also keep patients together who share an identical image (`Records.patient_groups`). For official
    splits and split files, such images are reported on stderr.

    Args:
      records: the records to split.
      name: the strategy.
        "official": the data set's own splits. Without an official validation split, fractions[1] / (fractions[0] +
        fractions[1]) of the training patients are drawn for validation.
        "random": `fractions` of the patients.
        "stratified": `fractions` of the images and of each finding's positive images, as closely as whole patients
        allow.
        "folds": stratified k-fold cross-validation; fold `fold` of `folds` is the test split, the rest is divided
        into train and validation in the ratio of `fractions`, stratified as well.
        "small": `sizes` images per split, from patients in random order.
        "files": read from `files`.
      seed: seed of all random draws.
      fractions: of the patients for train, validation and test; must sum to 1.
      files: one CSV with the columns id and split, whose ids must all be prepared; or one list of ids per split (a
        mapping, or three files in the order train, validation, test), which may contain ids that are not prepared, as
        published lists do for a subset.
      sizes: images per split.
      folds: number of folds, at least 2.
      fold: the test fold, counted from 0.
      subset_fraction: fraction of the patients to use, drawn first; the others are in no split. Only for "random",
        "stratified" and "folds".
      by: "patient", or for "stratified" also "image": draws single images, as some papers do, so that patients leak
        between splits and scores are optimistic; the number of leaking patients is reported on stderr.

    Raises:
      CxrError: a patient is in two splits, a split is empty, a file or row is invalid, or an argument is out of range.
    """
    if subset_fraction != 1 and name in ("official", "small", "files"):
        raise CxrError(f"the {name} split uses all patients; subset_fraction is for random, stratified and folds")
    if by not in ("patient", "image") or (by == "image" and name != "stratified"):
        raise CxrError(f"a {name} split by {by} does not exist; split by patient, or by image with stratified")
    if name == "official":
        rows = _split_official(records, seed, _check_fractions(fractions))
    elif name in ("random", "stratified", "folds"):
        subset = _sample_patients(records, seed, subset_fraction)
        by_split = _check_fractions(fractions)
        if name == "random":
            rows = _split_patients(records, subset, seed, by_split)
        elif name == "stratified":
            rows = _split_stratified(records, subset, [seed], by_split, by)
        else:
            rows = _split_folds(records, subset, seed, by_split, folds, fold)
    elif name == "small":
        rows = _split_by_size(records, seed, sizes)
    elif name == "files":
        rows = _split_from_files(records, files)
    else:
        raise CxrError(f"unknown split {name!r}; choose one of {', '.join(STRATEGIES)}")
    return _check_split(records, name, rows, by)


def check_leakage(records: Records, split_rows: SplitRows) -> None:
    """Raise a `CxrError` that names the patients who are in two splits, if there are any."""
    if leaks := _find_leaks(records, split_rows):
        raise CxrError(f"patients in two splits ({len(leaks):,}): {list_some(leaks)}; put each patient into one split")


def find_shared_images(records: Records, split_rows: SplitRows) -> list[str]:
    """List images that are in two splits under different ids, as `a (train) = b (test)`."""
    rows = np.concatenate(list(split_rows.values()))
    split = np.concatenate([np.full(len(members), name) for name, members in split_rows.items()])
    has_digest = records.digests[rows] != b""
    rows, split = rows[has_digest], split[has_digest]
    _, first, inverse = np.unique(records.digests[rows], return_index=True, return_inverse=True)
    return [
        f"{records.id[rows[first[inverse[k]]]]} ({split[first[inverse[k]]]}) = {records.id[rows[k]]} ({split[k]})"
        for k in np.flatnonzero(split != split[first[inverse]]).tolist()
    ]


def save_split(data_split: DataSplit, records: Records, path: Path | str) -> None:
    """Write a split as a CSV of id and split, which the "files" strategy reads; its first line has the fingerprint."""
    with atomic_path(Path(path)) as temporary, temporary.open("w", newline="") as file:
        file.write(f"# cxrjax split {data_split.name} of {records.dataset}, fingerprint {data_split.fingerprint}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "split"))
        writer.writerows((id, split) for split, rows in data_split.rows.items() for id in records.id[rows].tolist())


def compute_split_fingerprint(records: Records, split_rows: SplitRows) -> str:
    """Return the sha256 of the ids with their splits, independent of their order."""
    lines = sorted(f"{id}\t{split}\n" for split, rows in split_rows.items() for id in records.id[rows].tolist())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _find_leaks(records: Records, split_rows: SplitRows) -> list[str]:
    """List the patients who are in two splits, with the names of these splits."""
    split_of: dict[str, str] = {}
    leaks: dict[str, str] = {}
    for split, rows in split_rows.items():
        for patient in np.unique(records.patient[rows]).tolist():
            if split_of.setdefault(patient, split) != split:
                leaks[patient] = f"{patient} ({split_of[patient]} and {split})"
    return list(leaks.values())


def _check_split(records: Records, name: str, split_rows: SplitRows, by: str) -> DataSplit:
    for split, rows in split_rows.items():
        if len(rows) == 0:
            raise CxrError(f"the {name} split leaves no image for {split}; {len(records):,} images are prepared")
    if by == "patient":
        check_leakage(records, split_rows)
    elif leaks := _find_leaks(records, split_rows):
        log(
            f"leakage: {len(leaks):,} of {len(np.unique(records.patient)):,} patients are in two splits because images "
            "were drawn one by one, so scores are optimistic; set split.by=patient to avoid it",
            style="yellow",
        )
    if shared := find_shared_images(records, split_rows):
        log(
            f"{len(shared):,} images are in two splits of the {name} split under different ids: {list_some(shared)}; "
            "use a random strategy, or leave one of each pair out of split.files"
        )
    split_rows = {split: np.sort(rows).astype(np.int32) for split, rows in split_rows.items()}
    return DataSplit(name, split_rows, compute_split_fingerprint(records, split_rows))


def _split_official(records: Records, seed: int, fractions: Mapping[str, float]) -> SplitRows:
    unknown = np.flatnonzero(~np.isin(records.official, OFFICIAL_SPLITS))
    if len(unknown):
        raise CxrError(
            f"{len(unknown):,} images of {records.dataset} are in no official split, such as "
            f"{records.id[unknown[0]]}; use split.name=random or split.name=files"
        )
    train_val = np.flatnonzero(records.official == "train_val")
    drawn = _split_patients(records, train_val, seed, {**fractions, "test": 0})
    given = {split: np.flatnonzero(records.official == split) for split in SPLITS}
    merged = {split: np.concatenate([rows, drawn.get(split, rows[:0])]) for split, rows in given.items()}
    return {split: rows for split, rows in merged.items() if len(rows) or split == "test" or split in drawn}


def _sample_patients(records: Records, seed: int, fraction: float) -> np.ndarray:
    """Return the rows of a random fraction of the patients; its draw is independent of that of the splits."""
    if not 0 < fraction <= 1:
        raise CxrError(f"the split's subset_fraction is {fraction}; give a number above 0 and up to 1")
    patients, owner = np.unique(records.patient_groups, return_inverse=True)
    rank = np.random.default_rng([seed, 1]).permutation(len(patients))
    return np.flatnonzero(rank[owner] < round(fraction * len(patients)))


def _check_fractions(fractions: Sequence[float]) -> dict[str, float]:
    if len(fractions) != 3 or min(fractions) < 0 or not np.isclose(sum(fractions), 1):
        raise CxrError(f"split fractions {tuple(fractions)} must be three non-negative numbers that sum to 1")
    return dict(zip(SPLITS, fractions, strict=True))


def _split_patients(records: Records, rows: np.ndarray, seed: int, fractions: Mapping[str, float]) -> SplitRows:
    """Give each split its fraction of the patients of `rows`; a split with fraction 0 is left out."""
    fractions = {split: fraction for split, fraction in fractions.items() if fraction > 0}
    patients, owner = np.unique(records.patient_groups[rows], return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(patients))
    ends = np.round(np.cumsum(list(fractions.values())) / sum(fractions.values()) * len(patients)).astype(int)
    assigned = np.searchsorted(ends, rank, side="right")
    return {split: rows[assigned[owner] == k] for k, split in enumerate(fractions)}


def _split_stratified(
    records: Records, rows: np.ndarray, seed: Sequence[int], fractions: Mapping[str, float], by: str = "patient"
) -> dict[str, np.ndarray]:
    """Give each split its fraction of the images and of every finding; a split with fraction 0 is left out."""
    fractions = {split: fraction for split, fraction in fractions.items() if fraction > 0}
    patients, owner = np.unique(records.patient_groups[rows] if by == "patient" else rows, return_inverse=True)
    positives = np.zeros((len(patients), len(records.findings)), int)
    np.add.at(positives, owner, records.labels[rows] == POSITIVE)
    total = sum(fractions.values())
    assigned = stratify(positives, np.bincount(owner), [fraction / total for fraction in fractions.values()], seed)
    return {split: rows[assigned[owner] == k] for k, split in enumerate(fractions)}


def stratify(
    positives: Int[np.ndarray, "G K"],
    sizes: Int[np.ndarray, " G"],
    fractions: Sequence[float],
    seed: int | Sequence[int],
) -> Int[np.ndarray, " G"]:
    """Assign groups to splits by iterative stratification (Sechidis et al., ECML PKDD 2011, algorithm 1).

    The paper assigns single examples. Here the unit is a group that must stay together (a patient): demand is counted
    in examples, and among the groups with a label those with the most examples of it come first, so that small groups
    even out what large ones leave. A group goes to the split whose demand, with half of the group already assigned, is
    largest relative to its fraction (Webster's method of apportionment). With the absolute demand of the paper, the
    largest split would get all large groups; for equal fractions both rules agree. Ties are broken at random.

    Args:
      positives: number of positive examples of each label in each group.
      sizes: number of examples in each group.
      fractions: of the examples, for each split; positive, sum to 1.
      seed: seed of the ties.

    Returns:
      The split of each group, an index into `fractions`.
    """
    rng = np.random.default_rng(seed)
    fraction = np.asarray(fractions)
    demand = np.full(len(fraction), float(sizes.sum()))  # examples still to be assigned to a split, over its fraction
    label_demand = np.tile(positives.sum(0, dtype=float), (len(fraction), 1))  # the same for each label
    order = rng.permutation(len(sizes))  # breaks ties between groups; `tie` those between splits
    tie = rng.permuted(np.tile(np.arange(len(demand)), (len(sizes), 1)), axis=1)
    assigned = np.full(len(sizes), -1)

    def assign(group: int, wanted: np.ndarray, amount: int) -> None:
        half = (demand - sizes[group] / 2 / fraction, wanted - amount / 2 / fraction)
        split = np.lexsort((tie[group], *half))[-1]
        assigned[group] = split
        demand[split] -= sizes[group] / fraction[split]
        label_demand[split] -= positives[group] / fraction[split]

    while (remaining := positives[assigned < 0].sum(0)).any():
        label = int(np.argmin(np.where(remaining > 0, remaining, np.inf)))
        members = order[(assigned[order] < 0) & (positives[order, label] > 0)]
        for group in members[np.argsort(-positives[members, label], kind="stable")]:
            assign(group, label_demand[:, label], int(positives[group, label]))
    unlabelled = order[assigned[order] < 0]
    for group in unlabelled[np.argsort(-sizes[unlabelled], kind="stable")]:
        assign(group, demand, int(sizes[group]))
    return assigned


def _split_folds(
    records: Records, rows: np.ndarray, seed: int, fractions: Mapping[str, float], folds: int, fold: int
) -> dict[str, np.ndarray]:
    if folds < 2 or not 0 <= fold < folds:
        raise CxrError(f"there is no fold {fold} of {folds}; use at least 2 folds and count them from 0")
    test = _split_stratified(records, rows, [seed], {str(k): 1 / folds for k in range(folds)})[str(fold)]
    rest = np.setdiff1d(rows, test)
    return {**_split_stratified(records, rest, [seed, fold], {**fractions, "test": 0}), "test": test}


def _split_by_size(records: Records, seed: int, sizes: Mapping[str, int] | Sequence[int] | None) -> SplitRows:
    """Fill one split after the other with the images of patients in random order, up to its exact size."""
    if sizes is None:
        raise CxrError("the small split needs split.sizes: the number of images for train, validation and test")
    requested = dict(sizes) if isinstance(sizes, Mapping) else dict(zip(SPLITS, sizes, strict=False))
    requested = {_parse_split(split, "sizes"): count for split, count in requested.items() if count > 0}
    patients, owner = np.unique(records.patient_groups, return_inverse=True)
    order = np.argsort(np.random.default_rng(seed).permutation(len(patients))[owner], kind="stable")
    split_rows, start = {}, 0
    for split, count in requested.items():
        rows = split_rows[split] = order[start : start + count]
        if len(rows) < count:
            raise CxrError(f"the small split needs {sum(requested.values()):,} images, but only {len(order):,} exist")
        start += count + int(np.argmin(np.append(owner[order[start + count :]] == owner[rows[-1]], False)))
    return split_rows  # images of a patient that a split cut off are in no split


def _split_from_files(records: Records, files: SplitFiles | None) -> SplitRows:
    if files is None:
        raise CxrError("the files split needs split.files: a CSV of id and split, or a list of ids for each split")
    if isinstance(files, str | Path):
        split_rows = _find_rows(records, _read_split_csv(Path(files)), files, require_all=True)
        saved = _FINGERPRINT.search(read_text(Path(files)).splitlines()[0])
        if saved and saved[1] != compute_split_fingerprint(records, split_rows):
            raise CxrError(f"{files} was edited after it was saved; delete its first line to use it anyway")
        return split_rows
    lists = files if isinstance(files, Mapping) else dict(zip(SPLITS, files, strict=False))
    pairs = ((id, _parse_split(split, "files")) for split, path in lists.items() for id in _read_ids(Path(path)))
    return _find_rows(records, pairs, ", ".join(str(path) for path in lists.values()), require_all=False)


def _find_rows(
    records: Records, pairs: Iterable[tuple[str, str]], source: object, *, require_all: bool
) -> dict[str, np.ndarray]:
    """Look the ids up in the table; without `require_all`, at least one id of each split must be there."""
    row_of = {id: row for row, id in enumerate(records.id.tolist())}
    split_of: dict[str, str] = {}
    for id, split in pairs:
        if split_of.setdefault(id, split) != split:
            raise CxrError(f"{source}: image {id} is in {split_of[id]} and in {split}; list it in one split")
        if require_all and id not in row_of:
            raise CxrError(f"{source}: image {id} is not among the {len(records):,} prepared records")
    rows = {split: [row_of[id] for id, s in split_of.items() if s == split and id in row_of] for split in SPLITS}
    for split in set(split_of.values()):
        if not rows[split]:
            raise CxrError(f"{source}: none of the images listed for {split} is among the {len(records):,} prepared")
    return {split: np.array(members, np.int32) for split, members in rows.items() if members}


def _parse_split(name: str, where: object) -> str:
    if name not in SPLIT_ALIASES:
        raise CxrError(f"{where}: unknown split {name!r}; use {', '.join(SPLITS)}")
    return SPLIT_ALIASES[name]


def _read_split_csv(path: Path) -> Iterator[tuple[str, str]]:
    lines = read_text(path).splitlines()
    comments = [line for line in lines if line.startswith("#")]
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    if not {"id", "split"} <= set(reader.fieldnames or ()):
        raise CxrError(f"{path} needs the columns id and split; it has {', '.join(reader.fieldnames or ()) or 'none'}")
    for row in reader:
        yield row["id"], _parse_split(row["split"], f"{path}, line {reader.line_num + len(comments)}")


def _read_ids(path: Path) -> Iterator[str]:
    """Yield the first field of each line, so that lists with labels after the file name can be read too."""
    return (fields[0] for fields in map(str.split, read_text(path).splitlines()) if fields)
