"""Shards as units of work: killed and gone on with, at several sizes at once, checked and repaired."""

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
from user_images import picture

from cxrjax.cli.main import main
from cxrjax.data.manifest import MANIFEST, read_manifest, file_sha256
from cxrjax.data.records import TABLE, open_records, read_directory, shard_paths
from cxrjax.errors import CxrError
from tfds_builders import shard_writer
from tfds_builders.builder import Radiographs
from tfds_builders.chestxray14.chestxray14_dataset_builder import Builder as Nih
from tfds_builders.cxr_phantom.cxr_phantom_dataset_builder import Builder as Phantom
from tfds_builders.folder.folder_dataset_builder import Builder as Folder
from tfds_builders.prepare import prepare, prepare_sizes

ROOT = Path(__file__).resolve().parents[2]
COUNT, LENGTH = 22, 4  # images, and records of a shard in these tests: six shards


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Shards of four records; of two at 64 px."""
    monkeypatch.setattr(Radiographs, "shard_length", lambda self, _: 2 if self.size == 64 else LENGTH)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for k in range(COUNT):
        path = folder / f"{('normal', 'sick')[k % 2]}/{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(k))
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Prepared at one stroke, at two sizes, each alone."""
    data = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Radiographs, "shard_length", lambda self, _: 2 if self.size == 64 else LENGTH)
        for size in (32, 64):
            prepare("folder", source=source, data_dir=data, size=size)
    return data


def run(source, data, *sizes, **options):
    return prepare_sizes("folder", sizes or (32,), source=source, data_dir=data, **options)


def content(data, size=32):
    return {path.name: path.read_bytes() for path in (data / f"folder/{size}/1.0.0").iterdir()}


def there(data, size=32):
    return sorted(path.name for path in (data / f"folder/{size}").iterdir() if path.name != ".lock")


def stopping_at(id, error=KeyboardInterrupt):
    """A `store` that cannot make one record's image."""
    store = Folder.store

    def stopped(self, record, sides):
        if record.id.endswith(id):
            raise error
        return store(self, record, sides)

    return stopped


def counted(monkeypatch):
    """The ids and sizes that are made from now on."""
    made, store = [], Folder.store

    def count(self, record, sides):
        made.append((record.id, tuple(sides)))
        return store(self, record, sides)

    monkeypatch.setattr(Folder, "store", count)
    return made


KILLED = """
import os, signal, sys
from tfds_builders.prepare import prepare_sizes
from tfds_builders import drafts
from tfds_builders.builder import Radiographs
Radiographs.shard_length = lambda self, _: 2 if self.size == 64 else 4
sizes, (step, at) = eval(sys.argv[3]), sys.argv[4].split(":")
count = 0
def killing(function):
    def killed(*words, **options):
        global count
        count += 1
        if count > int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words, **options)
    return killed
if step == "add":
    drafts.Draft.add = killing(drafts.Draft.add)
else:
    setattr(drafts, step, killing(getattr(drafts, step)))
prepare_sizes("folder", sizes, source=sys.argv[1], data_dir=sys.argv[2], workers=2)
"""


def kill(source, data, step, sizes=(32,)):
    words = [sys.executable, "-c", KILLED, str(source), str(data), repr(sizes), step]
    done = subprocess.run(words, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ("add:10", 2),  # in the third of six shards
        ("write_text:2", 2),  # a shard is renamed, but not noted
        ("write_table:0", 6),
        ("write_manifest:0", 6),
        ("read_directory:0", 6),
        ("write_json:0", 6),
    ],
)
def test_a_killed_run_is_gone_on_with(source, whole, tmp_path, monkeypatch, step, kept):
    kill(source, tmp_path, step)
    assert there(tmp_path) == ["incomplete.1.0.0"]
    with pytest.raises(CxrError, match="folder/32 is not prepared"):
        open_records(tmp_path, "folder", "32")
    made = counted(monkeypatch)
    [prepared] = run(source, tmp_path, workers=3)
    assert len(made) == COUNT - min(COUNT, kept * LENGTH)
    assert f"folder/32 goes on: {kept} of 6 shards were finished before" in prepared.notes
    assert there(tmp_path) == ["1.0.0"]
    assert content(tmp_path) == content(whole)


