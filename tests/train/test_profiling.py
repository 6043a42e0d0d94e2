"""The data wait and traces of a run, and that steps never make the devices wait for the host."""

import gzip
import json
import time

import jax
import pytest
from jax._src.array import ArrayImpl

from cxrjax.cli.main import main
from cxrjax.data import pipeline
from cxrjax.errors import CxrError
from cxrjax.train import loop
from cxrjax.train.monitoring import read_metrics

STEP = 0.05
"""Artificial duration of a step in seconds, long enough that a busy machine changes little."""


def slow_down(monkeypatch, *, loading: float, threads: float = 0) -> None:
    """Make each step `STEP` seconds longer, as a busy device would.

    Each batch arrives `loading` seconds late, or keeps its loading thread busy for `threads` seconds more.
    """
    batches, load, settle = loop.training_batches, pipeline._load, loop._Trainer._drain_metrics

    def late(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            time.sleep(loading)
            yield batch

    def long(*args):
        time.sleep(threads)
        return load(*args)

    def slow(self, **keep):
        time.sleep(STEP)
        settle(self, **keep)

    monkeypatch.setattr(loop, "training_batches", late)
    monkeypatch.setattr(pipeline, "_load", long)
    monkeypatch.setattr(loop._Trainer, "_drain_metrics", slow)


def test_a_fast_loader_causes_no_wait(tiny, tmp_path, monkeypatch):
    """If batches were not loaded concurrently, 0.6 of a step would be a fraction of 0.37."""
    slow_down(monkeypatch, loading=0, threads=0.6 * STEP)
    progress = loop.train(tiny("train.epochs=2", "train.steps_per_epoch=8"), tmp_path)
    assert progress.data_wait_fraction is not None
    assert progress.data_wait_fraction < 0.2


def test_a_slow_loader_is_reported_everywhere(tiny_overrides, tmp_path, monkeypatch, capsys):
    """The loader sleeps four times as long as the step: a fraction of about 0.8, or less on a busy machine."""
    slow_down(monkeypatch, loading=4 * STEP)
    arguments = [f"--config.{override}" for override in (*tiny_overrides, "train.epochs=2")]
    assert main(["train", "--config", "demo:32", "--workdir", str(tmp_path), *arguments]) == 0
    fractions = [row["data_wait_fraction"] for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    whole = json.loads((tmp_path / "run.json").read_text())["data_wait_fraction"]
    assert len(fractions) == 2
    for fraction in (*fractions, whole):
        assert 0.4 < fraction < 0.95
    assert f"{whole:.1%} of the time waiting for data" in capsys.readouterr().out


class LaggedMetric:
    """A metric that records, when read, how many steps were dispatched after its own."""

    def __init__(self, value, own, given, lags):
        self.value, self.own, self.given, self.lags = value, own, given, lags

    def __float__(self):
        self.lags[self.own] = len(self.given) - self.own
        return float(self.value)


def test_the_host_stays_two_steps_behind_without_transfers(tiny, tmp_path, monkeypatch):
    given, lags, make = [], {}, loop.make_train_step

    def watched(*args, **kwargs):
        step = make(*args, **kwargs)

        def watching(state, batch):
            with jax.transfer_guard("disallow"):  # all arguments of the step are on the devices
                state, metrics = step(state, batch)
            given.append(None)
            return state, {name: LaggedMetric(value, len(given), given, lags) for name, value in metrics.items()}

        return watching

    monkeypatch.setattr(loop, "make_train_step", watched)
    loop.train(tiny("train.epochs=2", "train.steps_per_epoch=6"), tmp_path)
    assert lags == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1, 6: 0, 7: 2, 8: 2, 9: 2, 10: 2, 11: 1, 12: 0}


def test_two_batches_are_prefetched_before_each_step(tiny, tmp_path, monkeypatch):
    put_batch, make, placed, when_given = loop.put_batch, loop.make_train_step, [], []

    def counted(*args):
        placed.append(None)
        return put_batch(*args)

    def watched(*args, **kwargs):
        step = make(*args, **kwargs)

        def watching(state, batch):
            when_given.append(len(placed))
            return step(state, batch)

        return watching

    monkeypatch.setattr(loop, "put_batch", counted)
    monkeypatch.setattr(loop, "make_train_step", watched)
    loop.train(tiny("train.epochs=1", "train.steps_per_epoch=6"), tmp_path)
    assert when_given == [3, 4, 5, 6, 7, 8]


WAITS = {
    "none": None,
    "block": lambda x: jax.block_until_ready(x),
    "get": lambda x: jax.device_get(x),
    "number": int,
    "method": lambda x: x.block_until_ready(),
}


@pytest.mark.parametrize("fault", WAITS)
def test_no_step_is_awaited_before_the_next_is_dispatched(tiny, tmp_path, monkeypatch, fault):
    """Record whatever reads a state, or waits for it, before the next step; injected faults must be seen."""
    steps, make, given, state_now, waited = 5, loop.make_train_step, [], [], []

    def note(arrays):
        ours = {id(leaf) for leaf in state_now}
        if len(given) < steps and any(id(leaf) in ours for leaf in jax.tree.leaves(arrays)):
            waited.append(len(given))

    def noting(function):
        def noted(arrays, *rest):
            note(arrays)
            return function(arrays, *rest)

        return noted

    read = ArrayImpl._value.fget
    monkeypatch.setattr(ArrayImpl, "_value", property(noting(read)))
    monkeypatch.setattr(ArrayImpl, "__array__", noting(ArrayImpl.__array__))
    monkeypatch.setattr(ArrayImpl, "block_until_ready", noting(ArrayImpl.block_until_ready))
    monkeypatch.setattr(jax, "device_get", noting(jax.device_get))
    monkeypatch.setattr(jax, "block_until_ready", noting(jax.block_until_ready))

    def watched(*args, **kwargs):
        step = make(*args, **kwargs)

        def watching(state, batch):
            state, metrics = step(state, batch)
            given.append(None)
            state_now[:] = jax.tree.leaves(state)
            if wait := WAITS[fault]:
                wait(state.step)
            return state, metrics

        return watching

    monkeypatch.setattr(loop, "make_train_step", watched)
    loop.train(tiny("train.epochs=1", f"train.steps_per_epoch={steps}"), tmp_path)
    assert len(given) == steps
    assert sorted(set(waited)) == ([] if fault == "none" else [1, 2, 3, 4])


def test_a_trace_contains_the_requested_steps(tiny_overrides, tmp_path, capsys):
    arguments = [
        "train",
        "--config",
        "demo:32",
        "--workdir",
        str(tmp_path),
        *(f"--config.{override}" for override in tiny_overrides),
    ]
    assert main([*arguments, "--profile", "steps=6:7"]) == 0, capsys.readouterr().err
    (device_trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")  # what TensorBoard reads
    assert b"train" in device_trace.read_bytes()
    (perfetto,) = tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"6", "7"}
    assert any("jit_step" in str(event) for event in events)


def test_completed_steps_are_not_traced(tiny, tmp_path, capsys):
    steady = ("optimizer.schedule=constant", "optimizer.warmup_fraction=0")
    loop.train(tiny(*steady, "train.epochs=1"), tmp_path)
    loop.train(tiny(*steady, "train.epochs=2"), tmp_path, profile=(2, 4))
    assert "steps 2 to 4 are already done: nothing is traced" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10:15", "is not steps=A:B"),
        ("steps=3", "is not steps=A:B"),
        ("steps=7:6", "A must not be above B"),
        ("steps=0:6", "count from 1"),
    ],
)
def test_bad_profile_steps_are_refused(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", "demo:32", "--workdir", str(tmp_path), "--profile", text])
    assert message in capsys.readouterr().err


def test_profile_steps_beyond_the_run_are_refused(tiny, tmp_path):
    with pytest.raises(CxrError, match="steps 10 to 13 cannot be profiled in a run of 12 steps"):
        loop.train(tiny(), tmp_path, profile=(10, 13))
    assert not list(tmp_path.iterdir())
