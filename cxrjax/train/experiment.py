"""From a config to the objects of a run: records, split, examples, network, loss, mesh."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from cxrjax.config import Config
from cxrjax.data.images import Augment
from cxrjax.data.mixture import (
    DataSource,
    Mixture,
    combine_splits,
    data_source_configs,
    make_mixture,
    mixture_weights,
    translated_policy,
)
from cxrjax.data.pipeline import Examples, Sampling, evaluation_batches, make_examples
from cxrjax.data.records import Records
from cxrjax.data.splits import DataSplit
from cxrjax.distributed.mesh import batch_shardings, check_divides, make_mesh, suggest_space
from cxrjax.distributed.placement import prefetch_to_device, process_shard, put_batch
from cxrjax.distributed.runtime import is_distributed
from cxrjax.errors import CxrError
from cxrjax.findings import NO_FINDING, finding_indices
from cxrjax.models.network import Network, check_size
from cxrjax.train.init_from import InitialNetwork, load_initial_network, missing_init, resolve_init_paths
from cxrjax.train.losses import Loss, label_prevalence, make_loss
from cxrjax.train.optimizer import TrainableParams
from cxrjax.train.run_directory import create_network
from cxrjax.train.state import flatten_for_mesh


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The objects that a config describes, for a new or resumed run in `directory`."""

    config: Config
    records: Records
    split: DataSplit
    findings: tuple[str, ...]
    mesh: jax.sharding.Mesh
    directory: Path | None = None
    sources: tuple[DataSource, ...] = ()

    @classmethod
    def open(cls, config: Config, directory: Path | None = None) -> "Experiment":
        """Open the data and lay out the devices.

        Args:
          config: see `cxrjax.config.default`.
          directory: of the run. A run that resumes from a checkpoint no longer needs its `model.init_from`.

        Raises:
          CxrError: data are not prepared, a finding is unknown, or the mesh does not divide the image size.
        """
        config = config if directory is None else resolve_init_paths(config, directory)
        mesh = make_mesh(config.mesh.data, config.mesh.space)
        sources = tuple(map(DataSource.open, data_source_configs(config)))
        first = sources[0]
        findings = tuple(config.data.findings) or first.records.findings
        if len(sources) == 1:
            finding_indices([name for name in findings if name != NO_FINDING], first.records.findings)
            records, split = first.records, first.split
        else:
            records = make_mixture([source.records for source in sources], findings)
            split = combine_splits(records, [source.split for source in sources])
        rows = config.data.image_size
        space = mesh.shape["space"]
        check_divides(f"config key data.image_size = {rows} rows", rows, "space", space, suggest_space(rows, space))
        return cls(config, records, split, findings, mesh, directory, sources)

    @cached_property
    def examples_by_split(self) -> dict[str, Examples]:
        """The examples of train, validation and test, after the view filter and the label policy.

        With several data sets, each split contains one after the other.
        """
        rows_by_split: dict[str, list[np.ndarray]] = {}
        for number, source in enumerate(self.sources):
            offset = int(self.records.starts[number]) if isinstance(self.records, Mixture) else 0
            for split, rows in source.rows_by_split.items():
                rows_by_split.setdefault(split, []).append(rows + offset)
        return {
            split: self.examples_of_rows(np.concatenate(rows), training=split == "train")
            for split, rows in rows_by_split.items()
        }

    def examples_of_rows(self, rows: np.ndarray, *, training: bool = False) -> Examples:
        """Return the examples of some rows of the records table, with targets for training or for scoring."""
        rows = np.asarray(rows, np.int32)
        if not isinstance(self.records, Mixture):
            policy = self.sources[0].policy
            return make_examples(self.records, rows, self.findings, policy if training else policy.scored)
        origin = self.records.origin(rows)
        label = np.zeros((len(rows), len(self.findings)), np.float32)
        label_mask = np.zeros(label.shape, bool)
        for number, source in enumerate(self.sources):
            mask = origin == number
            policy = translated_policy(source.policy, source.records, self.findings)
            examples = make_examples(self.records, rows[mask], self.findings, policy if training else policy.scored)
            label[mask], label_mask[mask] = examples.label, examples.label_mask
        return Examples(self.records, rows, label, label_mask, origin)

    def examples(self, name: str) -> Examples:
        """Return the examples of a split, such as "test", or of one data set in it, such as "test@chestxray14".

        Raises:
          CxrError: there is no such split or data set, or it has no images.
        """
        split, _, dataset = name.partition("@")
        if split not in self.examples_by_split:
            known = ", ".join(self.examples_by_split)
            raise CxrError(f"split {self.split.name} has no {split}; choose from {known}")
        examples = self.examples_by_split[split]
        if dataset:
            datasets = [source.records.dataset for source in self.sources]
            if dataset not in datasets:
                raise CxrError(f"this run has no data set {dataset}; choose from {', '.join(datasets)}")
            index = np.zeros(len(examples), np.int32) if examples.dataset_index is None else examples.dataset_index
            rows = examples.row[index == datasets.index(dataset)]
            examples = self.examples_of_rows(rows, training=split == "train")
        if not len(examples):
            raise CxrError(
                f"{name} of split {self.split.name} has no images ({len(self.records)} records in "
                f"{self.records.directory}): change split.name, split.fractions or data.views"
            )
        return examples

    @cached_property
    def network(self) -> Network:
        """The network with random initial values; a checkpoint replaces them."""
        return create_network(self.config, len(self.findings))

    @cached_property
    def _init(self) -> InitialNetwork:
        missing = None if self.directory is None else missing_init(self.network, self.config, self.directory)
        return missing or load_initial_network(self.network, self.config, self.findings)

    @property
    def init_network(self) -> Network:
        """The network before training, initialised from `model.init_from` if that is set.

        Raises:
          CxrError: the weights are of another architecture or for other inputs.
        """
        return self._init.network

    @cached_property
    def loss(self) -> Loss:
        """The training loss; its class weights come from the training split.

        Raises:
          CxrError: cross_entropy for findings that are not exclusive.
        """
        train = self.examples("train")
        wrong = np.flatnonzero(train.label.sum(1) != 1)
        if self.config.loss.name == "cross_entropy" and len(wrong):
            record = self.records.id[train.row[wrong[0]]]
            raise CxrError(
                f"config key loss.name = cross_entropy needs exclusive classes, but record {record} is positive in "
                f"{train.label[wrong[0]].sum():.0f} findings: choose bce, weighted_bce or focal"
            )
        prevalence = label_prevalence(train.label, train.label_mask)
        return make_loss(self.config.loss.name, prevalence=prevalence, **dict(self.config.loss.options.items()))

    @cached_property
    def trainable(self) -> TrainableParams:
        """The trainable parameters and their learning rate factors."""
        return TrainableParams.from_config(self.network, self.config)

    @property
    def augment(self) -> Augment:
        """The augmentation of training images."""
        return Augment(**self.config.augment.to_dict())

    @property
    def sampling(self) -> Sampling:
        """How training examples are sampled."""
        return Sampling(self.config.data.sampling, mixture_weights(self.config))

    @property
    def accumulation_steps(self) -> int:
        """The number of microbatches per batch.

        Raises:
          CxrError: the batch cannot be divided into such microbatches.
        """
        batch, devices = self.config.train.batch_size, self.mesh.shape["data"]
        microbatch = devices * (self.config.train.per_device_batch_size or max(batch // devices, 1))
        total, divisors = self.mesh.devices.size, [n for n in range(1, batch + 1) if batch % n == 0]
        data = max(n for n in divisors if total % n == 0)
        fewer = "" if is_distributed() else f"set mesh.data to {max(n for n in divisors if n <= devices)}, or "
        fix = f", or {fewer}share images: mesh.data = {data}, mesh.space = {total // data}"
        check_divides(f"config key train.batch_size = {batch} images", batch, "data", devices, fix)
        if batch % microbatch:
            raise CxrError(
                f"config key train.batch_size = {batch} is not a multiple of {microbatch} "
                f"({devices} devices x {microbatch // devices} images): "
                f"set train.per_device_batch_size to a divisor of {batch // devices}"
            )
        return batch // microbatch

    @property
    def microbatch_size(self) -> int:
        """Images per forward pass over all devices; batch normalisation uses their statistics."""
        return self.config.train.batch_size // self.accumulation_steps

    def check_size(self) -> None:
        """Check before reading any image that the network accepts images of `data.image_size`.

        Raises:
          CxrError: it does not; the message names sizes that work.
        """
        check_size(
            self.network, self.config.data.image_size, batch_size=self.microbatch_size,
            backbone_in_training=self.trainable.backbone_in_training,
        )  # fmt: skip

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.config.train.steps_per_epoch or max(len(self.examples("train")) // self.config.train.batch_size, 1)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the data and the split."""
        return {"data": self.records.fingerprint, "split": self.split.fingerprint}

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's result depends on besides its config: data, split, microbatch size and initial weights.

        Computing it checks the whole config before anything is written.
        """
        train, _ = self.examples("train"), self.examples("validation")
        self.check_size()
        _ = self.loss, self.sampling.strata(train.label, train.label_mask, train.dataset_index)
        identity = self.fingerprints | {"microbatch size": self.microbatch_size}
        if self._init.fingerprint:
            identity |= {"initial weights": self._init.fingerprint}
            frozen = [
                name for name in self._init.random_modules if name in self.trainable.frozen_modules(self.network.params)
            ]
            if frozen:
                raise CxrError(
                    f"config key train.freeze would freeze {', '.join(frozen)}, which model.init_from leaves at random "
                    "initial values: name the modules to freeze, without these"
                )
        return identity


PredictStep = Callable[[Network, Any], jax.Array]
"""A jitted step from a network, possibly flat, and images to an array with one row per image."""


def predict_logits(
    network: Network,
    examples: Examples,
    step: PredictStep,
    mesh: jax.sharding.Mesh,
    *,
    size: int,
    batch: int,
    threads: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> Float[np.ndarray, "N K"]:
    """Return the logits of every example, in order.

    Args:
      network: parameters and statistics, used in inference mode.
      examples: N records.
      step: `make_predict_step(mesh)`.
      mesh: devices.
      size: side of the images in px.
      batch: batch size over all devices; rounded up to a multiple of the `data` axis.
      threads: decoding threads.
      advance: called with the number of images of each batch.
    """
    devices = mesh.shape["data"]
    batch = -(-batch // devices) * devices
    shardings = batch_shardings(mesh)
    batches = evaluation_batches(
        examples, size=size, batch_size=batch, threads=threads, shard=process_shard(shardings.example_mask)
    )
    outputs, flat = [], flatten_for_mesh(network, mesh)
    for placed in prefetch_to_device(batches, lambda batch: put_batch(batch, shardings)):
        outputs.append(step(flat, placed.image))  # asynchronous: the device runs ahead of the host
        if len(outputs) > 2:
            outputs[-3] = np.asarray(outputs[-3])
        advance(batch)
    return np.concatenate([np.asarray(output) for output in outputs])[: len(examples.row)]