def test_a_run_killed_at_the_last_moment_is_complete(source, whole, tmp_path):
    shutil.copytree(whole / "folder/32", tmp_path / "folder/32")
    (tmp_path / "folder/32/incomplete.1.0.0/finished").mkdir(parents=True)  # it would have been removed next
    [prepared] = run(source, tmp_path)
    assert prepared.reused
    assert there(tmp_path) == ["1.0.0"]


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_the_workers(source, whole, tmp_path, workers):
    run(source, tmp_path, workers=workers)
    assert content(tmp_path) == content(whole)


def test_several_sizes_from_one_reading(source, whole, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    results = run(source, tmp_path, 32, 64, None)
    assert [prepared.directory.parent.name for prepared in results] == ["32", "64", "native"]
    assert len(made) == COUNT
    assert {sides for _, sides in made} == {(32, 64, None)}
    for size in (32, 64):
        assert content(tmp_path, size) == content(whole, size)
    made.clear()
    again = run(source, tmp_path, 64, 128, 32)
    assert [prepared.reused for prepared in again] == [True, False, True]
    assert {sides for _, sides in made} == {(128,)}


def test_a_pass_over_several_sizes_goes_on_with_each(source, whole, tmp_path, monkeypatch):
    kill(source, tmp_path, "add:13", (32, 64))  # six whole images of both, 64 px of the seventh: 1 and 3 shards
    made = counted(monkeypatch)
    results = run(source, tmp_path, 32, 64)
    assert [note for prepared in results for note in prepared.notes if "goes on" in note] == [
        "folder/32 goes on: 1 of 6 shards were finished before",
        "folder/64 goes on: 3 of 11 shards were finished before",
    ]
    assert sorted({sides for _, sides in made}) == [(32,), (32, 64)]
    assert (len(made), sum(sides == (32,) for _, sides in made)) == (COUNT - 4, 2)
    for size in (32, 64):
        assert content(tmp_path, size) == content(whole, size)


def test_what_has_changed_since_is_made_anew(source, whole, tmp_path, monkeypatch):
    changing = shutil.copytree(source, tmp_path / source.name)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "store", stopping_at("sick/15.png"))
        with pytest.raises(KeyboardInterrupt):
            run(changing, tmp_path)
    # in order: 11 images of normal, then of sick; 15 is the 19th, so four shards are finished
    (changing / "normal/02.png").write_bytes(picture(77))  # another picture in the first
    kept = tmp_path / "folder/32/incomplete.1.0.0/data"
    second = sorted(kept.iterdir())[1]
    second.write_bytes(second.read_bytes()[:-1])
    made = counted(monkeypatch)
    [prepared] = run(changing, tmp_path)
    assert [note for note in prepared.notes if "goes on" in note] == [
        "folder/32 goes on: 2 of 6 shards were finished before; 2 are made anew, for they are damaged, or were made "
        "from other files or with other options"
    ]
    assert len(made) == COUNT - 2 * LENGTH
    now, before = content(tmp_path), content(whole)
    assert [name for name in sorted(now) if now[name] != before[name] and "array_record" in name] == [
        "folder-records.array_record-00000-of-00006"
    ]
    assert prepared.fingerprint != read_directory(whole / "folder/32/1.0.0").fingerprint


def test_other_options_keep_nothing(tmp_path, monkeypatch):
    store = shard_writer.Draft.add

    def stopped(self, row, stored):
        if row == 9:
            raise KeyboardInterrupt
        store(self, row, stored)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.Draft, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare("cxr_phantom", data_dir=tmp_path / "a", size=32, patients=8)
    prepared = prepare("cxr_phantom", data_dir=tmp_path / "a", size=32, patients=8, seed=1)
    assert any("goes on: 0 of" in note and "2 are made anew" in note for note in prepared.notes)
    assert (
        prepared.fingerprint == prepare("cxr_phantom", data_dir=tmp_path / "b", size=32, patients=8, seed=1).fingerprint
    )


