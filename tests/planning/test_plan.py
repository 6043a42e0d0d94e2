"""Plans: compiled with this machine's CPU devices in place of an accelerator, and estimated."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from cxrjax import config as configs
from cxrjax.cli.main import main
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network, parameter_count
from cxrjax.planning import compiled_memory, plan
from cxrjax.planning.accelerators import ACCELERATORS, Accelerator, find_accelerator
from cxrjax.planning.sweep import plan_table

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.options.growth_rate=4", "model.options.block_config=(1, 1)", "model.options.stem_channels=4",
         "train.batch_size=4", "model.options.pooling=average")  # fmt: skip


@dataclass(frozen=True)
class Cpu(Accelerator):
    """This machine's CPU devices, with a memory of our choice."""

    def devices(self, count):
        return jax.devices()[:count]


def cpu(memory=1 << 40):
    return Cpu("cpu", "CPU", memory, 1e12, 1e11, 1e10)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config():
    return configs.load_config("demo:32", [*SMALL])


def test_plan_of_one_device(config):
    planned = plan.compile_plan(config, cpu())
    network = Network.from_model(create("densenet_small", classes=7, **config.model.options.to_dict()))
    numbers = parameter_count(network)
    assert planned.optimizer == 8 * numbers + 4  # two moments, a count
    assert planned.parameters == 4 * (numbers + sum(np.size(leaf) for leaf in jax.tree.leaves(network.stats)))
    assert planned.inputs == 4 * (32 * 32 + 7 * 4 + 7 + 1 + 4)
    assert planned.activations > 0
    assert planned.compiled
    assert planned.collectives == {}
    assert planned.flops > 3 * 4 * 2 * 32 * 32 / 4 * 4 * 9  # more than the first layers'
    assert planned.floor_s == max(planned.compute_s, planned.memory_s) > 0


def test_a_program_in_device_memory_counts(config, monkeypatch):
    compile_memory = plan.compile_memory
    monkeypatch.setattr(plan, "compile_memory", lambda *args: dataclasses.replace(compile_memory(*args), program=10**9))
    planned = plan.compile_plan(config, cpu())
    without = dataclasses.replace(planned, program=0)
    assert planned.peak == without.peak + 10**9
    assert [[column.header for column in plan_table([entry]).columns if column.header == "program"]
            for entry in (without, planned)] == [[], ["program"]]  # fmt: skip
    row = {column.header: next(iter(column.cells)) for column in plan_table([planned]).columns}
    parts = sum(float(row[name]) for name in ("state, GB", "other", "program"))
    assert float(row["peak"]) == pytest.approx(parts, abs=0.02)


@pytest.mark.parametrize(
    ("data", "space", "kinds"), [(2, 1, {"all-reduce"}), (1, 2, {"all-reduce", "collective-permute"})]
)
def test_devices_share_the_work(config, data, space, kinds):
    alone, shared = plan.compile_plan(config, cpu()), plan.compile_plan(config, cpu(), data=data, space=space)
    assert set(shared.collectives) == kinds
    assert shared.bytes_sent > 0
    assert shared.network_s == shared.bytes_sent / 1e10
    assert shared.flops == alone.flops / 2
    assert shared.activations < alone.activations


