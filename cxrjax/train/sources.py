"""The data sets of a run: each opened, split and labelled by its own part of the config."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cxrjax.config import Config, with_overrides
from cxrjax.data.records import Records, open_records
from cxrjax.data.splits import Split, make_split
from cxrjax.errors import CxrError
from cxrjax.findings import LabelPolicy

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
    split: Split

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
            share=split.share,
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
        parts = self.split.parts
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


def _entry(key: str, text: str, known: tuple[str, ...], group: str = " ") -> tuple[str, dict[str, str]]:
    """`name; key=value; ...` taken apart."""
    name, *changes = (word.strip() for word in str(text).split(";"))
    if not name or "=" in name:
        raise CxrError(f"config key {key}: entry {text!r} must begin with a name, as in 'NAME; {known[0]}=...'")
    pairs = {}
    for change in filter(None, changes):
        which, equals, value = change.partition("=")
        if not equals or not (which in known or which.startswith(group)):
            may = ", ".join(known) + (f" and {group}*" if group.strip() else "")
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
