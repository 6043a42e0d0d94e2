"""Preparing the phantom: complete or absent after any interruption, and without TensorFlow."""

import fcntl
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cxrjax.data import phantom
from cxrjax.data.records import TABLE, open_records, read_directory, write_table
from cxrjax.errors import CxrError
from cxrjax.findings import PHANTOM
from tfds_builders.build import map_in_order
from tfds_builders.cxr_phantom.cxr_phantom_dataset_builder import Builder
from tfds_builders.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]


def draw(folder, **options):
    prepared = prepare("cxr_phantom", data_dir=folder, **{"size": 64, "patients": 12, **options})
    return prepared, open_records(folder, "cxr_phantom", "64")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("phantom"))


def leftovers(folder):
    """List what could be taken for prepared data."""
    return [path.name for path in folder.glob("cxr_phantom/64/*") if path.name != ".lock"]


def test_records_are_the_population(drawn):
    prepared, records = drawn
    population = phantom.sample_population(0, 12)
    assert (prepared.images, prepared.patients) == (len(population), 12)
    assert records.findings == PHANTOM
    assert records.id.tolist() == [radiograph.id for radiograph in population]
    assert records.patient.tolist() == [radiograph.patient for radiograph in population]
    np.testing.assert_array_equal(records.labels, [radiograph.labels for radiograph in population])
    for row in (0, 5, len(population) - 1):
        np.testing.assert_array_equal(records.image(row), phantom.render(population[row], 64))
    assert prepared.bytes == sum(path.stat().st_size for path in prepared.directory.iterdir())
    assert prepared.fingerprint == records.fingerprint
    assert not prepared.reused


def test_masks_are_exact(drawn):
    _, records = drawn
    for row, radiograph in enumerate(phantom.sample_population(0, 12)):
        truth = phantom.render_masks(radiograph, 64)
        for finding in PHANTOM:
            mask = records.mask(row, finding, 64)
            assert (mask is None) == (finding not in truth)
            if mask is not None:
                np.testing.assert_array_equal(mask, truth[finding])
                small, large = records.mask(row, finding, 16), records.mask(row, finding, 128)
                assert small is not None
                assert large is not None
                np.testing.assert_array_equal(small, mask.reshape(16, 4, 16, 4).any((1, 3)))
                np.testing.assert_array_equal(large, mask.repeat(2, 0).repeat(2, 1))


def test_official_splits_have_whole_patients_and_are_stable():
    few, many = (Builder(patients=n, config="64")._read_records(None) for n in (40, 400))
    assert [record.official for record in many[: len(few)]] == [record.official for record in few]
    split_of = {record.patient: record.official for record in many}
    assert all(split_of[record.patient] == record.official for record in many)
    fraction = np.mean([split == "test" for split in split_of.values()])
    assert abs(fraction - 0.2) < 0.06  # 3 standard deviations of 400 draws
    assert {record.official for record in many} == {"train_val", "test"}


def test_fingerprint_depends_on_the_data_only(drawn, tmp_path):
    prepared, _ = drawn
    assert draw(tmp_path / "a", workers=1)[0].fingerprint == prepared.fingerprint
    assert draw(tmp_path / "b", seed=1)[0].fingerprint != prepared.fingerprint
    assert draw(tmp_path / "c", patients=11)[0].fingerprint != prepared.fingerprint


def test_prepared_data_is_reused(tmp_path):
    first, _ = draw(tmp_path, patients=3)
    stamp = (first.directory / TABLE).stat().st_mtime_ns
    again, _ = draw(tmp_path, patients=3)
    assert again.reused
    assert (first.directory / TABLE).stat().st_mtime_ns == stamp
    assert (again.fingerprint, again.images, again.bytes) == (first.fingerprint, first.images, first.bytes)
    with pytest.raises(CxrError, match=r"1\.0\.0 was prepared with patients 3, not 4; delete .* or choose another"):
        draw(tmp_path, patients=4)
    with pytest.raises(CxrError, match="was prepared with seed 0, not 1"):
        draw(tmp_path, patients=3, seed=1)