def test_the_largest_batch_is_the_largest_that_fits(config):
    nine = plan.compile_plan(config, cpu(), batch_size=9)
    memory = int((nine.peak + nine.prefetched) / plan.USABLE_FRACTION) + 1
    batch, planned = plan.largest_batch(config, cpu(memory))
    fits = {entry.microbatch: entry.fits for entry in planned}
    assert fits[batch]
    assert not fits[batch + 1]
    assert batch >= 9
    assert plan.largest_batch(config, cpu(1))[0] == 0


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(bytes)`: XLA's compiler stops if a step needs more, as it does for TPUs."""
    analyze = compiled_memory._analyze

    def set_limit(limit):
        def checked(*args):
            memory = analyze(*args)
            if memory.temporary > limit:
                raise jax.errors.JaxRuntimeError(
                    f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                    f"({memory.temporary / 1024:.4f}K) exceeds available HBM ({limit / 1024:.2f}K)."
                )
            return memory

        monkeypatch.setattr(compiled_memory, "_analyze", checked)

    return set_limit


def test_a_step_that_exceeds_the_memory_does_not_fit(config, refusing):
    expected = plan.compile_plan(config, cpu(), batch_size=8)
    planned = plan.compile_plan(config, cpu(), batch_size=4)
    refusing(planned.activations)
    config.optimizer.learning_rate *= 2  # another program, not cached
    refused = plan.compile_plan(config, cpu(), batch_size=8)
    assert (refused.exceeded, refused.fits, refused.compiled, refused.traffic_known) == (True, False, True, False)
    assert refused.activations == pytest.approx(expected.activations, rel=0.1)
    assert plan.compile_plan(config, cpu(), batch_size=8) == refused  # from the cache
    row = {column.header: next(iter(column.cells)) for column in plan_table([refused]).columns}
    assert (row["fits"], row["all-reduce"], row["sent, GB"]) == ("no", "?", "?")


def test_the_largest_batch_is_found_if_the_compiler_stops_for_larger_ones(config, refusing):
    nine = plan.compile_plan(config, cpu(), batch_size=9)
    refusing(nine.activations + 1000)
    config.optimizer.learning_rate *= 2
    batch, planned = plan.largest_batch(config, cpu())
    assert batch == max(entry.microbatch for entry in planned if entry.fits)
    assert batch + 1 in {entry.microbatch for entry in planned if entry.exceeded}
    assert batch >= 8


@pytest.mark.parametrize("held", [lambda n: 5 * n, lambda n: 1e5 + n + n**1.5, lambda n: 1e6 + 3e3 * -(-n // 128)])
def test_few_plans_find_the_largest_batch_of_small_images(config, held):
    whole = plan.estimate_plan(config, cpu())

    def make(*_, batch_size, **__):
        return dataclasses.replace(
            whole, microbatch=batch_size, inputs=100 * batch_size, activations=int(held(batch_size)), memory=10**10
        )

    batch, planned = plan.largest_batch(config, cpu(10**10), make, data=2)
    fits = {entry.microbatch: entry.fits for entry in planned}
    assert fits[batch]
    assert not fits[batch + 2]
    assert batch > 10**6
    assert len(planned) < 25


def test_a_plan_without_a_writable_cache(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert plan.compile_plan(config, cpu()).fits


@pytest.mark.parametrize("make", [plan.compile_plan, plan.estimate_plan])
def test_accumulation_needs_one_microbatch_and_the_summed_gradients(config, make):
    one = make(config, cpu(), batch_size=2)
    config.train.per_device_batch_size = 2
    planned = make(config, cpu())
    assert (planned.microbatch, planned.accumulation_steps, planned.inputs) == (2, 2, 2 * one.inputs)
    parameters = planned.optimizer // 2
    assert one.activations < planned.activations < one.activations + 3 * parameters + 2 * planned.inputs
    assert planned.prefetched == 4 * planned.inputs
    assert planned.free == planned.memory - planned.peak - planned.prefetched
    assert planned.flops == 2 * one.flops
    assert 1.5 * one.bytes_accessed <= planned.bytes_accessed <= 3 * one.bytes_accessed
    config.train.per_device_batch_size = 3
    with pytest.raises(CxrError, match=r"train\.batch_size = 4 is not a multiple of 3"):
        make(config, cpu())


def test_an_estimate_has_the_same_state(config):
    planned, estimated = (
        plan.compile_plan(config, cpu(), batch_size=16),
        plan.estimate_plan(config, cpu(), batch_size=16),
    )
    assert not estimated.compiled
    assert (estimated.parameters, estimated.optimizer, estimated.inputs) == (
        planned.parameters,
        planned.optimizer,
        planned.inputs,
    )
    assert estimated.flops == planned.flops


@pytest.mark.parametrize(
    ("network", "remat", "images"),
    [
        ("densenet121", "none", 4),
        ("densenet121", "layer", 4),
        ("resnet50", "block", 4),
        ("efficientnet_b3", "layer", 4),
    ],
)
def test_an_estimate_is_near_xlas_figure_for_gpus(network, remat, images):
    """At 2048 px, where maps are nearly all of it: the table of docs/memory.md."""
    row = next(
        [cell.strip() for cell in line.split("|")[1:]]
        for line in (ROOT / "docs" / "memory.md").read_text().splitlines()
        if line.startswith(f"| h200 | {network} | 2048 | {remat} | {images} |")
    )
    config = configs.load_config("resolution:2048", [f"model.name={network}", f"model.remat={remat}"])
    estimated = plan.estimate_plan(config, ACCELERATORS["h200"], batch_size=images)
    assert estimated.peak / 1e9 == pytest.approx(float(row[5]), rel=0.08)


def test_the_papers_batch_fits_in_30_gb():
    """42 images of 2048 px at once, which took 39 GB on entry of six devices; by XLA's compiler 25.29 GB (docs)."""
    few, many = (
        plan.estimate_plan(configs.load_config("resolution:2048"), ACCELERATORS["h200"], batch_size=n).peak
        for n in (4, 42)
    )
    assert (many - few) / 38 < 0.70e9
    assert many < 30e9


def test_an_estimate_splits_maps_over_devices_and_pads_the_lanes_of_tpus():
    config = configs.load_config("demo:256", [*SMALL])
    one, rows, padded = (
        plan.estimate_plan(config, ACCELERATORS[device], space=space, batch_size=1).activations
        for device, space in (("h200", 1), ("h200", 4), ("v5e", 1))
    )
    assert 0.25 <= rows / one < 0.3  # gradients are whole on entry
    assert 8 < padded / one < 128  # maps of 1 to 12 channels take the room of 128


@pytest.mark.parametrize(
    ("mesh", "message"),
    [({"data": 3}, "a batch of 4 images cannot be divided over mesh data=3: choose 3 or 6"),
     ({"space": 5}, "32 rows cannot be divided over mesh space=5: choose 30 or 35, or set mesh.space to 4 or 8")],
)  # fmt: skip
def test_meshes_that_do_not_divide(config, mesh, message):
    for make in (plan.compile_plan, plan.estimate_plan):
        with pytest.raises(CxrError, match=message):
            make(config, cpu(), **mesh)


def test_findings_of_a_user_data_set_must_be_named(config):
    with config.unlocked():
        config.data.dataset = "folder"
    with pytest.raises(CxrError, match=r"config\.data\.findings"):
        plan.estimate_plan(config, cpu())


def test_the_command_estimates_without_a_compiler(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config", "demo:32", "--device", "v5e", "--estimate", "--json", str(file)]
    assert main([*arguments, *(f"--config.{override}" for override in SMALL)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "estimated" in printed
    assert "XLA's figures for TPUs are 0.6 to 1.9 times as high" in printed
    assert re.search(
        r"Memory of a device: parameters [\d.e-]+ GB, optimizer [\d.e-]+ GB, images .* GB, all else", printed
    )
    assert re.search(r"A step has [\d.e-]+ TFLOP and takes at least", printed)
    [planned] = json.loads(file.read_text())["plans"]
    assert planned["fits"]
    assert planned["memory"] == ACCELERATORS["v5e"].memory


def test_a_sweep_has_every_combination(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "plan.json"
    arguments = [
        "plan",
        "--config",
        "demo:32",
        "--device",
        "v5e",
        "--estimate",
        "--json",
        str(file),
        "--sweep",
        "--sizes",
    ]
    arguments += ["32", "64", "--meshes", "data=2", "space=4", "--remats", "none", "layer"]
    assert main([*arguments, *(f"--config.{override}" for override in SMALL)]) == 0
    planned = json.loads(file.read_text())["plans"]
    keys = ("size", "data", "space", "microbatch", "remat")
    assert [tuple(entry[key] for key in keys) for entry in planned] == [
        (size, data, space, data, remat)
        for size in (32, 64) for data, space in ((2, 1), (1, 4)) for remat in ("none", "layer")
    ]  # fmt: skip
    peak = {(entry["size"], entry["data"], entry["remat"]): entry["peak"] for entry in planned}
    assert peak[64, 1, "layer"] < peak[64, 1, "none"]
    assert len(re.findall(r"^ *(?:32|64) ", capsys.readouterr().out, re.MULTILINE)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "-4"], "--batch-size -4 is not a positive number"),
        (["--batch-size", "0"], "--batch-size 0 is not a positive number"),
        (["--batch-size", "2147483648"], "cannot plan a batch of 2147483648 images: choose at most 2147483647"),
        (["--config.train.batch_size=3000000000"], "cannot plan a batch of 3000000000 images"),
        (
            ["--sweep", "--batch-size", "2147483647", "--sizes", "32", "--meshes", "data=2"],
            "cannot plan a batch of 4294967294 images",
        ),
        (["--largest", "--batch-size", "4"], "--largest finds the batch size: leave out --batch-size"),
        (["--mesh", "data=2,data=4"], "--mesh data=2,data=4 has data twice"),
        (
            ["--config.data.image_size=2"],
            "config key data.image_size = 2 does not suit the network: choose data.image_size = 32",
        ),
        (["--sizes", "64"], "--sizes is for --sweep"),
        (["--sweep", "--largest"], "--largest and --sweep"),
        (["--sweep", "--mesh", "data=2"], "--sweep takes --meshes"),
        (["--sweep", "--sizes", "34", "--meshes", "space=4"], "34 px, 1 x 4, none: 34 rows cannot be divided"),
    ],
)
def test_options_that_exclude_each_other(capsys, arguments, message, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["plan", "--config", "demo:32", "--device", "h200", "--estimate", *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_sweep_skips_combinations_that_do_not_work(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    arguments = ["plan", "--config", "demo:32", "--device", "h200", "--estimate", "--sweep", "--sizes", "32", "34"]
    arguments += ["--meshes", "space=4", *(f"--config.{override}" for override in SMALL)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "34 px, 1 x 4, none: 34 rows cannot be divided" in printed
    assert re.search(r"^ *32 +1 x 4", printed, re.MULTILINE)


def test_the_mesh_defaults_to_that_of_the_config(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config", "demo:32", "--device", "h200", "--estimate", "--json", str(file)]
    arguments += [f"--config.{override}" for override in (*SMALL, "mesh.data=2", "mesh.space=4")]
    for given, expected in (([], (2, 4)), (["--mesh", "data=4"], (4, 1))):
        assert main([*arguments, *given]) == 0
        [planned] = json.loads(file.read_text())["plans"]
        assert (planned["data"], planned["space"]) == expected


def test_a_slice_that_is_too_large():
    with pytest.raises(CxrError, match="512 x v5e: the largest supported slice has 256 chips"):
        ACCELERATORS["v5e"].devices(512)


def test_an_unknown_device(capsys):
    assert main(["plan", "--config", "demo:32", "--device", "gtx"]) == 1
    assert "h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
     ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("cpu", None)],
)  # fmt: skip
def test_accelerators_are_found_by_jaxs_device_kind(kind, name):
    assert getattr(find_accelerator(kind), "name", None) == name
