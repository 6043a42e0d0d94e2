"""The training loop: restore, step, log, validate, save."""

import dataclasses
import json
import math
import signal
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import jax
import numpy as np

from cxrjax.config import Config, flatten
from cxrjax.console import progress_bar, stderr
from cxrjax.data import Batch
from cxrjax.data.pipeline import training_batches
from cxrjax.data.splits import save_split
from cxrjax.distributed.mesh import batch_shardings, replicated
from cxrjax.distributed.placement import prefetch_to_device, process_shard, put_batch
from cxrjax.distributed.runtime import (
    check_consistent,
    check_shared_directory,
    collect_signals,
    devices,
    is_distributed,
    is_main_process,
    on_main_process,
    peer_lost_error,
    preemption_requested,
)
from cxrjax.errors import CxrError, InterruptedRunError, out_of_memory
from cxrjax.files import write_json
from cxrjax.metrics.auc import mean_auroc
from cxrjax.metrics.predictions import log_odds
from cxrjax.models.network import parameter_count
from cxrjax.train.checkpoint import Checkpoints
from cxrjax.train.experiment import Experiment, predict_logits
from cxrjax.train.monitoring import DataWaitTimer, MetricWriter, NullMetricWriter, Profiler
from cxrjax.train.optimizer import make_optimizer, schedule
from cxrjax.train.run_directory import RunDirectory, describe_environment
from cxrjax.train.state import Progress, TrainState, flatten_for_mesh, unflatten_params
from cxrjax.train.step import make_predict_step, make_train_step

LOCAL = ("data.data_dir", "data.num_threads")
"""Config keys that may differ between processes."""


def train(
    config: Config,
    directory: Path,
    experiment: Experiment | None = None,
    *,
    profile: tuple[int, int] | None = None,
) -> Progress:
    """Train in `directory`, from its newest checkpoint if there is one.

    The result of a run that was killed and resumed is bitwise identical to an uninterrupted one: batch k depends only
    on the seed and k, and the checkpoint holds everything else that the loop remembers.

    In a distributed run every process calls this. They must share the file system of `directory`, where only the first
    process writes, except for its part of the checkpoints.

    Args:
      config: see `cxrjax.config.default`.
      directory: the run's directory; created if missing.
      experiment: the opened config, if the caller has it.
      profile: first and last step that process 0 traces into `directory/profile`; steps already done are not traced.

    Raises:
      CxrError: bad input, processes that disagree, or a loss that is not finite.
      InterruptedRunError: SIGTERM or SIGINT arrived; the state is saved.
    """
    experiment = experiment or Experiment.open(config)
    _check_monitor(experiment)
    _check_profile(profile, config.train.epochs * experiment.steps_per_epoch)
    check_consistent("config", {key: value for key, value in flatten(config).items() if key not in LOCAL})
    check_consistent("data and split", experiment.identity)
    check_shared_directory(directory)
    lock = on_main_process(lambda: RunDirectory(directory, config, experiment.identity))
    with lock or nullcontext(), ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
        trainer = _Trainer(experiment, directory, checkpoints)
        on_main_process(lambda: trainer.report_start(profile))
        if trainer.finished:
            return trainer.progress
        writer = MetricWriter(directory, trainer.progress.step) if is_main_process() else NullMetricWriter()
        trainer.writer = stack.enter_context(writer)
        trainer.profiler = stack.enter_context(Profiler(directory, profile if is_main_process() else None))
        try:
            return trainer.run()
        except jax.errors.JaxRuntimeError as error:
            if is_distributed() and not out_of_memory(error):
                raise peer_lost_error(error, f"the run resumes from the newest checkpoint in {directory}") from error
            raise


def _check_monitor(experiment: Experiment) -> None:
    """Check before training that the validation labels define the AUROC, if it selects the best checkpoint."""
    validation = experiment.examples("validation")
    label, label_mask = validation.label > 0.5, validation.label_mask
    defined = ((label & label_mask).any(0) & (~label & label_mask).any(0)).any()
    if experiment.config.train.monitor == "val_auroc" and not defined:
        raise CxrError(
            f"val_auroc is undefined: no finding has both a positive and a negative among the {len(label)} "
            "validation images; use --config.train.monitor=val_loss, or a larger validation split"
        )


