import json

import pytest

from cxrjax import config as configs
from cxrjax.cli.main import main
from cxrjax.config_keys import KEYS, Key
from cxrjax.errors import CxrError


def write(path, body):
    path.write_text("from cxrjax.config import default\n\n\ndef get_config(arg=''):\n    config = default()\n" + body)
    return str(path)


def test_overrides_have_the_keys_type(tmp_path):
    recipe = write(tmp_path / "r.py", "    config.data.image_size = int(arg or 64)\n    return config\n")
    config = configs.load_config(
        f"{recipe}:128",
        [
            "--config.optimizer.learning_rate=1",
            "model.name=123",
            "data.findings=('Mass','Nodule')",
            "data.views=PA,AP",
            "split.fractions=0.5,0.25,0.25",
            "train.stages.head.optimizer.learning_rate=1",
            "labels.per_finding.Pleural Effusion.uncertain=ones",
            "data.mixture.chestxray14.split.name=official",
            "model.options.growth_rate=8",
            "model.options.dense.growth_rate=4",
            "model.options.dense.block_config=(1, 2)",
        ],
    )
    assert config.data.image_size == 128
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.model.name == "123"
    assert config.data.findings == ("Mass", "Nodule")
    assert config.data.views == ("PA", "AP")
    assert config.split.fractions == (0.5, 0.25, 0.25)
    assert config.train.stages.to_dict() == {"head": {"optimizer": {"learning_rate": 1.0}}}
    assert isinstance(config.train.stages.head.optimizer.learning_rate, float)
    assert config.labels.per_finding["Pleural Effusion"].uncertain == "ones"
    assert config.data.mixture.chestxray14.split.name == "official"
    assert config.model.options.growth_rate == 8
    assert config.model.options.dense.to_dict() == {"growth_rate": 4, "block_config": (1, 2)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rate=1", "did you mean optimizer.learning_rate"),
        ("train.epoch=1", "did you mean train.epochs"),
        ("train.epochs=many", "train.epochs takes a value of type int"),
        ("train.epochs=None", "train.epochs takes a value of type int, not None"),
        ("train.epochs=1.5", "type int, not 1.5"),
        ("seed=True", "type int, not True"),
        ("data.views=(1, 2)", "data.views takes a value of type tuple of str"),
        ("split.fractions=(0.5, 'x')", "tuple of float"),
        ("optimizer.learning_rate=nan", "type float"),
        ("model.options.x=None", "model.options.x is None"),
        ("train.stages.head.train.epoch=1", "did you mean train.stages.head.train.epochs"),
        ("train.stages.head.train.epochs=0", "must be at least 1"),
        ("train.stages.head.model.init_from=x", "unknown config key"),
        ("train.stages=(1,)", "holds keys"),
        ("data.mixture.mimic_cxr_jpg.model.name=x", "unknown config key"),
        ("labels.per_finding.Mass.uncertain=one", "did you mean ones"),
        ("optimizer.lr_multipliers.backbone=0", "must be at least"),
        ("optimizer.schedule=cosin", "did you mean cosine"),
        ("train.epochs=0", "must be at least 1"),
        ("train.early_stopping_patience=-1", "must be at least 0"),
        ("optimizer.grad_clip_norm=-1", "must be at least 0"),
        ("optimizer.warmup_fraction=2", "at most 1"),
        ("model.dtype=float64", "must be one of"),
        ("seed", "has no value"),
        ("model.name.x=1", "unknown config key model.name.x"),
        ("model.options.growth_rate.x=1", "inside model.options.growth_rate, which is 4 and holds no keys"),
        ("model.options.dense=4", r"model.options.dense holds keys \(growth_rate\)"),
    ],
)
def test_bad_override(tmp_path, override, message):
    recipe = write(
        tmp_path / "r.py",
        "    config.model.options.growth_rate, config.model.options.dense = 4, {'growth_rate': 8}\n    return config\n",
    )
    with pytest.raises(CxrError, match=message):
        configs.load_config(recipe, [override])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    config.train.epoch = 3\n    return config\n", r"r\.py: .*epoch"),
        ("    config.train.epochs = 'x'\n    return config\n", r"r\.py"),
        ("    config.unlock()\n    config.train.epoch = 3\n    return config\n", "did you mean train.epochs"),
        ("    return 3\n", "not a ConfigDict"),
        ("    from ml_collections import ConfigDict\n    return ConfigDict({'seed': 1})\n", "lacks"),
        ("    return config +\n", r"r\.py"),
    ],
)
def test_bad_recipe(tmp_path, body, message):
    with pytest.raises(CxrError, match=message):
        configs.load_config(write(tmp_path / "r.py", body))


def test_missing_recipe_names_those_there_are():
    with pytest.raises(CxrError, match="the recipes of the project are"):
        configs.load_config("nowhere.py")


def test_a_run_reads_back_what_it_wrote(tmp_path):
    config = configs.load_config(
        write(tmp_path / "r.py", "    return config\n"),
        ["model.options.block_config=(2, 2)", "model.options.dense.block_config=(1, 1)"],
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert configs.flatten(configs.read_config(tmp_path / "config.json")) == configs.flatten(config)
    (tmp_path / "config.json").write_text('{"seed":')
    with pytest.raises(CxrError, match="not JSON"):
        configs.read_config(tmp_path / "config.json")


def test_overrides_may_be_two_arguments():
    overrides, rest = configs.split_overrides(["train", "--config.seed", "3", "--config", "demo", "--config.title=a b"])
    assert overrides == ["--config.seed=3", "--config.title=a b"]
    assert rest == ["train", "--config", "demo"]


@pytest.mark.parametrize("value", [None, float("nan"), "x", (1,), True])
@pytest.mark.parametrize("name", ["seed", "optimizer.learning_rate", "data.views", "train.stages.a.train.epochs"])
def test_recipes_cannot_set_a_wrong_value(tmp_path, name, value):
    """Also where ml_collections would take it: None, NaN, and anything inside a tuple or a group."""
    if name == "data.views" and value == "x":
        value = ("PA", 3)
    changes: dict = {}
    node = changes
    *groups, leaf = name.split(".")
    for group in groups:
        node = node.setdefault(group, {})
    node[leaf] = value
    with pytest.raises(CxrError, match=f"config key {name} takes a value of type"):
        configs.with_changes(configs.default(), changes)


def test_every_key_accepts_its_default():
    for name, key in KEYS.items():
        if isinstance(key, Key):
            assert key.meaning
            assert key.check(name, key.default) == key.default


def test_the_command_prints_every_key_with_its_meaning(capsys):
    assert main(["config", "fhrnet:phantom", "--config.train.epochs", "7"]) == 0
    output = capsys.readouterr().out
    for name, key in KEYS.items():
        assert any(name in line and key.meaning in line for line in output.splitlines()), name
    assert "* train.epochs = 7" in output
    assert "* train.stages.stage2_local.model.options.stage = 'local'" in output