def test_a_bad_image_late_keeps_what_is_finished(source, whole, tmp_path):
    changing = shutil.copytree(source, tmp_path / source.name)
    bad = changing / "sick/15.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:99])
    with pytest.raises(CxrError, match=r"sick/15\.png: the image is truncated"):
        run(changing, tmp_path)
    bad.write_bytes(good)
    [prepared] = run(changing, tmp_path)
    assert any("goes on: 4 of 6" in note for note in prepared.notes)
    assert content(tmp_path) == content(whole)


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("write() failed: No space left on device; writing x.array_record"),  # as ArrayRecord says it
]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("room", [0, 2])
def test_a_full_disk_keeps_what_is_finished_and_says_where(source, whole, tmp_path, monkeypatch, error, room):
    class Full(shard_writer.ArrayRecordWriter):
        opened = 0

        def __init__(self, *words):
            super().__init__(*words)
            Full.opened += 1

        def write(self, data):
            if Full.opened > room:
                raise error
            super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "ArrayRecordWriter", Full)
        with pytest.raises(CxrError, match=r"the disk is full: .*/folder/32/1\.0\.0 could not be written") as caught:
            run(source, tmp_path)
    if room:
        assert "finished are 2 of 6 shards in " in str(caught.value)
        assert "folder/32/incomplete.1.0.0: make room and give the same command again" in str(caught.value)
        data = tmp_path / "folder/32/incomplete.1.0.0/data"
        assert len(list(data.iterdir())) == 2, "nothing half-written"
    else:
        assert "nothing of it was kept; make room, or choose another --data-dir" in str(caught.value)
        assert there(tmp_path) == []
    run(source, tmp_path)
    assert content(tmp_path) == content(whole)


# --- checksums and repair


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole / "folder", tmp_path / "folder")
    return tmp_path


def test_the_manifest_lists_every_shard(copy):
    directory = copy / "folder/32/1.0.0"
    manifest = read_manifest(directory)
    assert manifest is not None
    assert [entry.file for entry in manifest.shards] == [path.name for path in shard_paths(directory)]
    assert [entry.records for entry in manifest.shards] == [4, 4, 4, 4, 4, 2]
    for entry in manifest.shards:
        assert (entry.bytes, entry.sha256) == ((directory / entry.file).stat().st_size, file_sha256(directory / entry.file))
    assert manifest.table == file_sha256(directory / TABLE)
    assert tfds.builder_from_directory(directory).info.splits["records"].shard_lengths == [4, 4, 4, 4, 4, 2]


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 64
    path.write_bytes(data)


