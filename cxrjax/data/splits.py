"""Splits into training, validation and test: by patient, always checked for leakage, saved as `id,part`."""

import csv
import gzip
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Int, Int32

from cxrjax.console import stderr
from cxrjax.data.records import Records
from cxrjax.errors import CxrError
from cxrjax.findings import POSITIVE

Rows = Int32[np.ndarray, " n"]
Parts = Mapping[str, Rows]

PARTS = ("train", "validation", "test")
NAMES = ("official", "random", "stratified", "folds", "small", "files")
OFFICIAL = (*PARTS, "train_val")
"""What a record's official part may be; of train_val, validation is drawn."""
SPELLINGS = MappingProxyType({
    "train": "train", "training": "train", "validation": "validation", "validate": "validation", "valid": "validation",
    "val": "validation", "test": "test", "testing": "test",
})  # fmt: skip
_FINGERPRINT = re.compile(r"^# cxrjax split .* fingerprint ([0-9a-f]{64})$")


@dataclass(frozen=True)
class Split:
    """Which record is in which part.

    Attributes:
      name: how it was made.
      parts: rows of the records' table per part, ascending.
      fingerprint: equal where the same ids are in the same parts.
    """

    name: str
    parts: Parts
    fingerprint: str


def make_split(
    records: Records,
    name: str,
    *,
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    files: Path | str | Mapping[str, Path | str] | Sequence[Path | str] | None = None,
    sizes: Mapping[str, int] | Sequence[int] | None = None,
    folds: int = 5,
    fold: int = 0,
    share: float = 1.0,
    by: str = "patient",
) -> Split:
    """Split the records; no patient is ever in two parts.

    Nor is an image under another name, where parts are drawn: patients who share one count as one (`Records.people`).
    Of the parts that a data set or a file gives, such images are named on standard error.

    Args:
      records: what to split.
      name: "official": the data set's own parts; where it has no validation part, fractions[1] / (fractions[0] +
        fractions[1]) of its training patients are drawn for it. "random": `fractions` of the patients. "stratified":
        `fractions` of the images and of each finding's positive ones, as nearly as whole patients allow. "folds":
        number `fold` of `folds` stratified parts is for testing; the rest is divided, stratified too, into training and
        validation as `fractions` are to each other. "small": `sizes` images per part, of patients drawn at random.
        "files": as `files` say.
      seed: of whatever is drawn.
      fractions: of the patients, for training, validation and test; they add up to 1.
      files: one CSV with the columns id and part, of exactly these records or some of them; or a list of names per
        part (a mapping, or three files in the order train, validation, test), which may name images that are not
        prepared, as published lists do of a subset.
      sizes: images per part.
      folds: how many there are.
      fold: which of them is for testing, from 0.
      share: of the patients, drawn first; the others are in no part. For "random", "stratified" and "folds".
      by: "patient", or for "stratified" also "image": images are drawn one by one, as some papers do, and a patient may
        be in several parts. Scores of such a split are too good; how many patients leak is said on standard error.

    Raises:
      CxrError: a patient would be in two parts (it is named), a part would be empty, a file or row cannot be used, a
        number is out of its range.
    """
    if share != 1 and name in ("official", "small", "files"):
        raise CxrError(f"the {name} split takes all patients; a share of them is for random, stratified and folds")
    if by not in ("patient", "image") or (by == "image" and name != "stratified"):
        raise CxrError(f"a {name} split by {by} does not exist: by patient, or for the stratified split also by image")
    if name == "official":
        parts = _official(records, seed, fractions)
    elif name == "random":
        rows = _some_patients(records, seed, share)
        parts = _by_patient(records, rows, seed, dict(zip(PARTS, _fractions(fractions), strict=True)))
    elif name == "stratified":
        rows = _some_patients(records, seed, share)
        parts = _stratified(records, rows, [seed], dict(zip(PARTS, _fractions(fractions), strict=True)), by)
    elif name == "folds":
        parts = _fold(records, _some_patients(records, seed, share), seed, fractions, folds, fold)
    elif name == "small":
        parts = _small(records, seed, sizes)
    elif name == "files":
        parts = _files(records, files)
    else:
        raise CxrError(f"unknown split {name!r}; choose one of {', '.join(NAMES)}")
    return _checked(records, name, parts, by)


def check_leakage(records: Records, parts: Parts) -> None:
    """Check that no patient is in two parts.

    Raises:
      CxrError: names the patients that are.
    """
    if names := _leaks(records, parts):
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        raise CxrError(f"patients in two parts ({len(names):,}): {', '.join(names[:5])}{more}; keep each in one part")


def _leaks(records: Records, parts: Parts) -> list[str]:
    """The patients who are in two parts, with these."""
    owner: dict[str, str] = {}
    leaks: dict[str, str] = {}
    for part, rows in parts.items():
        for patient in np.unique(records.patient[rows]).tolist():
            if owner.setdefault(patient, part) != part:
                leaks[patient] = f"{patient} ({owner[patient]} and {part})"
    return list(leaks.values())


