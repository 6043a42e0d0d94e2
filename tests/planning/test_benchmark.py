"""The benchmark: its measurements of a small network, and the packages that it needs."""

import json
import subprocess
import sys

import pytest

from cxrjax.cli.main import main
from cxrjax.config import load_config
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network, parameter_count
from cxrjax.planning import benchmark

ABSENT = ("grain", "tensorflow_datasets", "array_record", "clu", "ml_collections", "tensorboardX", "pyarrow", "sklearn")


@pytest.mark.slow
def test_the_command_measures_training_and_inference(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = ["bench", "simple_cnn:32:4", "densenet_small:8:1", "--dtypes", "float32", "--steps", "2"]
    assert main([*arguments, "--json", str(file)]) == 1  # one case fails, the other is kept
    good, bad = json.loads(file.read_text())
    assert (good["arch"], good["resolution"], good["batch"], good["variant"]) == (
        "simple_cnn", 32, 4, "float32, remat none",
    )  # fmt: skip
    for what in ("train", "infer"):
        assert good[f"{what}_images_per_s"] == pytest.approx(4 / good[f"{what}_s"])
        assert 0 < good[f"{what}_dispatch_ms"] / 1e3 <= good[f"{what}_s"]
    parameters = 4 * parameter_count(Network.from_model(create("simple_cnn", classes=benchmark.FINDINGS)))
    assert good["train_planned_bytes"] > 3 * parameters  # themselves and two moments
    assert 0.3 < good["loss"] < 1.2
    assert "batch norm cannot train on one value" in bad["error"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "planned" in printed
    assert "densenet_small at 8 px, 1 images, float32, remat none: batch norm" in printed


def test_a_failed_inference_keeps_the_training(monkeypatch):
    case = benchmark.Case("simple_cnn", 32, 4)
    monkeypatch.setattr(benchmark, "_run_case", lambda case: {"error": "gone"} if case.inference else {"train_s": 2.0})
    [row] = benchmark.run_cases([case])
    assert (row["train_s"], row["infer_error"], "error" in row) == (2.0, "gone", False)
    assert benchmark.failures([row]) == {"simple_cnn at 32 px, 4 images, bfloat16, remat none, inference": "gone"}


def test_it_needs_few_packages():
    program = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from cxrjax.planning import benchmark; {{}}"
    case = benchmark.Case("simple_cnn", 32, 2, dtype="float32", inference=True, steps=1)
    line = program.format(f"import json; print(json.dumps(benchmark.measure(benchmark.{case!r})))")
    result = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["infer_s"] > 0


@pytest.mark.parametrize("spec", ["densenet121", "densenet121:0:4", "densenet121:64:4:4", "a b:64:4"])
def test_malformed_cases(spec):
    with pytest.raises(CxrError, match="ARCH:SIZE:BATCH"):
        benchmark.parse_cases([spec], ["float32"], ["none"], steps=3)


def test_every_combination_is_a_case():
    cases = benchmark.parse_cases(
        ["resnet18:64:4", "resnet50:32:2"], ["bfloat16", "float32"], ["none", "layer"], steps=7
    )
    assert len({(case.arch, case.dtype, case.remat) for case in cases}) == len(cases) == 8
    assert {case.steps for case in cases} == {7}


@pytest.mark.slow
def test_a_recipe_runs_on_its_mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    file = tmp_path / "bench.json"
    arguments = ["bench", "--config", "demo:32", "--steps", "1", "--no-inference", "--json", str(file)]
    small = (
        "model.options.growth_rate=4",
        "model.options.block_config=(1, 1)",
        "mesh.data=2",
        "mesh.space=2",
        "train.batch_size=4",
    )
    assert main([*arguments, *(f"--config.{override}" for override in small)]) == 0
    [row] = json.loads(file.read_text())
    assert (row["arch"], row["resolution"], row["batch"], row["data"], row["space"]) == ("densenet_small", 32, 4, 2, 2)
    assert row["train_s"] > 0


def test_a_recipe_is_a_case():
    config = load_config("resolution:2048", ["train.per_device_batch_size=7", "mesh.data=6"])
    assert benchmark.Case.from_config(config, 5) == benchmark.Case(
        "densenet121", 2048, 42, "bfloat16", "layer", steps=5, data=6, space=1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ARCH:SIZE:BATCH"),
        (["--config", "demo:32", "--mesh", "data=2"], "--mesh apply to ARCH:SIZE:BATCH"),
        (
            ["--config", "demo:32", "--config.train.per_device_batch_size=2", "--config.mesh.data=0"],
            "train.per_device_batch_size needs",
        ),
        (["simple_cnn:32:4", "--steps", "0"], "--steps 0: must be at least 1"),
        (["simple_cnn:2:4", "--steps", "1"], "nothing could be measured"),
        (["nonsense:32:4"], "unknown network 'nonsense': did you mean"),
    ],
)
def test_cases_that_cannot_be_measured(capsys, arguments, message):
    assert main(["bench", *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_mesh_that_does_not_divide():
    with pytest.raises(CxrError, match="32 rows cannot be divided over mesh space=3"):
        benchmark.measure(benchmark.Case("simple_cnn", 32, 2, space=3))
