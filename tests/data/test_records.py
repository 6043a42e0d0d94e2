import dataclasses
import json
import math
import pickle
import random

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrjax.data.manifest import Manifest, write_manifest
from cxrjax.data.records import (
    TABLE,
    Box,
    Record,
    Records,
    compute_fingerprint,
    open_records,
    read_directory,
    records_to_table,
    write_table,
)
from cxrjax.errors import CxrError
from tfds_builders.builder import encode_file

FINDINGS = ("Mass", "Nodule", "Pleural Effusion")


def make_records(n, **changes):
    rng = random.Random(7)
    return [
        dataclasses.replace(
            Record(
                id=f"{i:04d}.png",
                patient=f"p{i // 3}",
                study=f"p{i // 3}_s{i % 3}",
                view=("PA", "AP")[i % 2],
                age=math.nan if i % 5 == 0 else 20.5 + i,
                sex="MF"[i % 2],
                source="here",
                labels=(rng.choice((1, 0, -1, -2)), i % 2, 0),
                official="test" if i % 4 == 0 else "train_val",
                boxes=(Box("Mass", 0.25, 0.5, 0.25, 0.125), Box("Mass", 0.75, 0, 0.125, 0.125)) if i == 2 else (),
                sha256=f"{i:064x}",
            ),
            **changes,
        )
        for i in range(n)
    ]


def store(records, folder, dataset="d", config="256", version="1.0.0"):
    directory = folder / dataset / config / version
    directory.mkdir(parents=True)
    write_table(directory, records, FINDINGS, dataset=dataset, config=config)
    write_manifest(directory, Manifest("", ()))
    return read_directory(directory)


def test_written_records_are_read_back(tmp_path):
    records = make_records(50)
    about = store(records, tmp_path)
    opened = open_records(tmp_path, "d", "256")
    assert (len(opened), opened.findings, opened.fingerprint) == (50, FINDINGS, about.fingerprint)
    assert (opened.dataset, opened.config) == ("d", "256")
    assert opened.directory == tmp_path / "d/256/1.0.0"
    for name in ("id", "patient", "study", "view", "sex", "source", "official"):
        column = getattr(opened, name)
        assert column.dtype.kind == "U"
        assert column.tolist() == [getattr(record, name) for record in records]
    assert opened.age.dtype == np.float32
    np.testing.assert_array_equal(opened.age, np.float32([record.age for record in records]))
    assert opened.labels.dtype == np.int8
    np.testing.assert_array_equal(opened.labels, [record.labels for record in records])
    assert opened.boxes(2) == list(records[2].boxes)
    assert opened.boxes(3) == []
    assert opened.labels is opened.labels, "columns are cached"


def test_opening_reads_the_table_but_no_shard(tmp_path):
    store(make_records(20), tmp_path)
    shard = tmp_path / "d/256/1.0.0/d-records.array_record-00000-of-00001"
    shard.write_bytes(b"not an ArrayRecord file")
    opened = open_records(tmp_path, "d", "256")
    assert len(opened.id) == len(opened.labels) == 20
    assert opened.boxes(2)
    with pytest.raises(CxrError, match=r"record 0 of .*1\.0\.0 cannot be read .*with --repair"):
        opened.image_bytes(0)


def test_records_can_be_pickled(tmp_path):
    store(make_records(10), tmp_path)
    opened = open_records(tmp_path, "d", "256")
    opened.labels  # noqa: B018 - cached
    again = pickle.loads(pickle.dumps(opened))
    assert again == opened
    np.testing.assert_array_equal(again.labels, opened.labels)
    assert "labels" not in opened.__getstate__()


def test_newest_version_is_opened(tmp_path):
    store(make_records(5), tmp_path, version="1.9.0")
    store(make_records(6), tmp_path, version="1.10.0")
    (tmp_path / "d/256/incomplete.ABCDEF_1.11.0").mkdir()
    assert len(open_records(tmp_path, "d", "256")) == 6


def test_unprepared_data_set_is_an_error_that_lists_prepared_ones(tmp_path):
    store(make_records(5), tmp_path)
    with pytest.raises(
        CxrError, match=r"d/512 is not prepared in .* \(prepared are: d/256\); run `cxrjax prepare d --size 512"
    ):
        open_records(tmp_path, "d", "512")
    with pytest.raises(CxrError, match=r"x/native is not prepared in .*prepared are: none.*prepare x --data-dir"):
        open_records(tmp_path / "nowhere", "x", "native")


