"""Shards as units of work: resumed after a kill, written at several sizes at once, checked and repaired."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from user_images import image_bytes

from cxrjax.cli.main import main
from cxrjax.data.manifest import MANIFEST, file_sha256, read_manifest
from cxrjax.data.records import TABLE, open_records, read_directory, shard_paths
from cxrjax.errors import CxrError
from tfds_builders import shard_writer
from tfds_builders.builder import RadiographBuilder
from tfds_builders.chestxray14.chestxray14_dataset_builder import Builder as Nih
from tfds_builders.cxr_phantom.cxr_phantom_dataset_builder import Builder as Phantom
from tfds_builders.folder.folder_dataset_builder import Builder as Folder
from tfds_builders.prepare import prepare, prepare_sizes

ROOT = Path(__file__).resolve().parents[2]
COUNT, LENGTH = 22, 4  # images, and records per shard in these tests: six shards


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    """Use shards of four records, of two at 64 px."""
    monkeypatch.setattr(RadiographBuilder, "shard_length", lambda self, _: 2 if self.size == 64 else LENGTH)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for k in range(COUNT):
        path = folder / f"{('normal', 'sick')[k % 2]}/{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(k))
    return folder


@pytest.fixture(scope="module")
def prepared_dir(source, tmp_path_factory):
    """Data prepared without interruption, at two sizes separately."""
    data = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RadiographBuilder, "shard_length", lambda self, _: 2 if self.size == 64 else LENGTH)
        for size in (32, 64):
            prepare("folder", source=source, data_dir=data, size=size)
    return data


def run(source, data, *sizes, **options):
    return prepare_sizes("folder", sizes or (32,), source=source, data_dir=data, **options)


def content(data, size=32):
    return {path.name: path.read_bytes() for path in (data / f"folder/{size}/1.0.0").iterdir()}


def listing(data, size=32):
    return sorted(path.name for path in (data / f"folder/{size}").iterdir() if path.name != ".lock")


def failing_at(id, error=KeyboardInterrupt):
    """Return a `make_images` that raises an error for one record."""
    make_images = Folder.make_images

    def fail(self, record, sizes):
        if record.id.endswith(id):
            raise error
        return make_images(self, record, sizes)

    return fail


def record_calls(monkeypatch):
    """Return a list of the ids and sizes of images made from now on."""
    calls, make_images = [], Folder.make_images

    def record_call(self, record, sizes):
        calls.append((record.id, tuple(sizes)))
        return make_images(self, record, sizes)

    monkeypatch.setattr(Folder, "make_images", record_call)
    return calls


KILL_SCRIPT = """
import os, signal, sys
from tfds_builders.prepare import prepare_sizes
from tfds_builders import shard_writer
from tfds_builders.builder import RadiographBuilder
RadiographBuilder.shard_length = lambda self, _: 2 if self.size == 64 else 4
sizes, (step, at) = eval(sys.argv[3]), sys.argv[4].split(":")
count = 0
def kill_after(function):
    def wrapper(*args, **kwargs):
        global count
        count += 1
        if count > int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
if step == "write":
    shard_writer.DatasetWriter.write = kill_after(shard_writer.DatasetWriter.write)
else:
    setattr(shard_writer, step, kill_after(getattr(shard_writer, step)))
