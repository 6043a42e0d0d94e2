"""Beam's local runner writes the same bytes as one process."""

import json
from pathlib import Path

import pytest
from user_images import image_bytes

from cxrjax.cli.main import main
from cxrjax.errors import CxrError
from tfds_builders.builder import RadiographBuilder
from tfds_builders.prepare import prepare_sizes

COUNT = 22


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(RadiographBuilder, "shard_length", lambda self, _: 2 if self.size == 64 else 4)


@pytest.fixture
def source(tmp_path):
    for k in range(COUNT):
        path = tmp_path / "source" / f"{('normal', 'sick')[k % 2]}/{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(k))
    return tmp_path / "source"


def run(source, data, *sizes, **options):
    return prepare_sizes("folder", sizes, source=source, data_dir=data, **options)


def content(data, size):
    return {path.name: path.read_bytes() for path in (data / f"folder/{size}/1.0.0").iterdir()}


def test_missing_beam_is_a_clear_error(source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    monkeypatch.delitem(__import__("sys").modules, "tfds_builders.beam", raising=False)
    with pytest.raises(CxrError, match=r"needs the package apache-beam: install with `uv sync --no-dev --extra beam`"):
        run(source, tmp_path / "D", 32, beam=[])


class TestWithBeam:
    @pytest.fixture(autouse=True)
    def beam(self):
        pytest.importorskip("apache_beam", reason="apache-beam is not installed: uv sync --no-dev --extra beam")

    pytestmark = pytest.mark.filterwarnings("default")  # of Beam

    def test_bytes_are_the_same(self, source, tmp_path):
        plain = run(source, tmp_path / "plain", 32, 64)
        made = run(source, tmp_path / "beam", 32, 64, beam=["--runner=DirectRunner"])
        assert [one.fingerprint for one in made] == [one.fingerprint for one in plain]
        for size in (32, 64):
            assert content(tmp_path / "beam", size) == content(tmp_path / "plain", size)
            assert [path.name for path in (tmp_path / f"beam/folder/{size}").glob("inc*")] == []

    def test_phantom_on_processes_from_the_command_line(self, tmp_path, capfd, monkeypatch):
        monkeypatch.undo()  # other processes use the default shard length
        arguments = ["prepare", "cxr_phantom", "--size", "32", "--patients", "5", "--json"]
        assert main([*arguments, str(tmp_path / "a.json"), "--data-dir", str(tmp_path / "a")]) == 0
        flags = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"
        beam = ["--beam", f"--beam-options={flags}"]
        assert main([*arguments, str(tmp_path / "b.json"), "--data-dir", str(tmp_path / "b"), *beam]) == 0
        one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
        assert one["fingerprint"] == other["fingerprint"]
        files = [sorted(Path(result["directory"]).iterdir()) for result in (one, other)]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]

    def test_bad_image_is_named_and_other_blocks_are_kept(self, source, tmp_path):
        plain = run(source, tmp_path / "plain", 32)
        bad = source / "sick/15.png"
        good = bad.read_bytes()
        bad.write_bytes(good[:99])
        with pytest.raises(CxrError, match=r"sick/15\.png: the image is truncated"):
            run(source, tmp_path / "beam", 32, beam=[])
        bad.write_bytes(good)
        [made] = run(source, tmp_path / "beam", 32, beam=[])
        assert "resuming folder/32: 5 of 6 shards were already finished" in made.notes
        assert made.fingerprint == plain[0].fingerprint
        assert content(tmp_path / "beam", 32) == content(tmp_path / "plain", 32)