def _check_profile(steps: tuple[int, int] | None, total: int) -> None:
    if steps and steps[1] > total:
        raise CxrError(
            f"steps {steps[0]} to {steps[1]} cannot be profiled in a run of {total} steps: choose --profile "
            f"steps=A:B with B at most {total}"
        )


class _Trainer:
    """The state of the loop, and its parts in the order in which they run."""

    writer: MetricWriter | NullMetricWriter
    profiler: Profiler

    def __init__(self, experiment: Experiment, directory: Path, checkpoints: Checkpoints):
        config, mesh = experiment.config, experiment.mesh
        self.experiment, self.config, self.directory, self.checkpoints = experiment, config, directory, checkpoints
        self.validation = experiment.examples("validation")
        self.steps_per_epoch = experiment.steps_per_epoch
        self.steps = config.train.epochs * self.steps_per_epoch

        optimizer = make_optimizer(config.optimizer)
        self.train_step = make_train_step(
            experiment.network,
            optimizer,
            schedule(config.optimizer, self.steps),
            mesh,
            experiment.accumulation_steps,
            experiment.trainable,
            experiment.loss,
            config.train.heads == "alternating",
        )
        self.predict_step = make_predict_step(mesh)
        state = TrainState.create(experiment.init_network, optimizer, config.seed, experiment.trainable)
        state, self.progress = jax.device_put(state, replicated(mesh)), Progress()
        restored = checkpoints.restore_last(state)
        if restored:
            state, self.progress = restored[0], Progress(**restored[1])
        self.state = flatten_for_mesh(state, mesh)
        self.pending: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()  # step, metrics, rows of records

    def run(self) -> Progress:
        """Train from the current step to the last epoch or to an early stop."""
        train, progress = self.config.train, self.progress
        self.timer, batches = DataWaitTimer(progress), self._batches()
        bar = progress_bar(self._label(), self.steps * train.batch_size, start=progress.step * train.batch_size)
        with bar as advance, collect_signals() as self.signals:
            try:
                while True:
                    if self._at_epoch_end:
                        self._finish_epoch()
                    if self.finished:
                        break
                    self._check_signals()
                    if self.profiler.starts(progress.step + 1):
                        self._drain_metrics()
                        self.profiler.start()

                    with jax.profiler.StepTraceAnnotation("train", step_num=progress.step + 1):
                        batch, rows = self.timer.next(batches)
                        self.state, metrics = self.train_step(self.state, batch)
                    self.timer.resume()
                    progress.step += 1
                    self.pending.append((progress.step, metrics, rows))
                    self._drain_metrics(keep=2)  # the device stays two steps ahead of the host

                    if self.profiler.ends(progress.step):
                        self._drain_metrics()
                        self.profiler.stop()
                    if self._at_checkpoint:
                        self._drain_metrics()
                        self._save()
                    advance(train.batch_size, self._label())
            finally:
                batches.close()
        self.checkpoints.wait()
        on_main_process(self.write_description)
        return progress

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained and validated, or training stopped early."""
        return self.progress.stopped_early or (self.progress.step >= self.steps and not self._at_epoch_end)

    @property
    def _at_checkpoint(self) -> bool:
        every = self.config.train.checkpoint_every_steps
        return bool(every) and self.progress.step % every == 0 and not self._at_epoch_end

    @property
    def _at_epoch_end(self) -> bool:
        return self.progress.step == self.steps_per_epoch * (self.progress.validated_epochs + 1)

    def _batches(self) -> Generator[tuple[Batch, np.ndarray], None, None]:
        """Yield batches on the devices, prefetching two, with their rows of the records table on the host."""
        data, shardings = self.config.data, batch_shardings(self.experiment.mesh)
        batches = training_batches(
            self.experiment.examples("train"),
            size=data.image_size,
            batch_size=self.config.train.batch_size,
            augment=self.experiment.augment,
            seed=self.config.seed,
            sampling=self.experiment.sampling,
            start=self.progress.step,
            threads=data.num_threads,
            shard=process_shard(shardings.example_mask),
        )
        return prefetch_to_device(batches, lambda batch: (put_batch(batch, shardings), batch.record))

    def _drain_metrics(self, keep: int = 0) -> None:
        """Read and log the metrics of all pending steps but the last `keep`; stop if they are not finite."""
        while len(self.pending) > keep:
            step, metrics, rows = self.pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                self._raise_not_finite(step, values, rows)
            self.progress.loss_sum += values["loss"]
            self.progress.learning_rate = values["learning_rate"]
            if step % self.config.train.log_every_steps == 0:
                self.writer.write_scalars(step, {f"train_{name}": value for name, value in values.items()})

    def _finish_epoch(self) -> None:
        """Validate, update the learning rate factor, the best checkpoint and early stopping, and save."""
        self._drain_metrics()
        self.timer.pause()
        metrics = self._validate()
        self._reduce_on_plateau(metrics["val_loss"])
        self._track_best(metrics)
        self._save()
        self.timer.resume()

    def _validate(self) -> dict[str, float]:
        """Compute and log the validation metrics, checking for signals after each batch."""
        config, progress, examples = self.config, self.progress, self.validation
        logits = predict_logits(
            unflatten_params(self.state).network(self.experiment.network), examples, self.predict_step,
            self.experiment.mesh, size=config.data.image_size, batch=config.evaluate.batch_size,
            threads=config.data.num_threads, advance=lambda _: self._check_signals(),
        ).astype(np.float64)  # fmt: skip
        metrics = {
            "val_loss": self.experiment.loss.mean(logits, examples.label, examples.label_mask),
            "val_auroc": mean_auroc(log_odds(logits, config.loss.name), examples.label, examples.label_mask),
            "val_accuracy": self.experiment.loss.accuracy(logits, examples.label, examples.label_mask),
        }
        if not math.isfinite(metrics["val_loss"]):
            raise CxrError(
                f"the validation loss is {metrics['val_loss']} after step {progress.step}; {self._last_checkpoint()}"
            )
        progress.validated_epochs += 1
        self.writer.write_scalars(
            progress.step,
            {
                "epoch": progress.validated_epochs,
                "train_mean_loss": progress.loss_sum / self.steps_per_epoch,
                **metrics,
                "learning_rate": progress.learning_rate,
                "seconds": progress.seconds,
                "data_wait_fraction": self.timer.epoch_fraction(),
            },
        )
        self.writer.flush()
        if is_main_process() and not stderr.is_terminal:  # log files show no progress bar
            position = f"epoch {progress.validated_epochs}/{config.train.epochs}, step {progress.step}"
            values = f"val_loss {metrics['val_loss']:.4f}, val_auroc {metrics['val_auroc']:.4f}"
            stderr.print(f"{config.data.image_size} px, {position}: {values}, {progress.seconds:.0f} s", soft_wrap=True)
        progress.loss_sum = 0.0
        return metrics

    def _reduce_on_plateau(self, loss: float) -> None:
        """Lower the learning rate if the schedule is "plateau" and the validation loss has stopped falling."""
        config, progress = self.config.optimizer, self.progress
        if progress.lowest_loss is None or loss < progress.lowest_loss:
            progress.lowest_loss, progress.epochs_since_lowest = loss, 0
            return
        progress.epochs_since_lowest += 1
        if config.schedule == "plateau" and progress.epochs_since_lowest >= config.plateau_patience:
            factor = self.state.lr_factor * np.float32(config.plateau_factor)
            factor = jax.device_put(factor, replicated(self.experiment.mesh))
            self.state = dataclasses.replace(self.state, lr_factor=factor)
            progress.epochs_since_lowest = 0

    def _track_best(self, metrics: dict[str, float]) -> None:
        """Save the network if it is the best so far, else count towards early stopping."""
        train, progress = self.config.train, self.progress
        value = -metrics["val_loss"] if train.monitor == "val_loss" else metrics[train.monitor]
        if progress.best is None or value > progress.best:
            progress.best, progress.best_step, progress.epochs_since_best = value, progress.step, 0
            state, auroc = unflatten_params(self.state), metrics["val_auroc"]
            metadata = {
                "step": progress.step,
                "val_loss": metrics["val_loss"],
                "val_auroc": auroc if math.isfinite(auroc) else None,
            }
            self.checkpoints.save_best(progress.step, {"params": state.params, "stats": state.stats}, metadata)
        else:
            progress.epochs_since_best += 1
        patience = train.early_stopping_patience
        progress.stopped_early = bool(patience) and progress.epochs_since_best >= patience

    def _save(self) -> None:
        self.timer.update()
        self.checkpoints.save(self.progress.step, unflatten_params(self.state), dataclasses.asdict(self.progress))

    def _check_signals(self) -> None:
        """Save and stop the run if a signal arrived."""
        signals = self.signals or preemption_requested()
        if not signals:
            return
        self._drain_metrics()
        if self.checkpoints.last_step != self.progress.step and self.progress.step:
            self._save()
        self.checkpoints.wait()
        self.writer.flush()
        raise InterruptedRunError(
            f"stopped by {signal.Signals(signals[0]).name} at step {self.progress.step} of {self.steps}, saved in "
            f"{self.directory}; rerun the same command to resume",
            signals[0],
        )

    def _raise_not_finite(self, step: int, values: dict[str, float], rows: np.ndarray) -> None:
        self.checkpoints.wait()
        ids = [str(name) for name in self.experiment.records.id[rows[rows >= 0]]]
        raise CxrError(
            f"the loss is {values['loss']} and the gradient norm {values['gradient_norm']} at step {step}, "
            f"for records {', '.join(ids)}; {self._last_checkpoint()}. Check those images and labels; "
            "otherwise lower optimizer.learning_rate, or set optimizer.grad_clip_norm=1, in another --workdir"
        )

    def _last_checkpoint(self) -> str:
        step = self.checkpoints.last_step
        folder = self.checkpoints.directory / "last" / str(step)
        return "no checkpoint was saved" if step is None else f"the last good checkpoint is {folder}"

    def _label(self) -> str:
        train, progress = self.config.train, self.progress
        epoch = min(progress.step // self.steps_per_epoch + 1, train.epochs)
        best = "" if progress.best is None else f", best {train.monitor} {abs(progress.best):.3f}"
        return f"{self.config.data.image_size} px, epoch {epoch}/{train.epochs}{best}"

    def report_start(self, profile: tuple[int, int] | None) -> None:
        """Print what is already done, and write the description of a run that is not finished."""
        step, file = self.progress.step, self.directory / "run.json"
        if not (self.finished and file.exists() and json.loads(file.read_text()).get("steps") == step):
            self.write_description()
        if profile and profile[1] <= step:
            stderr.print(f"steps {profile[0]} to {profile[1]} are already done: nothing is traced")
        used, available = self.experiment.mesh.devices.size, len(devices())
        if used < available:
            stderr.print(f"{used} of {available} devices are used: config keys mesh.data, mesh.space", soft_wrap=True)
        if step:
            rest = "nothing is left to train" if self.finished else f"resuming up to step {self.steps}"
            stderr.print(f"{self.directory} has a checkpoint of step {step}: {rest}", soft_wrap=True)

    def write_description(self) -> None:
        """Write `run.json` and the split: everything needed to reproduce the run."""
        experiment, progress = self.experiment, self.progress
        write_json(
            self.directory / "run.json",
            describe_environment(experiment.mesh)
            | {
                "seed": self.config.seed,
                "identity": experiment.identity,
                "findings": list(experiment.findings),
                "parameters": parameter_count(experiment.network),
                "trainable parameters": parameter_count(experiment.trainable.split(experiment.network.params)[0]),
                "images": {split: len(examples) for split, examples in experiment.examples_by_split.items()},
                "steps": progress.step,
                "train_seconds": round(progress.seconds, 1),
                "data_wait_fraction": progress.data_wait_fraction,
            },
        )
        save_split(experiment.split, experiment.records, self.directory / "split.csv")
