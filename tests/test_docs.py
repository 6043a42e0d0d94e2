"""Commands, config keys and file names in README and docs are right."""

import re
import sys
from pathlib import Path

import pytest

from cxrjax import config as configs
from cxrjax.cli.main import make_parser
from cxrjax.config_keys import KEYS, find_group

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SYSTEMS = ("fhrnet", "transfer", "resolution", "attention_fusion", "sequential_cnn")


def sections() -> dict[str, str]:
    """The sections of docs/reproducing.md by system."""
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    return {name: re.split(r"\n## ", text.split(f"(`{name}`)")[1])[0] for name in SYSTEMS}


@pytest.mark.parametrize("system", SYSTEMS)
def test_other_readings_are_overrides_of_the_recipe(system):
    config = configs.load_config(system)
    spans = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=([^`]*))?`", sections()[system])
    assert spans
    for key, value in spans:
        assert key in KEYS or find_group(key), key
        if value:
            configs.with_overrides(config, [f"{key}={value}"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_arguments_of_recipes_are_accepted(system):
    for argument in re.findall(rf"`{system}:([^`]+)`", sections()[system]):
        configs.load_config(f"{system}:{argument}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    """Each `cxrjax` line of a code block, up to a comment."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip().removeprefix("uv run ") for block in blocks for line in block.splitlines()]
    for line in lines:
        if line.startswith("cxrjax "):
            arguments = line.replace("$size", "256").replace("$name", "densenet121").split()[1:]
            overrides, rest = configs.split_overrides(arguments)
            assert make_parser().parse_known_args(rest)[1] == [], line
            configs.with_overrides(configs.default(), overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:cxrjax|tests|scripts|tfds_builders|docs)/[\w/.]+\.(?:py|md|sh|json))`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w/.]+\.(?:md|png|svg|cff))", text):
        assert (page.parent / name).is_file(), name


def test_configuration_page_is_current(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import write_config_docs

    message = "run scripts/write_config_docs.py"
    assert write_config_docs.PAGE.read_text() == write_config_docs.page(), message