def shared_images(records: Records, parts: Parts) -> list[str]:
    """Images that lie in two parts under different names, as `a (train) = b (test)`."""
    rows = np.concatenate(list(parts.values()))
    part = np.concatenate([np.full(len(of), name) for name, of in parts.items()])
    known = records.digests[rows] != b""
    rows, part = rows[known], part[known]
    _, first, which = np.unique(records.digests[rows], return_index=True, return_inverse=True)
    return [
        f"{records.id[rows[first[which[k]]]]} ({part[first[which[k]]]}) = {records.id[rows[k]]} ({part[k]})"
        for k in np.flatnonzero(part != part[first[which]]).tolist()
    ]


def save(split: Split, records: Records, path: Path | str) -> None:
    """Write a split as a CSV of id and part that "files" reads again; its first line holds the fingerprint."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", newline="") as file:
            file.write(f"# cxrjax split {split.name} of {records.dataset}, fingerprint {split.fingerprint}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("id", "part"))
            writer.writerows((id, part) for part, rows in split.parts.items() for id in records.id[rows].tolist())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _checked(records: Records, name: str, parts: Parts, by: str) -> Split:
    for part, rows in parts.items():
        if len(rows) == 0:
            raise CxrError(f"the {name} split leaves no image for {part}; {len(records):,} images are prepared")
    if by == "patient":
        check_leakage(records, parts)
    elif leaks := _leaks(records, parts):
        stderr.print(
            f"leakage: {len(leaks):,} of {len(np.unique(records.patient)):,} patients are in two parts of this split "
            "by image, so that its scores are too good; split.by=patient has none",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    if shared := shared_images(records, parts):
        more = f" and {len(shared) - 5:,} more" if len(shared) > 5 else ""
        stderr.print(
            f"{len(shared):,} images are in two parts of the {name} split under two names: "
            f"{', '.join(shared[:5])}{more}; to keep each in one part, draw the parts, or name one of each in no "
            "part of split.files",
            soft_wrap=True,
        )  # fmt: skip
    parts = {part: np.sort(rows).astype(np.int32) for part, rows in parts.items()}
    return Split(name, parts, fingerprint_of(records, parts))


def fingerprint_of(records: Records, parts: Parts) -> str:
    """Equal where the same ids are in the same parts."""
    lines = sorted(f"{id}\t{part}\n" for part, rows in parts.items() for id in records.id[rows].tolist())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _official(records: Records, seed: int, fractions: Sequence[float]) -> Parts:
    train, validation, _ = _fractions(fractions)
    unknown = np.flatnonzero(~np.isin(records.official, OFFICIAL))
    if len(unknown):
        raise CxrError(
            f"{len(unknown):,} images of {records.dataset} are in no official part, the first is "
            f"{records.id[unknown[0]]}; use the random split, or files"
        )
    drawn = np.flatnonzero(records.official == "train_val")
    parts = _by_patient(records, drawn, seed, {"train": train, "validation": validation})
    given = {part: np.flatnonzero(records.official == part) for part in PARTS}
    whole = {part: np.concatenate([rows, parts.get(part, rows[:0])]) for part, rows in given.items()}
    return {part: rows for part, rows in whole.items() if len(rows) or part == "test" or part in parts}


def _some_patients(records: Records, seed: int, share: float) -> np.ndarray:
    """All images of a share of the patients; the draw has a seed of its own, beside that of the parts."""
    if not 0 < share <= 1:
        raise CxrError(f"the split's share of the patients is {share}; give a number above 0 and up to 1")
    patients, owner = np.unique(records.people, return_inverse=True)
    rank = np.random.default_rng([seed, 1]).permutation(len(patients))
    return np.flatnonzero(rank[owner] < round(share * len(patients)))


def _fold(
    records: Records, rows: np.ndarray, seed: int, fractions: Sequence[float], folds: int, fold: int
) -> dict[str, np.ndarray]:
    if folds < 2 or not 0 <= fold < folds:
        raise CxrError(f"there is no fold {fold} of {folds}; give 2 folds or more, and one of them counted from 0")
    train, validation, _ = _fractions(fractions)
    test = _stratified(records, rows, [seed], {str(k): 1 / folds for k in range(folds)})[str(fold)]
    rest = np.setdiff1d(rows, test)
    return {**_stratified(records, rest, [seed, fold], {"train": train, "validation": validation}), "test": test}


def _stratified(
    records: Records, rows: np.ndarray, seed: Sequence[int], shares: Mapping[str, float], by: str = "patient"
) -> dict[str, np.ndarray]:
    """Give each part its share of the images and of every finding; a part without a share is left out."""
    shares = {part: share for part, share in shares.items() if share > 0}
    patients, owner = np.unique(records.people[rows] if by == "patient" else rows, return_inverse=True)
    positives = np.zeros((len(patients), len(records.findings)), int)
    np.add.at(positives, owner, records.labels[rows] == POSITIVE)
    total = sum(shares.values())
    part_of = stratify(positives, np.bincount(owner), [share / total for share in shares.values()], seed)
    return {part: rows[part_of[owner] == k] for k, part in enumerate(shares)}


def _fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    if len(fractions) != 3 or min(fractions) < 0 or not np.isclose(sum(fractions), 1):
        raise CxrError(f"split fractions {tuple(fractions)} must be three, not negative, and add up to 1")
    train, validation, test = fractions
    return train, validation, test


def _by_patient(records: Records, rows: np.ndarray, seed: int, shares: Mapping[str, float]) -> Parts:
    """Give each part its share of the patients of `rows`; a part without a share is left out."""
    shares = {part: share for part, share in shares.items() if share > 0}
    patients, owner = np.unique(records.people[rows], return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(patients))
    ends = np.round(np.cumsum(list(shares.values())) / sum(shares.values()) * len(patients)).astype(int)
    part_of = np.searchsorted(ends, rank, side="right")
    return {part: rows[part_of[owner] == k] for k, part in enumerate(shares)}


def _small(records: Records, seed: int, sizes: Mapping[str, int] | Sequence[int] | None) -> Parts:
    """Fill one part after the other with the images of patients in random order, up to its size exactly."""
    if sizes is None:
        raise CxrError("the small split needs sizes: images for train, validation and test")
    wanted = dict(sizes) if isinstance(sizes, Mapping) else dict(zip(PARTS, sizes, strict=False))
    wanted = {_part(part, "sizes"): count for part, count in wanted.items() if count > 0}
    patients, owner = np.unique(records.people, return_inverse=True)
    order = np.argsort(np.random.default_rng(seed).permutation(len(patients))[owner], kind="stable")
    parts, start = {}, 0
    for part, count in wanted.items():
        parts[part] = order[start : start + count]
        if len(parts[part]) < count:
            raise CxrError(f"the small split asks for {sum(wanted.values()):,} images and {len(order):,} are there")
        last = owner[parts[part][-1]]  # this patient's other images are used nowhere
        start += count + int(np.argmin(np.append(owner[order[start + count :]] == last, False)))
    return parts


def _files(records: Records, files: Path | str | Mapping[str, Path | str] | Sequence[Path | str] | None) -> Parts:
    if files is None:
        raise CxrError("the files split needs files: a CSV of id and part, or a list of images per part")
    if isinstance(files, str | Path):
        parts = _locate(records, _read_csv(Path(files)), files, every=True)
        mark = _FINGERPRINT.search(_lines(Path(files))[0])
        if mark and mark[1] != fingerprint_of(records, parts):
            raise CxrError(f"{files} was changed since it was saved; delete its first line to use it as it is")
        return parts
    lists = files if isinstance(files, Mapping) else dict(zip(PARTS, files, strict=False))
    named = ((id, _part(part, "files")) for part, path in lists.items() for id in _read_list(Path(path)))
    return _locate(records, named, ", ".join(str(path) for path in lists.values()), every=False)


def _locate(
    records: Records, named: Iterator[tuple[str, str]], source: object, *, every: bool
) -> dict[str, np.ndarray]:
    """Find the named ids in the table; `every` one must be there, or else at least some of each part."""
    row_of = {id: row for row, id in enumerate(records.id.tolist())}
    part_of: dict[str, str] = {}
    for id, part in named:
        if part_of.setdefault(id, part) != part:
            raise CxrError(f"{source}: image {id} is in {part_of[id]} and in {part}; keep it in one part")
        if every and id not in row_of:
            raise CxrError(f"{source}: image {id} is not among the {len(records):,} prepared records")
    found = {part: [row_of[id] for id, p in part_of.items() if p == part and id in row_of] for part in PARTS}
    for part in set(part_of.values()):
        if not found[part]:
            raise CxrError(f"{source}: none of the images listed for {part} is among the {len(records):,} prepared")
    return {part: np.array(rows, np.int32) for part, rows in found.items() if rows}


def _part(name: str, where: object) -> str:
    if name not in SPELLINGS:
        raise CxrError(f"{where}: unknown part {name!r}; parts are {', '.join(PARTS)}")
    return SPELLINGS[name]


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CxrError(f"{path} cannot be read as a list of images: {error}") from error


def _read_csv(path: Path) -> Iterator[tuple[str, str]]:
    lines = _lines(path)
    comments = [line for line in lines if line.startswith("#")]
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    if not {"id", "part"} <= set(reader.fieldnames or ()):
        raise CxrError(f"{path} needs the columns id and part; it has {', '.join(reader.fieldnames or ()) or 'none'}")
    for row in reader:
        yield row["id"], _part(row["part"], f"{path}, line {reader.line_num + len(comments)}")


def _read_list(path: Path) -> Iterator[str]:
    """The first word of each line, as lists of names and lists with labels after the name have it."""
    return (words[0] for words in map(str.split, _lines(path)) if words)


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
