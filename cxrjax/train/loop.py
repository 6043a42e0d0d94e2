"""The one training loop: resume, step, log, validate, save."""

import dataclasses
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import jax
import numpy as np

from cxrjax.config import Config, flatten
from cxrjax.console import progress_bar, stderr
from cxrjax.data.batch import Batch
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
from cxrjax.train.experiment import Experiment
from cxrjax.train.flat_params import pack_for, unpack
from cxrjax.train.forward import logits_of
from cxrjax.train.monitoring import DataWaitTimer, MetricWriter, NullMetricWriter, Profile
from cxrjax.train.optimizer import make_optimizer, schedule
from cxrjax.train.run_directory import RunDirectory, describe_run
from cxrjax.train.state import Progress, TrainState
from cxrjax.train.step import make_predict_step, make_train_step

LOCAL = ("data.dir", "data.threads")
"""Config keys that may differ from process to process."""


def train(
    config: Config,
    directory: Path,
    experiment: Experiment | None = None,
    *,
    profile: tuple[int, int] | None = None,
) -> Progress:
    """Train what the config says in `directory`, from its newest checkpoint if it has one.

    A run that is killed at any moment and started again ends with the same bits as one never killed: batch k
    is a function of the seed and k, and everything else the loop remembers is in the checkpoint.

    Of several processes (`parallel.runtime`) each calls this; they must share the file system of `directory`, where
    only the first writes, but for its part of checkpoints.

    Args:
      config: see `cxrjax.config.default`.
      directory: the run's directory; made if absent.
      experiment: the opened config, where the caller has it already.
      profile: first and last of the steps that process 0 traces into `directory/profile`; those done already are not.

    Raises:
      CxrError: bad input, processes that do not agree, or a loss that is not finite.
      InterruptedRunError: SIGTERM or SIGINT came; the state is saved.
    """
    experiment = experiment or Experiment.open(config)
    check_watch(experiment)
    _check_profile(profile, config.train.epochs * experiment.steps_per_epoch)
    check_consistent("config", {key: value for key, value in flatten(config).items() if key not in LOCAL})
    check_consistent("data and split", experiment.identity)
    check_shared_directory(directory)
    with on_main_process(lambda: RunDirectory(directory, config, experiment.identity)) or nullcontext(), ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
        trainer = _Trainer(experiment, directory, checkpoints)
        on_main_process(lambda: trainer.begin(profile))
        if trainer.finished:
            return trainer.progress
        writer = MetricWriter(directory, trainer.progress.step) if is_main_process() else NullMetricWriter()
        trainer.writer = stack.enter_context(writer)
        trainer.profile = stack.enter_context(Profile(directory, profile if is_main_process() else None))
        try:
            return trainer.run()
        except jax.errors.JaxRuntimeError as error:
            if is_distributed() and not out_of_memory(error):
                raise peer_lost_error(error, f"the run goes on from the newest checkpoint in {directory}") from error
            raise


