"""A user's own radiographs: what every builder of them reads, and what it must say aloud."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cxrjax.data.records import Record
from cxrjax.data.splits import SPLIT_ALIASES
from cxrjax.errors import CxrError
from cxrjax.findings import POSITIVE
from tfds_builders.builder import check_parts, sizes
from tfds_builders.sources import FromFiles, some

SIZES = sizes(None, 2048, 1024, 512, 256, 224, 128, 64, 32)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SEX = {"": "", "m": "M", "f": "F", "male": "M", "female": "F", "unknown": "", "u": ""}


class Own(FromFiles, skip_registration=True):
    """Base of the builders of a user's own radiographs.

    A patient in two official parts is reported; the official split is then refused, every other split keeps patients
    together. A record without a patient is a patient of its own.
    """

    BUILDER_CONFIGS = SIZES
    ENCODING = "jpeg"
    LEAKS = True
    EXCLUSIVE = False

    def __init__(self, *, name: str | None = None, **kwargs: Any):
        """Makes the builder.

        Args:
          name: of the prepared data set; None takes the builder's.
          **kwargs: source, allow_missing, workers, data_dir, config, version.
        """
        if name is not None:
            if not _NAME.fullmatch(name):
                raise CxrError(f"data set name {name!r}: give small letters, digits and _, a letter first")
            self.name = name  # pyright: ignore[reportAttributeAccessIssue] - TFDS reads it of the builder
        super().__init__(**kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """What the content depends on."""
        return {**super().options, "exclusive": self.EXCLUSIVE}

    def notes(self, records: Sequence[Record]) -> list[str]:
        """What a user should know of these records before believing a score on them."""
        found = []
        alone = sum(record.patient == record.id for record in records)
        if alone:
            found.append(
                f"{alone:,} images have no known patient, each counts as a patient of its own: whether one patient is "
                "in two parts (leakage) cannot be checked for them"
            )
        try:
            check_parts(records, self.FINDINGS)
        except CxrError as error:
            found.append(f"the given parts leak, split.name=official will be refused: {error}")
        if self.EXCLUSIVE:
            found += _confounded(records, self.FINDINGS)
        return found


def _confounded(records: Sequence[Record], classes: Sequence[str]) -> list[str]:
    """Classes that their source gives away: all of theirs, and no image of another class, comes from it."""
    sources: dict[str, set[str]] = defaultdict(set)
    for record in records:
        sources[classes[record.labels.index(POSITIVE)]].add(record.source)
    notes = []
    for name, own in sorted(sources.items()):
        others = set[str]().union(*(sources[other] for other in sources if other != name))
        if others and not own & others:
            notes.append(
                f"class and source are confounded: every image of {name} comes from {some(sorted(own))}, and no image "
                "of another class does; a network can tell the source instead of the disease"
            )
    return notes


def details(record: Record, row: Mapping[str, str], where: str) -> Record:
    """The record with what a row says in columns named study, view, age, sex, source (or url) and official (or part).

    Raises:
      CxrError: an age, a sex or a part cannot be understood; the message says where.
    """
    said = {name.strip().lower(): text.strip() for name, text in row.items() if name and text and text.strip()}
    changes: dict[str, Any] = {name: said[name] for name in ("study", "view") if name in said}
    if "age" in said:
        try:
            changes["age"] = float(said["age"])
        except ValueError:
            raise CxrError(f"{where}: age {said['age']!r} is not a number of years") from None
    if "sex" in said:
        if said["sex"].lower() not in _SEX:
            raise CxrError(f"{where}: sex {said['sex']!r} is not M, F or empty")
        changes["sex"] = _SEX[said["sex"].lower()]
    if source := said.get("source", said.get("url")):
        changes["source"] = source
    if part := said.get("official", said.get("part")):
        if part.lower() not in SPLIT_ALIASES:
            raise CxrError(f"{where}: unknown part {part!r}; parts are train, validation and test")
        changes["official"] = SPLIT_ALIASES[part.lower()]
    return replace(record, **changes)


def blank(id: str, patient: str, source: str, labels: tuple[int, ...]) -> Record:
    """A record of which no more is known: the image is its own study, and without a patient its own patient."""
    return Record(
        id=id,
        patient=patient or id,
        study=id,
        view="",
        age=math.nan,
        sex="",
        source=source,
        labels=labels,
    )


def with_drawn_validation(records: list[Record]) -> list[Record]:
    """Without a validation part, one is to be drawn of the training part."""
    if any(record.official == "validation" for record in records):
        return records
    return [replace(record, official="train_val") if record.official == "train" else record for record in records]


def folder_name(folder: Path) -> str:
    """What a collection is called of which only the folder is known."""
    return folder.resolve().name
