"""What the pages say can be typed."""

import re
from pathlib import Path

import pytest

from cxrjax import config as configs
from cxrjax.cli.main import make_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SYSTEMS = ("fhrnet", "transfer", "resolution", "attention_fusion", "sequential_cnn")


def sections() -> dict[str, str]:
    """Of docs/reproducing.md, by system."""
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    return {name: re.split(r"\n## ", text.split(f"(`{name}`)")[1])[0] for name in SYSTEMS}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_other_readings_are_keys_of_the_recipe(system):
    config = configs.load_config(system)
    spans = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=([^`]*))?`", sections()[system])
    assert spans
    known = configs.flatten(config)
    for key, value in spans:
        assert key in known or key.startswith(("model.options.", "loss.options.")), key
        if value:
            configs.with_overrides(config, [f"{key}={value}"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_recipes_with_arguments_exist(system):
    for argument in re.findall(rf"`{system}:([^`]+)`", sections()[system]):
        configs.load_config(f"{system}:{argument}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    """Every `cxrjax` line of the code blocks, up to a comment."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip().removeprefix("uv run ") for block in blocks for line in block.splitlines()]
    for line in lines:
        if line.startswith("cxrjax "):
            words = line.replace("$size", "256").replace("$name", "densenet121").split()[1:]
            _, rest = make_parser().parse_known_args(words)
            assert all(word.startswith("--config.") for word in rest), line
