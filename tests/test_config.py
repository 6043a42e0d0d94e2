import json

import pytest

from cxrjax import config as configs
from cxrjax.errors import CxrError


def write(path, body):
    path.write_text("from cxrjax.config import default\n\n\ndef get_config(arg=''):\n    config = default()\n" + body)
    return str(path)


def test_overrides_have_the_keys_type(tmp_path):
    recipe = write(tmp_path / "r.py", "    config.data.size = int(arg or 64)\n    return config\n")
    config = configs.load(
        f"{recipe}:128",
        [
            "--config.optimizer.rate=1",
            "model.name=123",
            "data.findings=('Mass','Nodule')",
            "data.views=PA",
            "model.options.growth_rate=8",
            "model.options.dense.growth_rate=4",
            "model.options.dense.block_config=(1, 2)",
        ],
    )
    assert config.data.size == 128
    assert config.optimizer.rate == 1.0
    assert isinstance(config.optimizer.rate, float)
    assert config.model.name == "123"
    assert config.data.findings == ("Mass", "Nodule")
    assert config.data.views == ("PA",)
    assert config.model.options.growth_rate == 8
    assert config.model.options.dense.to_dict() == {"growth_rate": 4, "block_config": (1, 2)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.rate=1", "did you mean optimizer.rate"),
        ("train.epoch=1", "did you mean train.epochs"),
        ("train.epochs=many", "train.epochs takes a value of type int"),
        ("optimizer.schedule=cosin", "did you mean cosine"),
        ("train.epochs=0", "must be at least 1"),
        ("train.patience=-1", "must be at least 0"),
        ("optimizer.clip=-1", "must be at least 0"),
        ("optimizer.warmup=2", "at most 1"),
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
        configs.load(recipe, [override])


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
        configs.load(write(tmp_path / "r.py", body))


def test_missing_recipe_names_those_there_are():
    with pytest.raises(CxrError, match="recipes that come with the project"):
        configs.load("nowhere.py")


def test_a_run_reads_back_what_it_wrote(tmp_path):
    config = configs.load(
        write(tmp_path / "r.py", "    return config\n"),
        ["model.options.block_config=(2, 2)", "model.options.dense.block_config=(1, 1)"],
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert configs.flatten(configs.read(tmp_path / "config.json")) == configs.flatten(config)
    (tmp_path / "config.json").write_text('{"seed":')
    with pytest.raises(CxrError, match="not JSON"):
        configs.read(tmp_path / "config.json")