class _Trainer:
    """The loop's parts, in the order in which they happen."""

    writer: MetricWriter | NullMetricWriter
    profile: Profile

    def __init__(self, experiment: Experiment, directory: Path, checkpoints: Checkpoints):
        config = experiment.config
        self.experiment, self.config, self.directory = experiment, config, directory
        self.checkpoints = checkpoints
        self.validation = experiment.examples("validation")
        self.steps_per_epoch = experiment.steps_per_epoch
        self.steps = config.train.epochs * self.steps_per_epoch

        optimizer = make_optimizer(config.optimizer)
        self.train_step = make_train_step(
            experiment.network,
            optimizer,
            schedule(config.optimizer, self.steps),
            experiment.mesh,
            experiment.accumulate,
            experiment.trainable,
            experiment.loss,
            config.train.heads == "alternating",
        )
        self.predict_step = make_predict_step(experiment.mesh)
        state = TrainState.create(experiment.start, optimizer, config.seed, experiment.trainable)
        state, self.progress = jax.device_put(state, replicated(experiment.mesh)), Progress()
        restored = checkpoints.restore_last(state)
        if restored:
            state, self.progress = restored[0], Progress(**restored[1])
        self.state = pack_for(state, experiment.mesh)
        self.waiting = DataWaitTimer(self.progress.waited, self.progress.stepped)

    def run(self) -> Progress:
        """Go on from where the progress stands to the last epoch, or to an early stop."""
        train, progress = self.config.train, self.progress
        self._clock = time.perf_counter()
        batches = self._batches()
        total = self.steps * train.batch
        with progress_bar(self._label(), total, start=progress.step * train.batch) as advance, collect_signals() as received:
            pending: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()
            try:
                while True:
                    if self._at_epoch_end:
                        self._drain_metrics(pending, 0)
                        self.waiting.pause()
                        self._end_epoch(lambda _: self._stop(received or preemption_requested()))
                        self._save()
                        self.waiting.go()
                    if self.finished:
                        break
                    received.extend(preemption_requested())
                    if received:
                        self._drain_metrics(pending, 0)
                        self._stop(received)
                    if self.profile.starts(progress.step + 1):
                        self._drain_metrics(pending, 0)
                        self.profile.start()
                    with jax.profiler.StepTraceAnnotation("train", step_num=progress.step + 1):
                        batch, rows = self.waiting.next(batches)
                        self.state, metrics = self.train_step(self.state, batch)
                    self.waiting.go()
                    progress.step += 1
                    pending.append((progress.step, metrics, rows))
                    self._drain_metrics(pending, 2)  # the device stays two steps ahead of the host
                    if self.profile.ends(progress.step):
                        self._drain_metrics(pending, 0)
                        self.profile.stop()
                    if train.save_every and progress.step % train.save_every == 0 and not self._at_epoch_end:
                        self._drain_metrics(pending, 0)
                        self._save()
                    advance(train.batch, self._label())
            finally:
                batches.close()
        self.checkpoints.wait()
        on_main_process(self.describe)
        return progress

    @property
    def finished(self) -> bool:
        """All epochs are done and validated, or the watched metric stopped getting better."""
        return self.progress.stopped_early or (self.progress.step >= self.steps and not self._at_epoch_end)

    @property
    def _at_epoch_end(self) -> bool:
        return self.progress.step == self.steps_per_epoch * (self.progress.validated + 1)

    def _batches(self) -> Generator[tuple[Batch, np.ndarray], None, None]:
        """Batches on the devices, two ahead, each with its rows of the records table on the host."""
        data, shardings = self.config.data, batch_shardings(self.experiment.mesh)
        stream = training_batches(
            self.experiment.examples("train"),
            size=data.size,
            batch_size=self.config.train.batch,
            augment=self.experiment.augment,
            seed=self.config.seed,
            sampling=self.experiment.sampling,
            start=self.progress.step,
            threads=data.threads,
            shard=process_shard(shardings.example_mask),
        )
        return prefetch_to_device(stream, lambda batch: (put_batch(batch, shardings), batch.record))

    def _drain_metrics(self, pending: deque, allowed: int) -> None:
        """Read the metrics of steps that are done; stop the run if a loss or gradient is not finite."""
        while len(pending) > allowed:
            step, metrics, rows = pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                self._not_finite(step, values, rows)
            self.progress.loss_sum += values["loss"]
            self.progress.rate = values["rate"]
            if step % self.config.train.log_every == 0:
                self.writer.write_scalars(step, {f"train_{name}": value for name, value in values.items()})

    def _end_epoch(self, stop: Callable[[int], None]) -> None:
        """Validate, asking `stop` after each batch; lower the rate, remember the best, or stop early."""
        config, progress, state = self.config, self.progress, unpack(self.state)
        self._tick()
        logits = logits_of(
            state.network(self.experiment.network), self.validation, self.predict_step, self.experiment.mesh,
            size=config.data.size, batch=config.evaluate.batch, threads=config.data.threads, advance=stop,
        ).astype(np.float64)  # fmt: skip
        loss = self.experiment.loss.mean(logits, self.validation.label, self.validation.label_mask)
        odds = log_odds(logits, config.loss.name)
        auroc = mean_auroc(odds, self.validation.label, self.validation.label_mask)
        accuracy = self.experiment.loss.accuracy(logits, self.validation.label, self.validation.label_mask)
        if not math.isfinite(loss):
            raise CxrError(f"the validation loss is {loss} after step {progress.step}; {self._last_good()}")
        progress.validated += 1
        self.writer.write_scalars(
            progress.step,
            {
                "epoch": progress.validated,
                "train_mean_loss": progress.loss_sum / self.steps_per_epoch,
                "val_loss": loss,
                "val_auroc": auroc,
                "val_accuracy": accuracy,
                "rate": progress.rate,
                "seconds": progress.seconds,
                "data_wait": self.waiting.of_epoch(),
            },
        )
        self.writer.flush()
        if is_main_process() and not stderr.is_terminal:  # where no bar is seen, a log has a line an epoch
            stderr.print(
                f"{config.data.size} px, epoch {progress.validated}/{config.train.epochs}, step {progress.step}: "
                f"val_loss {loss:.4f}, val_auroc {auroc:.4f}, {progress.seconds:.0f} s", soft_wrap=True,
            )  # fmt: skip
        progress.loss_sum = 0.0
        self._plateau(loss)
        watched = {"val_loss": -loss, "val_auroc": auroc, "val_accuracy": accuracy}
        value = watched[config.train.watch]
        if progress.best is None or value > progress.best:
            progress.best, progress.best_step, progress.since_best = value, progress.step, 0
            network = {"params": state.params, "stats": state.stats}
            about = {"step": progress.step, "val_loss": loss, "val_auroc": auroc if math.isfinite(auroc) else None}
            self.checkpoints.save_best(progress.step, network, about)
        else:
            progress.since_best += 1
        progress.stopped_early = bool(config.train.patience) and progress.since_best >= config.train.patience

    def _plateau(self, loss: float) -> None:
        config, progress = self.config.optimizer, self.progress
        if progress.lowest_loss is None or loss < progress.lowest_loss:
            progress.lowest_loss, progress.since_lowest = loss, 0
            return
        progress.since_lowest += 1
        if config.schedule == "plateau" and progress.since_lowest >= config.plateau:
            factor = jax.device_put(
                self.state.rate_factor * np.float32(config.factor), replicated(self.experiment.mesh)
            )
            self.state = dataclasses.replace(self.state, rate_factor=factor)
            progress.since_lowest = 0

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now
        self.waiting.tick()
        self.progress.waited, self.progress.stepped = self.waiting.waited, self.waiting.stepped

    def _save(self) -> None:
        self._tick()
        self.checkpoints.save(self.progress.step, unpack(self.state), dataclasses.asdict(self.progress))

    def _stop(self, received: list[int]) -> None:
        """Save and leave, if a signal wished so."""
        if not received:
            return
        number = received[0]
        if self.checkpoints.last_step != self.progress.step and self.progress.step:
            self._save()
        self.checkpoints.wait()
        self.writer.flush()
        name = signal.Signals(number).name
        raise InterruptedRunError(
            f"stopped by {name} at step {self.progress.step} of {self.steps}, all saved in {self.directory}; "
            "the same command goes on from there",
            number,
        )

    def _not_finite(self, step: int, values: dict[str, float], rows: np.ndarray) -> None:
        self.checkpoints.wait()
        ids = [str(name) for name in self.experiment.records.id[rows[rows >= 0]]]
        raise CxrError(
            f"the loss is {values['loss']} and the gradient's norm {values['gradient_norm']} at step {step}, "
            f"for records {', '.join(ids)}; {self._last_good()}. Look at those images and labels; "
            "else lower optimizer.rate, or set optimizer.clip=1, in another --workdir"
        )

    def _last_good(self) -> str:
        step = self.checkpoints.last_step
        folder = self.checkpoints.directory / "last" / str(step)
        return "no checkpoint was saved before" if step is None else f"the last good checkpoint is {folder}"

    def _label(self) -> str:
        epoch = min(self.progress.step // self.steps_per_epoch + 1, self.config.train.epochs)
        best = "" if self.progress.best is None else f", best {self.config.train.watch} {abs(self.progress.best):.3f}"
        return f"{self.config.data.size} px, epoch {epoch}/{self.config.train.epochs}{best}"

    def begin(self, profile: tuple[int, int] | None) -> None:
        """Say what is done already, and describe the run, unless it was when it ended."""
        step, file = self.progress.step, self.directory / "run.json"
        if not (self.finished and file.exists() and json.loads(file.read_text()).get("steps") == step):
            self.describe()
        if profile and profile[1] <= step:
            stderr.print(f"steps {profile[0]} to {profile[1]} are done already: nothing is traced")
        used, there = self.experiment.mesh.devices.size, len(devices())
        if used < there:
            stderr.print(f"{used} of {there} devices are used: config keys mesh.data, mesh.space", soft_wrap=True)
        if step:
            left = "nothing is left to train" if self.finished else f"goes on to step {self.steps}"
            stderr.print(f"{self.directory} has a checkpoint of step {step}: {left}", soft_wrap=True)

    def describe(self) -> None:
        """`run.json` and the split: everything needed to say again how the numbers came about."""
        experiment = self.experiment
        write_json(
            self.directory / "run.json",
            describe_run(experiment.mesh)
            | {
                "seed": self.config.seed,
                "identity": experiment.identity,
                "findings": list(experiment.findings),
                "parameters": parameter_count(experiment.network),
                "trainable parameters": parameter_count(experiment.trainable.split(experiment.network.params)[0]),
                "images": {name: len(part.row) for name, part in experiment.examples_by_split.items()},
                "steps": self.progress.step,
                "train_seconds": round(self.progress.seconds, 1),
                "data_wait": self.progress.data_wait,
            },
        )
        save_split(experiment.split, experiment.records, self.directory / "split.csv")


def _check_profile(steps: tuple[int, int] | None, total: int) -> None:
    if steps and steps[1] > total:
        raise CxrError(
            f"steps {steps[0]} to {steps[1]} cannot be profiled in a run of {total} steps: choose --profile "
            f"steps=A:B with B at most {total}"
        )


def check_watch(experiment: Experiment) -> None:
    """An AUROC that no validation label defines cannot choose a checkpoint: say so before training."""
    validation = experiment.examples("validation")
    label, label_mask = validation.label > 0.5, validation.label_mask
    defined = ((label & label_mask).any(0) & (~label & label_mask).any(0)).any()
    if experiment.config.train.watch == "val_auroc" and not defined:
        raise CxrError(
            f"val_auroc is undefined: no finding has both a positive and a negative among the {len(label)} "
            "validation images; use --config.train.watch=val_loss, or a larger validation part"
        )
