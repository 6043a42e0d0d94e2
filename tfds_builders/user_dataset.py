"""Base of the builders of a user's own radiographs: metadata, and notes on leakage and confounding."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cxrjax.data.records import Record
from cxrjax.data.splits import SPLIT_ALIASES
from cxrjax.errors import CxrError, list_some
from cxrjax.findings import POSITIVE
from tfds_builders.builder import check_official_splits, size_configs
from tfds_builders.sources import FileBuilder

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SEX = {"": "", "m": "M", "f": "F", "male": "M", "female": "F", "unknown": "", "u": ""}


class UserDatasetBuilder(FileBuilder, skip_registration=True):
    """Base class of the builders of a user's own radiographs.

    A patient in two official splits is reported, and the official split is refused when it is used; all other splits
    keep patients together. A record without a patient id counts as its own patient.
    """

    BUILDER_CONFIGS = size_configs(None, 2048, 1024, 512, 256, 224, 128, 64, 32)
    ENCODING = "jpeg"
    ALLOW_LEAKAGE = True
    EXCLUSIVE = False

    def __init__(self, *, name: str | None = None, **kwargs: Any):
        """Make the builder.

        Args:
          name: name of the prepared data set; None uses the builder's.
          **kwargs: source, allow_missing, workers, data_dir, config, version.
        """
        if name is not None:
            if not _NAME.fullmatch(name):
                raise CxrError(f"data set name {name!r}: use lower-case letters, digits and _, starting with a letter")
            self.name = name  # pyright: ignore[reportAttributeAccessIssue] - TFDS reads it from the builder
        super().__init__(**kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """Options that determine the content."""
        return {**super().options, "exclusive": self.EXCLUSIVE}

    def collect_notes(self, records: Sequence[Record]) -> list[str]:
        """Describe what makes scores on these records unreliable, one line each."""
        notes = []
        unknown = sum(record.patient == record.id for record in records)
        if unknown:
            notes.append(
                f"{unknown:,} images have no patient id, so each counts as its own patient, and leakage (a patient in "
                "two splits) cannot be detected for them"
            )
        try:
            check_official_splits(records, self.FINDINGS)
        except CxrError as error:
            notes.append(f"the given splits leak, so split.name=official will be refused: {error}")
        if self.EXCLUSIVE:
            notes += _find_confounding(records, self.FINDINGS)
        return notes


def _find_confounding(records: Sequence[Record], classes: Sequence[str]) -> list[str]:
    """Describe classes that share no source with any other class."""
    sources: dict[str, set[str]] = defaultdict(set)
    for record in records:
        sources[classes[record.labels.index(POSITIVE)]].add(record.source)
    notes = []
    for name, class_sources in sorted(sources.items()):
        others = set[str]().union(*(sources[other] for other in sources if other != name))
        if others and not class_sources & others:
            origin = list_some(sorted(class_sources))
            notes.append(
                f"class and source are confounded: every image of {name} comes from {origin}, and no image of "
                "another class does; a network can learn the source instead of the disease"
            )
    return notes


def add_metadata(record: Record, row: Mapping[str, str], where: str) -> Record:
    """Add the columns study, view, age, sex, source (or url) and official (or split) of a table's row to a record.

    Raises:
      CxrError: an age, a sex or a split is invalid; the message starts with `where`.
    """
    values = {name.strip().lower(): text.strip() for name, text in row.items() if name and text and text.strip()}
    changes: dict[str, Any] = {name: values[name] for name in ("study", "view") if name in values}
    if "age" in values:
        try:
            changes["age"] = float(values["age"])
        except ValueError:
            raise CxrError(f"{where}: age {values['age']!r} is not a number of years") from None
    if "sex" in values:
        if values["sex"].lower() not in _SEX:
            raise CxrError(f"{where}: sex {values['sex']!r} is not M, F or empty")
        changes["sex"] = _SEX[values["sex"].lower()]
    if source := values.get("source", values.get("url")):
        changes["source"] = source
    if split := values.get("official", values.get("split")):
        if split.lower() not in SPLIT_ALIASES:
            raise CxrError(f"{where}: unknown split {split!r}; use train, validation or test")
        changes["official"] = SPLIT_ALIASES[split.lower()]
    return replace(record, **changes)


def make_record(id: str, patient: str, source: str, labels: tuple[int, ...]) -> Record:
    """Make a record without metadata: its study is the image, and so is its patient if `patient` is empty."""
    return Record(id=id, patient=patient or id, study=id, view="", age=math.nan, sex="", source=source, labels=labels)


def with_drawn_validation(records: list[Record]) -> list[Record]:
    """Mark the training records for drawing a validation split if there is none."""
    if any(record.official == "validation" for record in records):
        return records
    return [replace(record, official="train_val") if record.official == "train" else record for record in records]


def folder_name(folder: Path) -> str:
    """Return the name of a folder, the default source of its records."""
    return folder.resolve().name