DAMAGE = {
    "flipped": (flip, "checksum differs"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"[\d,]+ bytes instead of [\d,]+"),
    "missing": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_only_it_is_repaired(source, whole, copy, monkeypatch, damage):
    hurt, text = DAMAGE[damage]
    directory = copy / "folder/32/1.0.0"
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    bad = [shard_paths(directory)[k] for k in (1, 5)]
    for path in bad:
        hurt(path)
    if damage != "flipped":  # a flipped byte shows only when all is read
        with pytest.raises(CxrError, match=rf"damaged in .*1\.0\.0: {bad[0].name} \({text}\), .*with --repair"):
            open_records(copy, "folder", "32")
    with pytest.raises(CxrError, match=rf"{bad[0].name} \({text}\), {bad[1].name} \({text}\); .* with --repair"):
        run(source, copy)
    made = counted(monkeypatch)
    [prepared] = run(source, copy, repair=True)
    assert len(made) == LENGTH + 2
    assert any(note.startswith(f"repaired in {directory}: {bad[0].name}") for note in prepared.notes)
    assert prepared.fingerprint == read_directory(whole / "folder/32/1.0.0").fingerprint
    assert content(copy) == content(whole)
    touched = {name for name, stamp in before.items() if (directory / name).stat().st_mtime_ns != stamp}
    assert touched == {*(path.name for path in bad), MANIFEST}
    assert there(copy) == ["1.0.0"]


def test_a_repair_of_several_sizes_and_of_what_is_whole(source, whole, copy):
    flip(shard_paths(copy / "folder/64/1.0.0")[3])
    one, other = run(source, copy, 32, 64, repair=True)
    assert not [note for note in one.notes if "repaired" in note]
    assert [note for note in other.notes if "repaired" in note]
    assert content(copy, 64) == content(whole, 64)


def test_a_damaged_record_is_named_with_its_shard(copy):
    path = shard_paths(copy / "folder/32/1.0.0")[1]
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    records = open_records(copy, "folder", "32")
    with pytest.raises(CxrError, match=r"record 4 of .*00001-of-00006\) cannot be read .* with --repair"):
        records.image(4)


def test_a_repair_from_another_source_is_refused(source, copy, tmp_path):
    changing = shutil.copytree(source, tmp_path / source.name)
    (changing / "normal/02.png").write_bytes(picture(77))
    path = shard_paths(copy / "folder/32/1.0.0")[0]
    flip(path)
    damaged = path.read_bytes()
    with pytest.raises(CxrError, match=r"normal/02\.png is not the image that .*1\.0\.0 was prepared from"):
        run(changing, copy, repair=True)
    assert path.read_bytes() == damaged
    run(source, copy, repair=True)


def test_a_damaged_table_or_list_is_named(source, copy):
    path = copy / "folder/32/1.0.0" / TABLE
    flip(copy / "folder/64/1.0.0" / MANIFEST, 0)
    with pytest.raises(CxrError, match=r"64/1\.0\.0/shards\.json cannot be read .*delete .* and prepare it again"):
        open_records(copy, "folder", "64")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"00.png", b"99.png"))
    assert path.read_bytes() != data
    with pytest.raises(CxrError, match=r"another id|records\.parquet is damaged \(checksum differs\)|not the "):
        run(source, copy)


def test_data_prepared_before_there_were_checksums_are_read(source, copy):
    (copy / "folder/32/1.0.0" / MANIFEST).unlink()
    assert len(open_records(copy, "folder", "32")) == COUNT
    [prepared] = run(source, copy)
    assert any("was prepared before checksums were kept (shards.json is absent)" in note for note in prepared.notes)


def test_sizes_and_repair_from_the_command_line(source, tmp_path, capsys):
    words = ["prepare", "folder", "--source", str(source), "--data-dir", str(tmp_path)]
    assert main([*words, "--size", "native", "32", "64", "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["directory"]).parent.name for result in results] == ["native", "32", "64"]
    flip(shard_paths(tmp_path / "folder/32/1.0.0")[0])
    assert main([*words, "--size", "32"]) == 1
    assert "00000-of-00006 (checksum differs)" in capsys.readouterr().err
    assert main([*words, "--size", "32", "--repair", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == results[1]["fingerprint"]


def test_what_is_stored_is_the_image_at_every_size(source, whole):
    for size in (32, 64):
        records = open_records(whole, "folder", str(size))
        image = cv2.imread(str(source / records.id[5]), cv2.IMREAD_GRAYSCALE)
        how = cv2.INTER_AREA if size < 40 else cv2.INTER_LINEAR
        assert np.abs(records.image(5) - cv2.resize(image, (size, size), interpolation=how).astype(int)).mean() < 1.5


PLAN = Radiographs.shard_length


@pytest.mark.parametrize(
    ("count", "small", "large"),
    [(1, 64, 64), (240, 64, 64), (4_171, 512, 512), (112_120, 1024, 512), (377_110, 1024, 512)],
)
def test_the_plan_depends_on_the_data_alone(tmp_path, count, small, large):
    for size, length in ((32, small), (1024, small), (2048, large), (None, large)):
        builder = Phantom(data_dir=tmp_path, config=str(size)) if size else Nih(data_dir=tmp_path, config="native")
        assert PLAN(builder, count) == length
    assert -(-count // large) < 900, "files that are open at a time"
