"""Runs that start from other runs or from converted weights, and runs in stages."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cxrjax import config as configs
from cxrjax.errors import CxrError
from cxrjax.inference.load_run import load_model
from cxrjax.train.experiment import Experiment
from cxrjax.train.loop import train
from cxrjax.train.monitoring import read_metrics
from cxrjax.train.stages import train_stages


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_overrides):
    directory = tmp_path_factory.mktemp("runs") / "first"
    train(configs.load_config("demo:32", [*tiny_overrides, "train.epochs=1"]), directory)
    return directory


def flat(network):
    params = flatten_dict(network.params) | flatten_dict(network.stats)
    return {".".join(map(str, path)): np.asarray(array) for path, array in params.items()}


def test_a_run_starts_from_the_best_network_of_another(first, tiny):
    start = flat(Experiment.open(tiny(f"model.init_from={first}", "seed=5")).init_network)
    best = flat(load_model(first).network)
    assert start.keys() == best.keys()
    for name, array in best.items():
        np.testing.assert_array_equal(start[name], array, err_msg=name)


def test_other_findings_get_a_fresh_output(first, tiny, capsys):
    experiment = Experiment.open(tiny(f"model.init_from={first}", "data.findings=('Mass','Nodule')", "seed=5"))
    start, best = flat(experiment.init_network), flat(load_model(first).network)
    findings = load_model(first).findings
    columns = [findings.index("Mass"), findings.index("Nodule")]
    np.testing.assert_array_equal(start["classifier.output.kernel"], best["classifier.output.kernel"][:, columns])
    np.testing.assert_array_equal(start["conv0.kernel"], best["conv0.kernel"])
    assert "Mass, Nodule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.options.growth_rate=8", "does not fit the network"),
        ("model.input_spec=unit", "set --config.model.input_spec=grey"),
        ("model.init_from=nowhere", "nowhere/card.json is missing"),
        ("model.init_members.dense=DIR", "model.init_from and model.init_members are both set"),
    ],
)
def test_what_does_not_fit_is_named(first, tiny, override, message):
    with pytest.raises(CxrError, match=message):
        _ = Experiment.open(tiny(f"model.init_from={first}", override.replace("DIR", str(first)))).identity


def test_members_are_those_of_the_network(first, tiny):
    with pytest.raises(CxrError, match="names dense; the members of this network are: none"):
        _ = Experiment.open(tiny(f"model.init_members.dense={first}")).identity


def test_a_run_is_bound_to_what_it_started_from(first, tiny, tmp_path):
    config = tiny(f"model.init_from={first}", "train.epochs=1")
    train(config, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["identity"]["initial weights"]
    other = tiny(f"model.init_from={tmp_path / 'a'}", "train.epochs=1")
    with pytest.raises(CxrError, match="initial weights"):
        train(other, tmp_path / "a")


def test_a_run_that_started_from_weights_cannot_go_on_from_nothing(first, tiny, tmp_path):
    train(tiny(f"model.init_from={first}", "train.epochs=1"), tmp_path / "a")
    with pytest.raises(CxrError, match="another initial weights"):
        train(tiny("train.epochs=1"), tmp_path / "a")


RESUMED = ("optimizer.schedule=constant", "optimizer.warmup_fraction=0")


def parameters(directory):
    return flat(load_model(directory).network)


def test_a_relative_start_holds_in_any_working_directory(first, tiny, tmp_path, monkeypatch):
    shutil.copytree(first, tmp_path / "here" / "start")
    monkeypatch.chdir(tmp_path / "here")
    train_stages(tiny("model.init_from=start", "train.epochs=1", *RESUMED), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["init_from"]
    assert stored == str(tmp_path / "here" / "start")
    monkeypatch.chdir(tmp_path)
    config = tiny("model.init_from=start", "train.epochs=2", *RESUMED)
    assert train_stages(config, tmp_path / "run").step == 8
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["init_from"] == stored
    train_stages(tiny(f"model.init_from={first}", "train.epochs=2", *RESUMED), tmp_path / "whole")
    for name, array in parameters(tmp_path / "whole").items():
        np.testing.assert_array_equal(parameters(tmp_path / "run")[name], array)
    with pytest.raises(CxrError, match=r"other/card\.json is missing"):
        train_stages(tiny("model.init_from=other", "train.epochs=2", *RESUMED), tmp_path / "run")


def test_a_start_that_vanished_does_not_stop_a_resume_but_a_beginning(first, tiny, tmp_path, capsys):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(first, start)
    train_stages(tiny(f"model.init_from={start}", "train.epochs=1", *RESUMED), run)
    mark = json.loads((run / "run.json").read_text())["identity"]["initial weights"]
    shutil.rmtree(start)
    config = tiny(f"model.init_from={start}", "train.epochs=2", *RESUMED)
    assert train_stages(config, run).step == 8
    assert f"{start}, which this run started from, no longer exists" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["identity"]["initial weights"] == mark
    with pytest.raises(CxrError, match=r"start/card\.json is missing"):
        train_stages(config, tmp_path / "another")


def test_a_stage_that_is_gone_is_not_trained_again_once_the_next_began(tiny, tmp_path):
    rates = ("train.stages.a.optimizer.learning_rate=1e-3", "train.stages.b.optimizer.learning_rate=1e-4")
    config = tiny(*rates, "train.epochs=1", *RESUMED)
    train_stages(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages")
    longer = tiny(*rates, "train.stages.a.train.epochs=1", "train.epochs=2", *RESUMED)
    assert train_stages(longer, tmp_path / "run").step == 8
    assert not (tmp_path / "run" / "stages").exists()


def test_what_stays_random_cannot_be_frozen(first, tiny):
    config = tiny(f"model.init_from={first}", "data.findings=('Mass',)", "model.options.hidden=3")
    assert Experiment.open(config).identity["initial weights"]
    with pytest.raises(CxrError, match="would freeze classifier, which"):
        _ = Experiment.open(configs.with_overrides(config, ["train.freeze=classifier"])).identity


def test_options_that_differ_without_differing_shapes_are_said(first, tiny, capsys):
    _ = Experiment.open(tiny(f"model.init_from={first}", "model.options.stem_pool=none")).init_network
    assert "option stem_pool is none here, and was 2x2 there" in capsys.readouterr().out


def test_a_directory_may_have_any_name(first, tiny, tmp_path):
    (tmp_path / "lr=0.1, a").symlink_to(first)
    start = Experiment.open(tiny(f"model.init_from={tmp_path}/lr=0.1, a")).init_network
    np.testing.assert_array_equal(flat(start)["conv0.kernel"], flat(load_model(first).network)["conv0.kernel"])


def test_stages_are_runs_in_a_row(tiny, tmp_path):
    head = {"train": {"freeze": ("backbone",), "epochs": 2}, "optimizer": {"learning_rate": 1e-3}}
    stages = {"stage1_head": head, "stage2_all": {"optimizer": {"learning_rate": 1e-4}}}
    constant = ("optimizer.schedule=constant", "optimizer.warmup_fraction=0")
    config = tiny(f"train.stages={stages}", "train.epochs=1", *constant)
    progress = train_stages(config, tmp_path / "run")
    assert progress.step == 4
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in row]
    np.testing.assert_allclose(rates, 1e-4, rtol=1e-5)
    head = flat(load_model(tmp_path / "run" / "stages" / "1").network)
    fresh, whole = flat(Experiment.open(config).network), flat(load_model(tmp_path / "run").network)
    for name, array in head.items():
        assert np.array_equal(array, fresh[name]) == (not name.startswith("classifier.")), name
        assert not np.array_equal(array, whole[name]), name

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("metrics.jsonl")}
    train_stages(config, tmp_path / "run")  # all is done: nothing is done again
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_a_stage_with_an_unknown_key_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(CxrError, match=r"did you mean train\.stages\.a\.train\.freeze"):
        train_stages(tiny("train.stages={'a': {'train': {'freez': ('backbone',)}}}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_starts_where_the_one_before_ended(tiny, tmp_path):
    with pytest.raises(CxrError, match=r"unknown config key train\.stages\.a\.model\.init_from"):
        train_stages(tiny("train.stages={'a': {'model': {'init_from': 'x'}}}"), tmp_path / "run")


def test_the_random_start_is_the_network_itself(tiny):
    experiment = Experiment.open(tiny())
    jax.tree.map(np.testing.assert_array_equal, experiment.init_network, experiment.network)
