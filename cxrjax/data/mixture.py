"""Several prepared data sets as one: one table of records in one vocabulary, images read from where they lie."""

from __future__ import annotations

import ast
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

from cxrjax.config import Config, with_overrides
from cxrjax.console import stderr
from cxrjax.data.records import Box, Records, open_records
from cxrjax.data.splits import DataSplit, SplitRows, compute_split_fingerprint, find_shared_images, make_split
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


def pool_splits(records: Pooled, splits: Sequence[DataSplit]) -> DataSplit:
    """Each part is that part of every data set; the same image in different parts of two data sets is named.

    Args:
      records: the data sets, pooled.
      splits: of each.
    """
    names = dict.fromkeys(part for split in splits for part in split.rows)
    parts = {
        name: np.concatenate(
            [s.rows[name] + start for s, start in zip(splits, records.starts, strict=True) if name in s.rows]
        ).astype(np.int32)
        for name in names
    }
    _say_shared(records, parts)
    kinds = dict.fromkeys(split.name for split in splits)
    return DataSplit("+".join(kinds), parts, compute_split_fingerprint(records, parts))


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


def _say_shared(records: Pooled, parts: SplitRows) -> None:
    """Tell of images that two data sets have in different parts; of those of one data set its own split tells."""
    pairs = find_shared_images(records, parts)
    between = [text for text in pairs if len({name.split("/")[0] for name in text.split(" = ")}) > 1]
    if between:
        more = f" and {len(between) - 5:,} more" if len(between) > 5 else ""
        stderr.print(
            f"{len(between):,} images are in different parts of two data sets: {', '.join(between[:5])}{more}; scores "
            "of them are too good: leave one of each out by split.files",
            soft_wrap=True,
        )  # fmt: skip


_OWN = ("data.stored", "data.views", "data.uncertain", "data.interval", "data.not_mentioned", "data.exceptions")
"""Config keys beside split.* that each data set of a mixture may set for itself."""
_RULES = ("uncertain", "not_mentioned", "interval")


@dataclass(frozen=True)
class Source:
    """One data set of a run.

    Attributes:
      config: the run's, as it is for this data set.
      records: all of them.
      split: of them, by patient.
    """

    config: Config
    records: Records
    split: DataSplit

    @classmethod
    def open(cls, config: Config) -> Source:
        """Open a data set without touching its images, and split it.

        Raises:
          CxrError: it is not prepared, its images are smaller than wanted, it cannot be split so.
        """
        data, split = config.data, config.split
        records = open_records(Path(data.dir), data.dataset, data.stored)
        if data.stored.isdigit() and data.size > int(data.stored):
            raise CxrError(
                f"config key data.size = {data.size} is more than the {data.stored} px that are stored: "
                "enlarged images hold no more detail; prepare a larger size and set data.stored"
            )
        made = make_split(
            records,
            split.name,
            seed=split.seed,
            fractions=split.fractions,
            files=_files(split.files),
            sizes=split.sizes or None,
            folds=split.folds,
            fold=split.fold,
            subset_fraction=split.share,
            by=split.by,
        )
        return cls(config, records, made)

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """Rows of each part of the split that show one of the wanted views.

        Raises:
          CxrError: no image has such a view.
        """
        wanted, views = self.config.data.views, {str(view) for view in self.records.view}
        unknown = sorted(set(wanted) - views)
        if unknown:
            raise CxrError(
                f"config key data.views: no image of {self.records.dataset} has view {unknown[0]}; there are "
                f"{', '.join(sorted(views))}"
            )
        parts = self.split.rows
        return {
            name: rows[np.isin(self.records.view[rows], wanted)] if wanted else rows for name, rows in parts.items()
        }

    @property
    def policy(self) -> LabelPolicy:
        """What this data set's labels are trained as.

        Raises:
          CxrError: an exception that is not understood.
        """
        data = self.config.data
        rule = {
            "uncertain": data.uncertain, "not_mentioned": data.not_mentioned, "interval": data.interval,
            "seed": self.config.seed,
        }  # fmt: skip
        exceptions = {}
        for entry in data.exceptions:
            finding, changes = _entry("data.exceptions", entry, _RULES)
            exceptions[finding] = LabelPolicy(**(rule | {key: _value(text) for key, text in changes.items()}))
        return LabelPolicy(**rule, exceptions=exceptions)


def source_configs(config: Config) -> list[Config]:
    """The config as it is for each data set: `data.dataset`, then those of `data.mix` with their changes.

    Raises:
      CxrError: an entry that is not understood, or not one weight for each data set.
    """
    configs = [config]
    for entry in config.data.mix:
        name, changes = _entry("data.mix", entry, _OWN, "split.")
        overrides = [f"{key}={value}" for key, value in changes.items()]
        configs.append(with_overrides(config, ["data.mix=()", "data.weights=()", f"data.dataset={name}", *overrides]))
    if config.data.weights and len(config.data.weights) != len(configs):
        raise CxrError(
            f"config key data.weights has {len(config.data.weights)} numbers for {len(configs)} data sets: give one "
            "to data.dataset and one to each of data.mix, or none"
        )
    return configs


def with_absolute_files(mix: tuple[str, ...]) -> tuple[str, ...]:
    """Entries of `data.mix` whose files are found from any working directory."""
    absolute = []
    for entry in mix:
        name, changes = _entry("data.mix", entry, _OWN, "split.")
        if "split.files" in changes:
            files = _value(changes["split.files"])
            files = [files] if isinstance(files, str) else files
            changes["split.files"] = repr(tuple(str(Path(file).resolve()) for file in files))
        absolute.append("; ".join([name, *(f"{key}={value}" for key, value in changes.items())]))
    return tuple(absolute)


def _entry(key: str, text: str, label_mask: tuple[str, ...], group: str = " ") -> tuple[str, dict[str, str]]:
    """`name; key=value; ...` taken apart."""
    name, *changes = (word.strip() for word in str(text).split(";"))
    if not name or "=" in name:
        raise CxrError(f"config key {key}: entry {text!r} must begin with a name, as in 'NAME; {label_mask[0]}=...'")
    pairs = {}
    for change in filter(None, changes):
        which, equals, value = change.partition("=")
        if not equals or not (which in label_mask or which.startswith(group)):
            may = ", ".join(label_mask) + (f" and {group}*" if group.strip() else "")
            raise CxrError(f"config key {key}: {change!r} of {name} is not understood; an entry may set {may}")
        pairs[which] = value
    return name, pairs


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _files(names: tuple[str, ...]) -> Path | list[Path] | None:
    """The split's files as `make_split` takes them: one CSV, or three lists."""
    paths = [Path(name) for name in names]
    return paths[0] if len(paths) == 1 else paths or None