prepare_sizes("folder", sizes, source=sys.argv[1], data_dir=sys.argv[2], workers=2)
"""


def kill(source, data, step, sizes=(32,)):
    command = [sys.executable, "-c", KILL_SCRIPT, str(source), str(data), repr(sizes), step]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ("write:10", 2),  # in the third of six shards
        ("write_text:2", 2),  # a shard is renamed, but has no note
        ("write_table:0", 6),
        ("write_manifest:0", 6),
        ("read_directory:0", 6),
        ("write_json:0", 6),
    ],
)
def test_killed_run_is_resumed(source, prepared_dir, tmp_path, monkeypatch, step, kept):
    kill(source, tmp_path, step)
    assert listing(tmp_path) == ["incomplete.1.0.0"]
    with pytest.raises(CxrError, match="folder/32 is not prepared"):
        open_records(tmp_path, "folder", "32")
    calls = record_calls(monkeypatch)
    [prepared] = run(source, tmp_path, workers=3)
    assert len(calls) == COUNT - min(COUNT, kept * LENGTH)
    assert f"resuming folder/32: {kept} of 6 shards were already finished" in prepared.notes
    assert listing(tmp_path) == ["1.0.0"]
    assert content(tmp_path) == content(prepared_dir)


def test_run_killed_at_the_very_end_is_complete(source, prepared_dir, tmp_path):
    shutil.copytree(prepared_dir / "folder/32", tmp_path / "folder/32")
    (tmp_path / "folder/32/incomplete.1.0.0/finished").mkdir(parents=True)  # the last thing to be removed
    [prepared] = run(source, tmp_path)
    assert prepared.reused
    assert listing(tmp_path) == ["1.0.0"]


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(source, prepared_dir, tmp_path, workers):
    run(source, tmp_path, workers=workers)
    assert content(tmp_path) == content(prepared_dir)


def test_several_sizes_read_each_image_once(source, prepared_dir, tmp_path, monkeypatch):
    calls = record_calls(monkeypatch)
    results = run(source, tmp_path, 32, 64, None)
    assert [prepared.directory.parent.name for prepared in results] == ["32", "64", "native"]
    assert len(calls) == COUNT
    assert {sizes for _, sizes in calls} == {(32, 64, None)}
    for size in (32, 64):
        assert content(tmp_path, size) == content(prepared_dir, size)
    calls.clear()
    again = run(source, tmp_path, 64, 128, 32)
    assert [prepared.reused for prepared in again] == [True, False, True]
    assert {sizes for _, sizes in calls} == {(128,)}


def test_several_sizes_are_resumed_separately(source, prepared_dir, tmp_path, monkeypatch):
    kill(source, tmp_path, "write:13", (32, 64))  # six images at both sizes, the seventh at one: 1 and 3 shards
    calls = record_calls(monkeypatch)
    results = run(source, tmp_path, 32, 64)
    assert [note for prepared in results for note in prepared.notes if "resuming" in note] == [
        "resuming folder/32: 1 of 6 shards were already finished",
        "resuming folder/64: 3 of 11 shards were already finished",
    ]
    assert sorted({sizes for _, sizes in calls}) == [(32,), (32, 64)]
    assert (len(calls), sum(sizes == (32,) for _, sizes in calls)) == (COUNT - 4, 2)
    for size in (32, 64):
        assert content(tmp_path, size) == content(prepared_dir, size)


def test_changed_and_damaged_shards_are_rebuilt(source, prepared_dir, tmp_path, monkeypatch):
    changed = shutil.copytree(source, tmp_path / source.name)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "make_images", failing_at("sick/15.png"))
        with pytest.raises(KeyboardInterrupt):
            run(changed, tmp_path)
    # 11 images of normal, then those of sick; 15 is the 19th, so four shards are finished
    (changed / "normal/02.png").write_bytes(image_bytes(77))  # another image in the first shard
    kept = tmp_path / "folder/32/incomplete.1.0.0/data"
    second = sorted(kept.iterdir())[1]
    second.write_bytes(second.read_bytes()[:-1])
    calls = record_calls(monkeypatch)
    [prepared] = run(changed, tmp_path)
    assert [note for note in prepared.notes if "resuming" in note] == [
        "resuming folder/32: 2 of 6 shards were already finished; 2 are rebuilt because they are damaged, or were made "
        "from other files or with other options"
    ]
    assert len(calls) == COUNT - 2 * LENGTH
    now, before = content(tmp_path), content(prepared_dir)
    assert [name for name in sorted(now) if now[name] != before[name] and "array_record" in name] == [
        "folder-records.array_record-00000-of-00006"
    ]
    assert prepared.fingerprint != read_directory(prepared_dir / "folder/32/1.0.0").fingerprint


def test_other_options_keep_no_shard(tmp_path, monkeypatch):
    write = shard_writer.DatasetWriter.write

    def interrupted(self, row, image):
        if row == 9:
            raise KeyboardInterrupt
        write(self, row, image)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.DatasetWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("cxr_phantom", data_dir=tmp_path / "a", size=32, patients=8)
    prepared = prepare("cxr_phantom", data_dir=tmp_path / "a", size=32, patients=8, seed=1)
    assert any(": 0 of" in note and "2 are rebuilt" in note for note in prepared.notes)
    assert (
        prepared.fingerprint == prepare("cxr_phantom", data_dir=tmp_path / "b", size=32, patients=8, seed=1).fingerprint
    )


def test_bad_image_keeps_finished_shards(source, prepared_dir, tmp_path):
    changed = shutil.copytree(source, tmp_path / source.name)
    bad = changed / "sick/15.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:99])
    with pytest.raises(CxrError, match=r"sick/15\.png: the image is truncated"):
        run(changed, tmp_path)
    bad.write_bytes(good)
    [prepared] = run(changed, tmp_path)
    assert any("resuming folder/32: 4 of 6" in note for note in prepared.notes)
    assert content(tmp_path) == content(prepared_dir)


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("write() failed: No space left on device; writing x.array_record"),  # ArrayRecord's message
]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("room", [0, 2])
def test_full_disk_keeps_finished_shards_and_reports_them(source, prepared_dir, tmp_path, monkeypatch, error, room):
    class Full(shard_writer.ArrayRecordWriter):
        opened = 0

        def __init__(self, *args):
            super().__init__(*args)
            Full.opened += 1

        def write(self, data):
            if Full.opened > room:
                raise error
            super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "ArrayRecordWriter", Full)
        with pytest.raises(CxrError, match=r"the disk is full: cannot write .*/folder/32/1\.0\.0;") as raised:
            run(source, tmp_path)
    if room:
        assert "kept 2 of 6 shards in " in str(raised.value)
        assert "folder/32/incomplete.1.0.0. Free space and rerun the command to resume" in str(raised.value)
        data = tmp_path / "folder/32/incomplete.1.0.0/data"
        assert len(list(data.iterdir())) == 2, "no partial shard"
    else:
        assert "nothing was kept. Free space or choose another --data-dir" in str(raised.value)
        assert listing(tmp_path) == []
    run(source, tmp_path)
    assert content(tmp_path) == content(prepared_dir)


# --- checksums and repair


@pytest.fixture
def copy(prepared_dir, tmp_path):
    shutil.copytree(prepared_dir / "folder", tmp_path / "folder")
    return tmp_path


def test_manifest_lists_every_shard(copy):
    directory = copy / "folder/32/1.0.0"
    manifest = read_manifest(directory)
    assert [entry.file for entry in manifest.shards] == [path.name for path in shard_paths(directory)]
    assert [entry.records for entry in manifest.shards] == [4, 4, 4, 4, 4, 2]
    for entry in manifest.shards:
        assert (entry.bytes, entry.sha256) == (
            (directory / entry.file).stat().st_size,
            file_sha256(directory / entry.file),
        )
    assert manifest.table == file_sha256(directory / TABLE)
    assert tfds.builder_from_directory(directory).info.splits["records"].shard_lengths == [4, 4, 4, 4, 4, 2]


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 64
    path.write_bytes(data)


DAMAGE = {
    "flipped": (flip, "checksum differs"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"[\d,]+ bytes instead of [\d,]+"),
    "missing": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_named_and_only_they_are_repaired(source, prepared_dir, copy, monkeypatch, damage):
    apply_damage, text = DAMAGE[damage]
    directory = copy / "folder/32/1.0.0"
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    bad = [shard_paths(directory)[k] for k in (1, 5)]
    for path in bad:
        apply_damage(path)
    if damage != "flipped":  # a flipped byte is only found by reading the whole shard
        with pytest.raises(CxrError, match=rf"damaged shards in .*1\.0\.0: {bad[0].name} \({text}\), .*with --repair"):
            open_records(copy, "folder", "32")
    with pytest.raises(CxrError, match=rf"{bad[0].name} \({text}\), {bad[1].name} \({text}\); .* with --repair"):
        run(source, copy)
    calls = record_calls(monkeypatch)
    [prepared] = run(source, copy, repair=True)
    assert len(calls) == LENGTH + 2
    assert any(note.startswith(f"repaired in {directory}: {bad[0].name}") for note in prepared.notes)
    assert prepared.fingerprint == read_directory(prepared_dir / "folder/32/1.0.0").fingerprint
    assert content(copy) == content(prepared_dir)
    modified = {name for name, stamp in before.items() if (directory / name).stat().st_mtime_ns != stamp}
    assert modified == {*(path.name for path in bad), MANIFEST}
    assert listing(copy) == ["1.0.0"]


def test_repair_of_several_sizes_skips_intact_ones(source, prepared_dir, copy):
    flip(shard_paths(copy / "folder/64/1.0.0")[3])
    one, other = run(source, copy, 32, 64, repair=True)
    assert not [note for note in one.notes if "repaired" in note]
    assert [note for note in other.notes if "repaired" in note]
    assert content(copy, 64) == content(prepared_dir, 64)


def test_damaged_record_is_named_with_its_shard(copy):
    path = shard_paths(copy / "folder/32/1.0.0")[1]
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    records = open_records(copy, "folder", "32")
    with pytest.raises(CxrError, match=r"record 4 of .*00001-of-00006\) cannot be read .* with --repair"):
        records.image(4)


def test_repair_from_another_source_is_an_error(source, copy, tmp_path):
    changed = shutil.copytree(source, tmp_path / source.name)
    (changed / "normal/02.png").write_bytes(image_bytes(77))
    path = shard_paths(copy / "folder/32/1.0.0")[0]
    flip(path)
    damaged = path.read_bytes()
    with pytest.raises(CxrError, match=r"normal/02\.png is not the image that .*1\.0\.0 was prepared from"):
        run(changed, copy, repair=True)
    assert path.read_bytes() == damaged
    run(source, copy, repair=True)


def test_damaged_table_or_manifest_is_named(source, copy):
    path = copy / "folder/32/1.0.0" / TABLE
    flip(copy / "folder/64/1.0.0" / MANIFEST, 0)
    with pytest.raises(CxrError, match=r"64/1\.0\.0/shards\.json cannot be read .*delete .* and prepare it again"):
        open_records(copy, "folder", "64")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"00.png", b"99.png"))
    assert path.read_bytes() != data
    with pytest.raises(CxrError, match=r"another id|records\.parquet is damaged \(checksum differs\)|not the "):
        run(source, copy)


def test_missing_manifest_is_an_error(source, copy):
    (copy / "folder/32/1.0.0" / MANIFEST).unlink()
    for use in (lambda: open_records(copy, "folder", "32"), lambda: run(source, copy)):
        with pytest.raises(CxrError, match=r"shards\.json cannot be read .*; delete .* and prepare it again"):
            use()


def test_sizes_and_repair_from_the_command_line(source, tmp_path, capsys):
    arguments = ["prepare", "folder", "--source", str(source), "--data-dir", str(tmp_path)]
    assert main([*arguments, "--size", "native", "32", "64", "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["directory"]).parent.name for result in results] == ["native", "32", "64"]
    flip(shard_paths(tmp_path / "folder/32/1.0.0")[0])
    assert main([*arguments, "--size", "32"]) == 1
    assert "00000-of-00006 (checksum differs)" in capsys.readouterr().err
    assert main([*arguments, "--size", "32", "--repair", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == results[1]["fingerprint"]


def test_stored_image_agrees_with_opencv_at_every_size(source, prepared_dir):
    for size in (32, 64):
        records = open_records(prepared_dir, "folder", str(size))
        image = cv2.imread(str(source / records.id[5]), cv2.IMREAD_GRAYSCALE)
        interpolation = cv2.INTER_AREA if size < 40 else cv2.INTER_LINEAR
        assert (
            np.abs(records.image(5) - cv2.resize(image, (size, size), interpolation=interpolation).astype(int)).mean()
            < 1.5
        )


SHARD_LENGTH = RadiographBuilder.shard_length


@pytest.mark.parametrize(
    ("count", "small", "large"),
    [(1, 64, 64), (240, 64, 64), (4_171, 512, 512), (112_120, 1024, 512), (377_110, 1024, 512)],
)
def test_shard_length_depends_on_count_and_size(tmp_path, count, small, large):
    for size, length in ((32, small), (1024, small), (2048, large), (None, large)):
        builder = Phantom(data_dir=tmp_path, config=str(size)) if size else Nih(data_dir=tmp_path, config="native")
        assert SHARD_LENGTH(builder, count) == length
    assert -(-count // large) < 900, "number of files open at a time"