def test_damaged_or_foreign_table_is_an_error_that_names_it(tmp_path):
    store(make_records(5), tmp_path)
    path = tmp_path / "d/256/1.0.0" / TABLE
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CxrError, match=r"records\.parquet cannot be read .*prepare it again"):
            read_directory(path.parent)
    table = records_to_table(make_records(5), FINDINGS)
    pq.write_table(table.replace_schema_metadata({"cxrjax": json.dumps({"format": 99})}), path)
    with pytest.raises(CxrError, match="has layout 99, but this program reads 1"):
        read_directory(path.parent)


def test_table_without_images_has_a_clear_error():
    records = Records.from_records(make_records(5), FINDINGS, dataset="d")
    with pytest.raises(CxrError, match="this table of d has no images"):
        records.image(0)


_DERIVED = ("width", "height")  # follow from the image, whose digest is included


@given(st.integers(0, 49), st.sampled_from([f.name for f in dataclasses.fields(Record) if f.name not in _DERIVED]))
def test_fingerprint_depends_on_every_field(row, name):
    records = make_records(50)
    other = {"age": 99.0, "labels": (1, 1, 1), "boxes": (Box("Mass", 0, 0, 1, 1),), "sha256": "f" * 64}.get(
        name, "other"
    )
    changed = [*records[:row], dataclasses.replace(records[row], **{name: other}), *records[row + 1 :]]
    assert compute_fingerprint(records) == compute_fingerprint(make_records(50))
    assert compute_fingerprint(changed) != compute_fingerprint(records)


def test_original_sizes_are_known_for_all_images_or_none():
    sized = [dataclasses.replace(record, width=100 + k, height=200 + k) for k, record in enumerate(make_records(5))]
    records = Records.from_records(sized, FINDINGS, dataset="d")
    assert records.original_sizes.tolist() == [[100 + k, 200 + k] for k in range(5)]
    assert Records.from_records([*sized, *make_records(1)], FINDINGS, dataset="d").original_sizes is None


@pytest.mark.parametrize("size", [None, 8])
def test_builder_stores_the_size_of_the_source_image(tmp_path, size):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 20), np.uint8))
    [stored] = encode_file(tmp_path / "a.png", [size], "png")
    assert (stored.width, stored.height) == (20, 30)


def test_fingerprint_depends_on_order_and_stored_size(tmp_path):
    stored = store(make_records(50), tmp_path)
    assert stored.fingerprint == Records.from_records(make_records(50), FINDINGS, dataset="d", config="256").fingerprint
    assert stored.fingerprint != Records.from_records(make_records(50), FINDINGS, dataset="d", config="512").fingerprint
    assert (
        stored.fingerprint
        != Records.from_records(make_records(50)[::-1], FINDINGS, dataset="d", config="256").fingerprint
    )


def test_boxes_become_masks():
    records = Records.from_records(make_records(5), FINDINGS, dataset="d")
    mask = records.mask(2, "Mass", 16)
    assert mask is not None
    assert mask.dtype == np.bool_
    expected = np.zeros((16, 16), bool)
    expected[8:10, 4:8] = True
    expected[0:2, 12:14] = True
    np.testing.assert_array_equal(mask, expected)
    assert records.mask(2, "Nodule", 16) is None
    assert records.mask(1, "Mass", 16) is None
    with pytest.raises(CxrError, match="unknown finding 'Effusion': did you mean Pleural Effusion"):
        records.mask(2, "Effusion", 16)


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(1e-4, 1), st.floats(1e-4, 1), st.integers(1, 64))
def test_box_covers_its_fraction_of_the_mask(x, y, w, h, size):
    box = Box("Mass", x, y, min(w, 1 - x), min(h, 1 - y))
    record = dataclasses.replace(make_records(1)[0], boxes=(box,))
    mask = Records.from_records([record], FINDINGS, dataset="d").mask(0, "Mass", size)
    assert mask is not None
    rows, columns = mask.any(1).sum(), mask.any(0).sum()
    assert mask.sum() == rows * columns >= 1
    assert abs(rows - box.h * size) <= 1
    assert abs(columns - box.w * size) <= 1


def test_text_columns_are_small_in_memory():
    table = records_to_table(make_records(50), FINDINGS)
    assert all(pa.types.is_dictionary(table[name].type) for name in ("view", "sex", "source", "official"))
