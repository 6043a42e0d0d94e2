"""Several prepared data sets as one: one table of records in one vocabulary, images read from where they lie."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32

from cxrjax.console import stderr
from cxrjax.data.records import Box, Records
from cxrjax.data.splits import Parts, Split, fingerprint_of, shared_images
from cxrjax.errors import CxrError
from cxrjax.findings import NO_FINDING, LabelPolicy, name_in, positions, translate

_NAMES = ("id", "patient", "study")
_KEPT = ("view", "sex", "source", "official", "age", "width", "height")


@dataclass(frozen=True)
class Pooled(Records):
    """Data sets one after the other; see `pool`.

    Attributes:
      sources: the data sets.
    """

    sources: tuple[Records, ...] = ()

    @cached_property
    def starts(self) -> Int32[np.ndarray, " S"]:
        """The row of each data set's first record."""
        return np.cumsum([0, *map(len, self.sources[:-1])]).astype(np.int32)

    def origin(self, rows: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """The number of the data set that each row comes from."""
        return (np.searchsorted(self.starts, rows, side="right") - 1).astype(np.int32)

    @cached_property
    def digests(self) -> np.ndarray:  # noqa: D102 - as in Records
        return np.concatenate([source.digests for source in self.sources])

    def boxes(self, row: int) -> list[Box]:
        """As in `Records`, by the names of this vocabulary."""
        source, row = self._at(row)
        named = {name_in(source.findings, finding): finding for finding in self.findings}
        return [dataclasses.replace(box, finding=named.get(box.finding, box.finding)) for box in source.boxes(row)]

    def mask(self, row: int, finding: str, size: int) -> Bool[np.ndarray, "size size"] | None:
        """As in `Records`; None too where the record's data set does not have the finding."""
        positions([finding], self.findings)
        source, row = self._at(row)
        name = name_in(source.findings, finding)
        return None if name is None else source.mask(row, name, size)

    def verify(self, sample: int = 256) -> None:
        """As in `Records`, of each data set."""
        for source in self.sources:
            source.verify(sample)

    def _at(self, row: int) -> tuple[Records, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sources[number], int(row) - int(self.starts[number])

    def _features(self, row: int) -> Any:
        source, row = self._at(row)
        return source._features(row)


def pool(sources: Sequence[Records], findings: Sequence[str]) -> Pooled:
    """Put data sets together, with labels in one vocabulary (`findings.translate`).

    Ids, patients and studies begin with their data set's name and a stroke, such as `chestxray14/00000013_005.png`.

    Args:
      sources: data sets of different names.
      findings: the common vocabulary; each must be a finding of one of the data sets, by this or its other name.

    Raises:
      CxrError: a finding that no data set has, or a data set twice.
    """
    names = [source.dataset for source in sources]
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        raise CxrError(f"data set {again} is named twice: what is mixed has different names")
    for finding in findings:
        if finding != NO_FINDING and all(name_in(source.findings, finding) is None for source in sources):
            positions([finding], list(dict.fromkeys(name for source in sources for name in source.findings)))
    about = ["pooled", [source.fingerprint for source in sources], list(findings)]
    folders = [source.directory for source in sources if source.directory is not None]
    sizes = list(dict.fromkeys(source.config for source in sources))
    return Pooled(
        Path(os.path.commonpath(folders)) if folders else None,
        dataset="+".join(names),
        config="+".join(sizes),
        findings=tuple(findings),
        fingerprint=hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        table=pa.concat_tables([_table(source, findings) for source in sources]),
        options={"exclusive": all(s.exclusive and set(s.findings) == set(findings) for s in sources)},
        sources=tuple(sources),
    )


def pool_splits(records: Pooled, splits: Sequence[Split]) -> Split:
    """Each part is that part of every data set; the same image in different parts of two data sets is named.

    Args:
      records: the data sets, pooled.
      splits: of each.
    """
    names = dict.fromkeys(part for split in splits for part in split.parts)
    parts = {
        name: np.concatenate(
            [s.parts[name] + start for s, start in zip(splits, records.starts, strict=True) if name in s.parts]
        ).astype(np.int32)
        for name in names
    }
    _say_shared(records, parts)
    kinds = dict.fromkeys(split.name for split in splits)
    return Split("+".join(kinds), parts, fingerprint_of(records, parts))


def own_policy(policy: LabelPolicy, records: Records, findings: Sequence[str]) -> LabelPolicy:
    """The policy for a data set's labels in another vocabulary.

    What is only inferred from its other labels counts where it is certain; for the rest nobody said anything.
    """
    inferred = [name for name in findings if name != NO_FINDING and name_in(records.findings, name) is None]
    exceptions = {name: LabelPolicy(uncertain="ignore", not_mentioned="unknown") for name in inferred}
    return dataclasses.replace(policy, exceptions=exceptions | _renamed(policy.exceptions, findings))


def _renamed(exceptions: Mapping[str, LabelPolicy], findings: Sequence[str]) -> dict[str, LabelPolicy]:
    """Exceptions under the names of this vocabulary."""
    return {name_in(findings, finding) or finding: rule for finding, rule in exceptions.items()}


def _table(source: Records, findings: Sequence[str]) -> pa.Table:
    """A data set's part of the pooled table."""
    columns: dict[str, Any] = {}
    for name in _NAMES:
        column = source.table[name].cast(pa.string())
        columns[name] = pc.binary_join_element_wise(source.dataset, column, "/")  # pyright: ignore
    for name in _KEPT:
        unknown = pa.array(np.zeros(len(source), np.int32))  # sizes, of what was prepared before they were kept
        column = source.table[name] if name in source.table.column_names else unknown
        columns[name] = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    labels = translate(source.labels, source.findings, findings)
    columns |= {f"label_{name}": pa.array(labels[:, k].copy()) for k, name in enumerate(findings)}
    return pa.table(columns)


def _say_shared(records: Pooled, parts: Parts) -> None:
    """Tell of images that two data sets have in different parts; of those of one data set its own split tells."""
    between = [
        text for text in shared_images(records, parts) if len({name.split("/")[0] for name in text.split(" = ")}) > 1
    ]
    if between:
        more = f" and {len(between) - 5:,} more" if len(between) > 5 else ""
        stderr.print(
            f"{len(between):,} images are in different parts of two data sets: {', '.join(between[:5])}{more}; scores "
            "of them are too good: leave one of each out by split.files",
            soft_wrap=True,
        )  # fmt: skip
