"""Several prepared data sets as one: a common record table and vocabulary; images stay in their data sets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32

from cxrjax.config import Config, with_changes, with_overrides
from cxrjax.console import stderr
from cxrjax.data.records import Box, Records, open_records
from cxrjax.data.splits import DataSplit, SplitRows, compute_split_fingerprint, find_shared_images, make_split
from cxrjax.errors import CxrError, list_some
from cxrjax.findings import NO_FINDING, LabelPolicy, finding_indices, matching_name, translate_labels

_NAMES = ("id", "patient", "study")
_COPIED = ("view", "sex", "source", "official", "age", "width", "height")


@dataclass(frozen=True)
class Mixture(Records):
    """Records of several data sets (`sources`), one after the other; made by `make_mixture`."""

    sources: tuple[Records, ...] = ()

    @cached_property
    def starts(self) -> Int32[np.ndarray, " S"]:
        """The row of each data set's first record."""
        return np.cumsum([0, *map(len, self.sources[:-1])]).astype(np.int32)

    def origin(self, rows: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the index of the data set that each row comes from."""
        return (np.searchsorted(self.starts, rows, side="right") - 1).astype(np.int32)

    @cached_property
    def digests(self) -> np.ndarray:  # noqa: D102 - as in Records
        return np.concatenate([source.digests for source in self.sources])

    def boxes(self, row: int) -> list[Box]:
        """See `Records.boxes`; findings have the names of this vocabulary."""
        source, row = self._at(row)
        named = {matching_name(source.findings, finding): finding for finding in self.findings}
        return [dataclasses.replace(box, finding=named.get(box.finding, box.finding)) for box in source.boxes(row)]

    def mask(self, row: int, finding: str, size: int) -> Bool[np.ndarray, "size size"] | None:
        """See `Records.mask`; also None if the record's data set does not have the finding."""
        finding_indices([finding], self.findings)
        source, row = self._at(row)
        name = matching_name(source.findings, finding)
        return None if name is None else source.mask(row, name, size)

    def verify(self, sample: int = 256) -> None:
        """See `Records.verify`; checks each data set."""
        for source in self.sources:
            source.verify(sample)

    def _at(self, row: int) -> tuple[Records, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sources[number], int(row) - int(self.starts[number])

    def _features(self, row: int) -> Any:
        source, row = self._at(row)
        return source._features(row)


def make_mixture(sources: Sequence[Records], findings: Sequence[str]) -> Mixture:
    """Combine data sets, with labels translated into one vocabulary (`findings.translate`).

    Ids, patients and studies are prefixed with the name of their data set, as in `chestxray14/00000013_005.png`.

    Args:
      sources: data sets of different names.
      findings: the common vocabulary; at least one data set must have each finding, under this name or a synonym.

    Raises:
      CxrError: no data set has a finding, or a data set is named twice.
    """
    names = [source.dataset for source in sources]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise CxrError(f"data set {repeated} is in the mixture twice: give data sets different names")
    for finding in findings:
        if finding != NO_FINDING and all(matching_name(source.findings, finding) is None for source in sources):
            finding_indices([finding], list(dict.fromkeys(name for source in sources for name in source.findings)))
    content = ["pooled", [source.fingerprint for source in sources], list(findings)]
    folders = [source.directory for source in sources if source.directory is not None]
    sizes = list(dict.fromkeys(source.config for source in sources))
    return Mixture(
        Path(os.path.commonpath(folders)) if folders else None,
        dataset="+".join(names),
        config="+".join(sizes),
        findings=tuple(findings),
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        table=pa.concat_tables([_mixture_table(source, findings) for source in sources]),
        options={"exclusive": all(s.exclusive and set(s.findings) == set(findings) for s in sources)},
        sources=tuple(sources),
    )


def combine_splits(records: Mixture, splits: Sequence[DataSplit]) -> DataSplit:
    """Combine the splits of all data sets; images that two data sets have in different splits are reported."""
    names = dict.fromkeys(name for split in splits for name in split.rows)
    rows = {
        name: np.concatenate(
            [s.rows[name] + start for s, start in zip(splits, records.starts, strict=True) if name in s.rows]
        ).astype(np.int32)
        for name in names
    }
    _report_shared_images(records, rows)
    kinds = dict.fromkeys(split.name for split in splits)
    return DataSplit("+".join(kinds), rows, compute_split_fingerprint(records, rows))


def translated_policy(policy: LabelPolicy, records: Records, findings: Sequence[str]) -> LabelPolicy:
    """Return the policy for a data set's labels in the vocabulary of the mixture.

    A finding that is only inferred from other labels counts where it is certain, and is unknown elsewhere.
    """
    inferred = [name for name in findings if name != NO_FINDING and matching_name(records.findings, name) is None]
    rules = {name: LabelPolicy(uncertain="ignore", not_mentioned="unknown") for name in inferred}
    rules |= {matching_name(findings, finding) or finding: rule for finding, rule in policy.per_finding.items()}
    return dataclasses.replace(policy, per_finding=rules)


def _mixture_table(source: Records, findings: Sequence[str]) -> pa.Table:
    """A data set's rows of the mixture's table."""
    columns: dict[str, Any] = {}
    for name in _NAMES:
        column = source.table[name].cast(pa.string())
        columns[name] = pc.binary_join_element_wise(source.dataset, column, "/")  # pyright: ignore
    for name in _COPIED:
        column = source.table[name]
        columns[name] = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    labels = translate_labels(source.labels, source.findings, findings)
    columns |= {f"label_{name}": pa.array(labels[:, k].copy()) for k, name in enumerate(findings)}
    return pa.table(columns)


def _report_shared_images(records: Mixture, rows: SplitRows) -> None:
    """Report images that two data sets have in different splits; a data set's own split reports those within it."""
    pairs = find_shared_images(records, rows)
    between = [text for text in pairs if len({name.split("/")[0] for name in text.split(" = ")}) > 1]
    if between:
        stderr.print(
            f"{len(between):,} images are in different splits of two data sets: {list_some(between)}; their scores "
            "will be too high: leave one of each out with split.files",
            soft_wrap=True,
        )


@dataclass(frozen=True)
class DataSource:
    """One data set of a run: the run's config, as it applies to this data set, its records, and their split."""

    config: Config
    records: Records
    split: DataSplit

    @classmethod
    def open(cls, config: Config) -> DataSource:
        """Open a data set, without reading images, and split it.

        Raises:
          CxrError: it is not prepared, its images are smaller than `data.image_size`, or it cannot be split this way.
        """
        data, split = config.data, config.split
        records = open_records(Path(data.data_dir), data.dataset, data.stored_size)
        if data.stored_size.isdigit() and data.image_size > int(data.stored_size):
            raise CxrError(
                f"config key data.image_size = {data.image_size} is more than the {data.stored_size} px that are "
                "stored: enlarged images have no more detail; prepare a larger size and set data.stored_size"
            )
        files = [Path(name) for name in split.files]
        data_split = make_split(
            records,
            split.name,
            seed=split.seed,
            fractions=split.fractions,
            files=files[0] if len(files) == 1 else files or None,
            sizes=split.sizes or None,
            folds=split.folds,
            fold=split.fold,
            subset_fraction=split.subset_fraction,
            by=split.by,
        )
        return cls(config, records, data_split)

    @cached_property
    def rows_by_split(self) -> dict[str, np.ndarray]:
        """Rows of each split that show one of the views of `data.views`.

        Raises:
          CxrError: no image has such a view.
        """
        views, available = self.config.data.views, {str(view) for view in self.records.view}
        unknown = sorted(set(views) - available)
        if unknown:
            raise CxrError(
                f"config key data.views: no image of {self.records.dataset} has view {unknown[0]}; choose from "
                f"{', '.join(sorted(available))}"
            )
        return {
            name: rows[np.isin(self.records.view[rows], views)] if views else rows
            for name, rows in self.split.rows.items()
        }

    @property
    def policy(self) -> LabelPolicy:
        """How the labels of this data set are trained."""
        labels = self.config.labels
        rule = {name: labels[name] for name in ("uncertain", "smooth_range", "not_mentioned")}
        return LabelPolicy(
            **rule,
            seed=self.config.seed,
            per_finding={
                finding: LabelPolicy(**(rule | dict(changes.items())), seed=self.config.seed)
                for finding, changes in labels.per_finding.items()
            },
        )


def data_source_configs(config: Config) -> list[Config]:
    """Return the config of each data set: `data.dataset` first, then those of `data.mixture` in alphabetical order."""
    configs = [config]
    for name, entry in config.data.mixture.items():
        changes = {key: value for key, value in entry.items() if key != "weight"}
        base = with_overrides(config, ["data.mixture={}", "data.weight=0", f"data.dataset={name}"])
        configs.append(with_changes(base, changes))
    return configs


def mixture_weights(config: Config) -> tuple[float, ...]:
    """Return the weight of each data set, in the order of `data_source_configs`; empty if none has one.

    Raises:
      CxrError: only some of the data sets have a weight.
    """
    weights = {config.data.dataset: float(config.data.weight)}
    weights |= {name: float(entry.get("weight", 0.0)) for name, entry in config.data.mixture.items()}
    missing = [name for name, weight in weights.items() if not weight]
    if len(missing) == len(weights):
        return ()
    if missing or len(weights) == 1:
        raise CxrError(
            f"config keys data.weight and data.mixture.NAME.weight: {', '.join(missing) or 'a single data set'} has "
            "no weight to share; give every data set of a mixture a weight above 0, or none"
            if missing
            else "config key data.weight is for a mixture: set data.mixture, or data.weight=0"
        )
    return tuple(weights.values())