def test_random_access_from_many_threads(drawn):
    _, records = drawn
    whole = [records.image_bytes(row) for row in range(len(records))]
    fresh = open_records(records.directory.parents[2], "cxr_phantom", "64")
    wrong = []

    def read(seed):
        for row in np.random.default_rng(seed).integers(0, len(fresh), 200).tolist():
            if fresh.image_bytes(row) != whole[row]:
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_shards_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(Builder, "shard_length", lambda *_: 3)
    prepared, records = draw(tmp_path)
    shards = sorted(path.name for path in prepared.directory.glob("*.array_record*"))
    assert len(shards) == -(-prepared.images // 3)
    population = phantom.sample_population(0, 12)
    for row in range(prepared.images):
        np.testing.assert_array_equal(records.image(row), phantom.render(population[row], 64))
    assert len(Builder(data_dir=tmp_path, config="64").as_data_source("all")) == prepared.images


def test_verify_finds_differences(tmp_path):
    prepared, records = draw(tmp_path, patients=4)
    records.verify()
    swapped = [1, 0, *range(2, len(records))]
    builder = Builder(patients=4, config="64")._read_records(None)
    rows = [replace(builder[row], sha256="00") for row in swapped]
    write_table(prepared.directory, rows, PHANTOM, dataset="cxr_phantom", config="64")
    with pytest.raises(CxrError, match=r"record 0 of .* is not .*; delete that folder and prepare it again"):
        read_directory(prepared.directory).verify()
    write_table(prepared.directory, rows[:-1], PHANTOM, dataset="cxr_phantom", config="64")
    with pytest.raises(CxrError, match=rf"has {len(records)} images, its table {len(records) - 1}"):
        read_directory(prepared.directory).verify()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"dataset": "chexpert"}, "unknown data set 'chexpert'; choose one of chestxray14, cxr_phantom"),
        ({"size": 100}, "cxr_phantom is not stored at size 100; choose one of 256, 32, 64"),
        ({"patient": 3}, "cxr_phantom has no option 'patient'; its options are patients, seed"),
        ({"source": "x"}, "cxr_phantom is drawn and has no source; omit --source"),
        (
            {"dataset": "chestxray14", "size": 256, "seed": 1},
            "chestxray14 has no option 'seed'; its options are aspect",
        ),
        ({"patients": 0}, "there is no record to prepare"),
    ],
)
def test_invalid_options_are_errors(tmp_path, call, message):
    with pytest.raises(CxrError, match=message):
        prepare(**{"dataset": "cxr_phantom", "data_dir": tmp_path, "size": 64, **call})
    assert not leftovers(tmp_path)


def test_unwritable_data_dir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CxrError, match=r"cannot write to .*; choose another --data-dir"):
        draw(tmp_path / "file")


@pytest.mark.parametrize("started", [False, True])
def test_interruption_keeps_only_finished_shards(tmp_path, monkeypatch, drawn, started):
    make_images = Builder.make_images

    def interrupted(self, record, sizes):
        if record.id.startswith("p00005"):
            raise KeyboardInterrupt
        return make_images(self, record, sizes)

    with monkeypatch.context() as patch:
        patch.setattr(Builder, "make_images", interrupted)
        patch.setattr(Builder, "shard_length", lambda *_: 4 if started else 64)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path)
    assert leftovers(tmp_path) == (["incomplete.1.0.0"] if started else [])
    with pytest.raises(CxrError, match="cxr_phantom/64 is not prepared"):
        open_records(tmp_path, "cxr_phantom", "64")
    prepared, _ = draw(tmp_path)
    assert leftovers(tmp_path) == ["1.0.0"]
    assert prepared.fingerprint == drawn[0].fingerprint


def test_two_processes_cannot_prepare_the_same_data(tmp_path):
    folder = tmp_path / "cxr_phantom/64"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CxrError, match=r"another process is preparing .*wait until it has finished"):
            draw(tmp_path)
    draw(tmp_path, patients=2)


IMPORT_SCRIPT = """
import json, sys
from tfds_builders.prepare import prepare
from cxrjax.data.records import open_records
prepare("cxr_phantom", data_dir=sys.argv[1], size=64, patients=2)
records = open_records(sys.argv[1], "cxr_phantom", "64")
records.image(0), records.mask(0, "Mass", 8)
print(json.dumps([name for name in ("tensorflow", "torch", "jax", "matplotlib") if name in sys.modules]))
"""


def test_no_tensorflow_and_no_output(tmp_path):
    """Preparing and reading do not import TensorFlow, and TFDS prints nothing."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert done.stderr == ""


def test_tfds_reads_the_phantom(drawn):
    prepared, records = drawn
    builder = tfds.builder("cxr_phantom/64", data_dir=prepared.directory.parents[2], patients=12)
    assert isinstance(builder, Builder)
    data = builder.as_data_source("records")
    assert len(data) == prepared.images
    example = data[4]
    assert example["id"].decode() == records.id[4]
    np.testing.assert_array_equal(example["image"][..., 0], records.image(4))
    bits = sum(
        (np.zeros((64, 64), int) if mask is None else mask.astype(int)) << k
        for k, mask in enumerate(records.mask(4, finding, 64) for finding in PHANTOM)
    )
    np.testing.assert_array_equal(example["mask"][..., 0], bits)
    assert builder.info.description.startswith("The phantom")


def test_tfds_prepares_the_phantom(drawn, tmp_path):
    """TFDS's `download_and_prepare` writes the same bytes."""
    prepared, _ = drawn
    builder = tfds.builder("cxr_phantom/64", data_dir=tmp_path, patients=12)
    builder.download_and_prepare()
    builder.download_and_prepare()
    assert len(builder.as_data_source("records")) == prepared.images
    for path in prepared.directory.iterdir():
        assert (tmp_path / "cxr_phantom/64/1.0.0" / path.name).read_bytes() == path.read_bytes()
    again, _ = draw(tmp_path)
    assert again.reused


@pytest.mark.parametrize("workers", [1, 3])
def test_map_in_order_limits_pending_items(workers):
    started = []
    stream = map_in_order(lambda k: started.append(k) or k * k, range(100), workers=workers, ahead=2)
    assert next(stream) == 0
    assert len(started) <= 2 * workers
    assert [*stream] == [k * k for k in range(1, 100)]


def test_map_in_order_stops_at_an_error():
    def fail(k):
        if k == 5:
            raise CxrError("number 5")
        return k

    stream = map_in_order(fail, range(10**9), workers=2)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(CxrError, match="number 5"):
        next(stream)
