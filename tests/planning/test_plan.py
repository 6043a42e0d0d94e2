"""Plans: compiled for this machine's CPU devices in a target's place, and estimated."""

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
from cxrjax.planning.accelerators import TARGETS, Target, target_of
from cxrjax.planning.sweep import table

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.options.growth_rate=4", "model.options.block_config=(1, 1)", "model.options.stem_channels=4", "train.batch=4",
         "model.options.pooling=average")  # fmt: skip


@dataclass(frozen=True)
class Here(Target):
    """This machine's CPU devices, with a memory of our choice."""

    def devices(self, count):
        return jax.devices()[:count]


def here(memory=1 << 40):
    return Here("here", "CPU", memory, 1e12, 1e11, 1e10)


@pytest.fixture(autouse=True)
def _no_plans_of_other_days(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config():
    return configs.load("demo:32", [*SMALL])


def test_one_device(config):
    made = plan.plan(config, here())
    network = Network.from_model(create("densenet_small", classes=7, **config.model.options.to_dict()))
    numbers = parameter_count(network)
    assert made.optimizer == 8 * numbers + 4  # two moments, a count
    assert made.parameters == 4 * (numbers + sum(np.size(leaf) for leaf in jax.tree.leaves(network.stats)))
    assert made.inputs == 4 * (32 * 32 + 7 * 4 + 7 + 1 + 4)
    assert made.activations > 0
    assert made.compiled
    assert made.collectives == {}
    assert made.flops > 3 * 4 * 2 * 32 * 32 / 4 * 4 * 9  # more than the first layers'
    assert made.floor_s == max(made.compute_s, made.memory_s) > 0


def test_a_program_that_lies_in_the_memory_counts(config, monkeypatch):
    found = plan.needs
    monkeypatch.setattr(plan, "needs", lambda *given: dataclasses.replace(found(*given), program=10**9))
    made = plan.plan(config, here())
    without = dataclasses.replace(made, program=0)
    assert made.peak == without.peak + 10**9
    assert [[column.header for column in table([each]).columns if column.header == "program"]
            for each in (without, made)] == [[], ["program"]]  # fmt: skip
    row = {column.header: next(iter(column.cells)) for column in table([made]).columns}
    parts = sum(float(row[name]) for name in ("state, GB", "rest", "program"))
    assert float(row["peak"]) == pytest.approx(parts, abs=0.02)


@pytest.mark.parametrize(
    ("data", "space", "kinds"), [(2, 1, {"all-reduce"}), (1, 2, {"all-reduce", "collective-permute"})]
)
def test_several_devices_share_the_work(config, data, space, kinds):
    alone, shared = plan.plan(config, here()), plan.plan(config, here(), data=data, space=space)
    assert set(shared.collectives) == kinds
    assert shared.sent > 0
    assert shared.network_s == shared.sent / 1e10
    assert shared.flops == alone.flops / 2
    assert shared.activations < alone.activations


def test_the_largest_batch_is_the_largest_that_fits(config):
    nine = plan.plan(config, here(), batch=9)
    memory = int((nine.peak + nine.waiting) / plan.USABLE) + 1
    batch, made = plan.largest_batch(config, here(memory))
    fits = {each.batch: each.fits for each in made}
    assert fits[batch]
    assert not fits[batch + 1]
    assert batch >= 9
    assert plan.largest_batch(config, here(1))[0] == 0


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(bytes)`: XLA's compiler gives up where a step needs more, as it does for TPUs."""
    compiled = compiled_memory._of

    def set_room(room):
        def of(*given):
            found = compiled(*given)
            if found.temporary > room:
                raise jax.errors.JaxRuntimeError(
                    f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                    f"({found.temporary / 1024:.4f}K) exceeds available HBM ({room / 1024:.2f}K)."
                )
            return found

        monkeypatch.setattr(compiled_memory, "_of", of)

    return set_room


def test_a_step_that_the_compiler_refuses_does_not_fit(config, refusing):
    wanted = plan.plan(config, here(), batch=8)
    made = plan.plan(config, here(), batch=4)
    refusing(made.activations)
    config.optimizer.rate *= 2  # another program, not remembered
    refused = plan.plan(config, here(), batch=8)
    assert (refused.refused, refused.fits, refused.compiled, refused.known) == (True, False, True, False)
    assert refused.activations == pytest.approx(wanted.activations, rel=0.1)
    assert plan.plan(config, here(), batch=8) == refused  # remembered
    row = {column.header: next(iter(column.cells)) for column in table([refused]).columns}
    assert (row["fits"], row["reduce"], row["sent, GB"]) == ("no", "?", "?")


def test_the_largest_batch_is_found_where_the_compiler_refuses_larger_ones(config, refusing):
    nine = plan.plan(config, here(), batch=9)
    refusing(nine.activations + 1000)
    config.optimizer.rate *= 2
    batch, made = plan.largest_batch(config, here())
    assert batch == max(each.batch for each in made if each.fits)
    assert batch + 1 in {each.batch for each in made if each.refused}
    assert batch >= 8


@pytest.mark.parametrize("held", [lambda n: 5 * n, lambda n: 1e5 + n + n**1.5, lambda n: 1e6 + 3e3 * -(-n // 128)])
def test_few_plans_are_needed_for_the_largest_batch_of_small_images(config, held):
    whole = plan.estimate(config, here())

    def make(*_, batch, **__):
        return dataclasses.replace(whole, batch=batch, inputs=100 * batch, activations=int(held(batch)), memory=10**10)

    batch, made = plan.largest_batch(config, here(10**10), make, data=2)
    fits = {each.batch: each.fits for each in made}
    assert fits[batch]
    assert not fits[batch + 2]
    assert batch > 10**6
    assert len(made) < 25


def test_a_plan_that_cannot_be_remembered_is_made(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert plan.plan(config, here()).fits


@pytest.mark.parametrize("make", [plan.plan, plan.estimate])
def test_parts_of_a_batch_take_the_memory_of_one_and_gradients_that_are_added_up(config, make):
    one = make(config, here(), batch=2)
    config.train.per_device = 2
    made = make(config, here())
    assert (made.batch, made.parts, made.inputs) == (2, 2, 2 * one.inputs)
    parameters = made.optimizer // 2
    assert one.activations < made.activations < one.activations + 3 * parameters + 2 * made.inputs
    assert made.waiting == 4 * made.inputs
    assert made.left == made.memory - made.peak - made.waiting
    assert made.flops == 2 * one.flops
    assert 1.5 * one.moved <= made.moved <= 3 * one.moved
    config.train.per_device = 3
    with pytest.raises(CxrError, match=r"train\.batch = 4 is not a multiple of 3"):
        make(config, here())


def test_an_estimate_is_of_the_same_state(config):
    made, guessed = plan.plan(config, here(), batch=16), plan.estimate(config, here(), batch=16)
    assert not guessed.compiled
    assert (guessed.parameters, guessed.optimizer, guessed.inputs) == (made.parameters, made.optimizer, made.inputs)
    assert guessed.flops == made.flops


@pytest.mark.parametrize(
    ("network", "remat", "images"),
    [
        ("densenet121", "none", 4),
        ("densenet121", "layer", 4),
        ("resnet50", "block", 4),
        ("efficientnet_b3", "layer", 4),
    ],
)
def test_an_estimate_is_near_what_xlas_compiler_for_gpus_says(network, remat, images):
    """At 2048 px, where maps are nearly all of it: the table of docs/memory.md."""
    row = next(
        [cell.strip() for cell in line.split("|")[1:]]
        for line in (ROOT / "docs" / "memory.md").read_text().splitlines()
        if line.startswith(f"| h200 | {network} | 2048 | {remat} | {images} |")
    )
    config = configs.load("resolution:2048", [f"model.name={network}", f"model.remat={remat}"])
    guessed = plan.estimate(config, TARGETS["h200"], batch=images)
    assert guessed.peak / 1e9 == pytest.approx(float(row[5]), rel=0.08)


def test_the_papers_batch_fits_in_30_gb():
    """42 images of 2048 px at once, which took 39 GB on each of six devices; by XLA's compiler 25.29 GB (docs)."""
    few, many = (plan.estimate(configs.load("resolution:2048"), TARGETS["h200"], batch=n).peak for n in (4, 42))
    assert (many - few) / 38 < 0.70e9
    assert many < 30e9


def test_the_estimate_shares_maps_among_the_devices_and_counts_the_lanes_of_tpus():
    config = configs.load("demo:256", [*SMALL])
    one, rows, padded = (
        plan.estimate(config, TARGETS[device], space=space, batch=1).activations
        for device, space in (("h200", 1), ("h200", 4), ("v5e", 1))
    )
    assert 0.25 <= rows / one < 0.3  # gradients are whole on each
    assert 8 < padded / one < 128  # maps of 1 to 12 channels take the room of 128


@pytest.mark.parametrize(
    ("mesh", "said"),
    [({"data": 3}, "a batch of 4 images cannot be divided over mesh data=3: choose 3 or 6"),
     ({"space": 5}, "32 rows cannot be divided over mesh space=5: choose 30 or 35, or set mesh.space to 4 or 8")],
)  # fmt: skip
def test_meshes_that_do_not_divide(config, mesh, said):
    for make in (plan.plan, plan.estimate):
        with pytest.raises(CxrError, match=said):
            make(config, here(), **mesh)


def test_findings_of_any_data_set_must_be_named(config):
    with config.unlocked():
        config.data.dataset = "folder"
    with pytest.raises(CxrError, match=r"config\.data\.findings"):
        plan.estimate(config, here())


def test_the_verb_estimates_without_a_compiler(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "plan.json"
    words = ["plan", "--config", "demo:32", "--device", "v5e", "--estimate", "--json", str(file)]
    assert main([*words, *(f"--config.{word}" for word in SMALL)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "estimated" in printed
    assert "on TPUs the compiler says 0.6 to 1.9 times as much" in printed
    assert re.search(r"A device holds: parameters [\d.e-]+ GB, optimiser [\d.e-]+ GB, images .* GB, all else", printed)
    assert re.search(r"A step: [\d.e-]+ TFLOP; it takes at least", printed)
    [made] = json.loads(file.read_text())["plans"]
    assert made["fits"]
    assert made["memory"] == TARGETS["v5e"].memory


def test_a_sweep_has_every_combination(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "plan.json"
    words = ["plan", "--config", "demo:32", "--device", "v5e", "--estimate", "--json", str(file), "--sweep", "--sizes"]
    words += ["32", "64", "--meshes", "data=2", "space=4", "--remats", "none", "layer"]
    assert main([*words, *(f"--config.{word}" for word in SMALL)]) == 0
    made = json.loads(file.read_text())["plans"]
    assert [(each["size"], each["data"], each["space"], each["batch"], each["remat"]) for each in made] == [
        (size, data, space, data, remat)
        for size in (32, 64) for data, space in ((2, 1), (1, 4)) for remat in ("none", "layer")
    ]  # fmt: skip
    peak = {(each["size"], each["data"], each["remat"]): each["peak"] for each in made}
    assert peak[64, 1, "layer"] < peak[64, 1, "none"]
    assert len(re.findall(r"^ *(?:32|64) ", capsys.readouterr().out, re.MULTILINE)) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "-4"], "--batch -4 is not a positive number"),
        (["--batch", "0"], "--batch 0 is not a positive number"),
        (["--batch", "2147483648"], "a batch of 2147483648 images cannot be planned: choose at most 2147483647"),
        (["--config.train.batch=3000000000"], "a batch of 3000000000 images cannot be planned"),
        (["--sweep", "--batch", "2147483647", "--sizes", "32", "--meshes", "data=2"], "cannot be planned"),
        (["--largest", "--batch", "4"], "--largest finds the batch, and takes no --batch"),
        (["--mesh", "data=2,data=4"], "--mesh data=2,data=4 says data twice"),
        (["--config.data.size=2"], "config key data.size = 2 does not suit the network: choose data.size = 32"),
        (["--sizes", "64"], "--sizes is for --sweep"),
        (["--sweep", "--largest"], "--largest and --sweep"),
        (["--sweep", "--mesh", "data=2"], "--sweep takes --meshes"),
        (["--sweep", "--sizes", "34", "--meshes", "space=4"], "34 px, 1 x 4, none: 34 rows cannot be divided"),
    ],
)
def test_words_that_do_not_go_together(capsys, words, said, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["plan", "--config", "demo:32", "--device", "h200", "--estimate", *words]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_sweep_goes_on_where_one_combination_does_not_work(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = ["plan", "--config", "demo:32", "--device", "h200", "--estimate", "--sweep", "--sizes", "32", "34"]
    words += ["--meshes", "space=4", *(f"--config.{word}" for word in SMALL)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "34 px, 1 x 4, none: 34 rows cannot be divided" in printed
    assert re.search(r"^ *32 +1 x 4", printed, re.MULTILINE)


def test_the_mesh_is_the_configs_unless_given(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "plan.json"
    words = ["plan", "--config", "demo:32", "--device", "h200", "--estimate", "--json", str(file)]
    words += [f"--config.{word}" for word in (*SMALL, "mesh.data=2", "mesh.space=4")]
    for given, wanted in (([], (2, 4)), (["--mesh", "data=4"], (4, 1))):
        assert main([*words, *given]) == 0
        [made] = json.loads(file.read_text())["plans"]
        assert (made["data"], made["space"]) == wanted


def test_a_slice_that_is_too_large_is_named():
    with pytest.raises(CxrError, match="512 x v5e: the largest slice that is planned has 256 chips"):
        TARGETS["v5e"].devices(512)


def test_unknown_devices_are_named(capsys):
    assert main(["plan", "--config", "demo:32", "--device", "gtx"]) == 1
    assert "h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
     ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("cpu", None)],
)  # fmt: skip
def test_devices_that_are_here_are_known_by_what_jax_calls_them(kind, name):
    assert getattr(target_of(kind), "name", None) == name
