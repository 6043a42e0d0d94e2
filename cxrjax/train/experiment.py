"""From a config to what a run works on: records, split, examples, network, mesh."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cxrjax.config import Config
from cxrjax.data.images import Augment
from cxrjax.data.mixture import Pooled, Source, own_policy, pool, pool_splits, source_configs
from cxrjax.data.pipeline import Examples, make_examples
from cxrjax.data.records import Records
from cxrjax.data.pipeline import Sampling
from cxrjax.data.splits import DataSplit
from cxrjax.distributed.mesh import check_divides, suggest_space, make_mesh
from cxrjax.distributed.runtime import is_distributed
from cxrjax.errors import CxrError
from cxrjax.findings import NO_FINDING, positions
from cxrjax.models.network import Network, check_size
from cxrjax.train.described import network_of
from cxrjax.train.init_from import Start, initial_network, located, missing_init
from cxrjax.train.losses import Loss, make_loss, prevalence_of
from cxrjax.train.trainable import TrainableParams


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config names, opened; for a run in `directory`, which may have been begun."""

    config: Config
    records: Records
    split: DataSplit
    findings: tuple[str, ...]
    mesh: jax.sharding.Mesh
    directory: Path | None = None
    sources: tuple[Source, ...] = ()

    @classmethod
    def open(cls, config: Config, directory: Path | None = None) -> "Experiment":
        """Open the data and lay out the devices.

        Args:
          config: see `cxrjax.config.default`.
          directory: of the run; one that goes on from a checkpoint does not need what it started from any more.

        Raises:
          CxrError: data not prepared, an unknown finding, an empty part, sizes that the mesh does not divide.
        """
        config = config if directory is None else located(config, directory)
        mesh = make_mesh(config.mesh.data, config.mesh.space)
        sources = tuple(map(Source.open, source_configs(config)))
        first = sources[0]
        findings = tuple(config.data.findings) or first.records.findings
        if len(sources) == 1:
            positions([name for name in findings if name != NO_FINDING], first.records.findings)
            records, split = first.records, first.split
        else:
            records = pool([source.records for source in sources], findings)
            split = pool_splits(records, [source.split for source in sources])
        rows = config.data.size
        space = mesh.shape["space"]
        check_divides(f"config key data.size = {rows} rows", rows, "space", space, suggest_space(rows, space))
        return cls(config, records, split, findings, mesh, directory, sources)

    @cached_property
    def examples_by_split(self) -> dict[str, Examples]:
        """The examples of train, validation and test, after the view filter and the label policy.

        Of several data sets, each part holds one after the other.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for number, source in enumerate(self.sources):
            for name, rows in source.parts.items():
                parts.setdefault(name, []).append(rows + self._start(number))
        return {name: self.examples_of_rows(np.concatenate(rows), learnt=name == "train") for name, rows in parts.items()}

    def examples_of_rows(self, rows: np.ndarray, *, learnt: bool = False) -> Examples:
        """Any rows of the records table, with the targets that the label policy gives them, to learn or to score."""
        rows = np.asarray(rows, np.int32)
        if not isinstance(self.records, Pooled):
            policy = self.sources[0].policy
            return make_examples(self.records, rows, self.findings, policy if learnt else policy.scored)
        origin = self.records.origin(rows)
        label = np.zeros((len(rows), len(self.findings)), np.float32)
        label_mask = np.zeros(label.shape, bool)
        for number, source in enumerate(self.sources):
            own = origin == number
            policy = own_policy(source.policy, source.records, self.findings)
            of = make_examples(self.records, rows[own], self.findings, policy if learnt else policy.scored)
            label[own], label_mask[own] = of.label, of.label_mask
        return Examples(self.records, rows, label, label_mask, origin)

    def _start(self, number: int) -> int:
        """The row of the records table at which a data set begins."""
        return int(self.records.starts[number]) if isinstance(self.records, Pooled) else 0

    def examples(self, name: str) -> Examples:
        """One part, which must have images; `test@chestxray14` is what a data set has in it."""
        whole, _, dataset = name.partition("@")
        if whole not in self.examples_by_split:
            raise CxrError(f"there is no part {whole} in split {self.split.name}; there are {', '.join(self.examples_by_split)}")
        part = self.examples_by_split[whole]
        if dataset:
            names = [source.records.dataset for source in self.sources]
            if dataset not in names:
                raise CxrError(f"there is no data set {dataset} in this run; there are {', '.join(names)}")
            of = np.zeros(len(part), np.int32) if part.dataset_index is None else part.dataset_index
            part = self.examples_of_rows(part.row[of == names.index(dataset)], learnt=whole == "train")
        if not len(part):
            raise CxrError(
                f"part {name} of split {self.split.name} has no images ({len(self.records)} records in "
                f"{self.records.directory}): change split.name, split.fractions or data.views"
            )
        return part

    @cached_property
    def network(self) -> Network:
        """The network that the config describes, with random initial values; a checkpoint fills it."""
        return network_of(self.config, len(self.findings))

    @cached_property
    def _initial(self) -> Start:
        gone = None if self.directory is None else missing_init(self.network, self.config, self.directory)
        return gone or initial_network(self.network, self.config, self.findings)

    @property
    def start(self) -> Network:
        """The network as it is before training: from `model.init_from`, where that is set.

        Raises:
          CxrError: weights of another architecture, or for other inputs.
        """
        return self._initial.network

    @cached_property
    def loss(self) -> Loss:
        """What is minimised; its class weights come from the training part.

        Raises:
          CxrError: a loss of exclusive classes for findings that are not.
        """
        train = self.examples("train")
        several = np.flatnonzero(train.label.sum(1) != 1)
        if self.config.loss.name == "cross_entropy" and len(several):
            record = self.records.id[train.row[several[0]]]
            raise CxrError(
                f"config key loss.name = cross_entropy takes exclusive classes, and record {record} is positive in "
                f"{train.label[several[0]].sum():.0f} of the findings: choose bce, weighted_bce or focal"
            )
        prevalence = prevalence_of(train.label, train.label_mask)
        return make_loss(self.config.loss.name, prevalence=prevalence, **dict(self.config.loss.options.items()))

    @cached_property
    def trainable(self) -> TrainableParams:
        """Which parameters learn, and how fast each does."""
        return TrainableParams.from_config(self.network, self.config)

    @property
    def augment(self) -> Augment:
        """The geometric augmentation of training."""
        return Augment(**self.config.augment.to_dict())

    @property
    def sampling(self) -> Sampling:
        """How training draws its records."""
        return Sampling(self.config.data.sampling, tuple(map(float, self.config.data.weights)))

    @property
    def accumulate(self) -> int:
        """How many parts make the effective batch.

        Raises:
          CxrError: the batch cannot be divided so.
        """
        batch, devices = self.config.train.batch, self.mesh.shape["data"]
        at_once = devices * (self.config.train.per_device or max(batch // devices, 1))
        total, divisors = self.mesh.devices.size, [n for n in range(1, batch + 1) if batch % n == 0]
        whole = max(n for n in divisors if total % n == 0)
        idle = "" if is_distributed() else f"set mesh.data to {max(n for n in divisors if n <= devices)}, or "
        instead = f", or {idle}share images: mesh.data = {whole}, mesh.space = {total // whole}"
        check_divides(f"config key train.batch = {batch} images", batch, "data", devices, instead)
        if batch % at_once:
            raise CxrError(
                f"config key train.batch = {batch} is not a multiple of {at_once} "
                f"({devices} devices x {at_once // devices} images): "
                f"set train.per_device to a divisor of {batch // devices}"
            )
        return batch // at_once

    def check_size(self) -> None:
        """Find out before any image is read whether the network takes images of `data.size`.

        Raises:
          CxrError: it does not; sizes that work are named.
        """
        images = self.config.train.batch // self.accumulate
        in_training = self.trainable.backbone_in_training
        check_size(self.network, self.config.data.size, batch_size=images, backbone_in_training=in_training)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that make an epoch."""
        return self.config.train.steps_per_epoch or max(len(self.examples("train").row) // self.config.train.batch, 1)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What identifies the data and the split."""
        return {"data": self.records.fingerprint, "split": self.split.fingerprint}

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's result depends on beside its config: data, split, and images normalised together.

        Reading it checks all that can be wrong with a config before anything is written.
        """
        for part in ("train", "validation"):
            self.examples(part)
        self.check_size()
        train = self.examples("train")
        _ = self.network, self.trainable, self.loss, self.sampling.strata(train.label, train.label_mask, train.dataset_index)
        identity = self.fingerprints | {"images at once": self.config.train.batch // self.accumulate}
        if self.config.model.init_from:
            identity |= {"initial weights": self._initial.mark}
            frozen = [name for name in self._initial.fresh if name in self.trainable.frozen_modules(self.network.params)]
            if frozen:
                raise CxrError(
                    f"config key train.freeze would freeze {', '.join(frozen)}, which model.init_from leaves at random "
                    "initial values: name the modules to freeze, without these"
                )
        return identity
