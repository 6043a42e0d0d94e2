"""The stream of batches depends on examples, seed and batch number only, not on threads or processes."""

import gc
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.data.images import Augment, decode, encode, resize
from cxrjax.data.pipeline import Examples, evaluation_batches, evaluation_steps, make_examples, training_batches
from cxrjax.data.records import open_records
from cxrjax.errors import CxrError
from cxrjax.findings import LabelPolicy
from tfds_builders.prepare import prepare

EVERYTHING = Augment(flip=0.5, rotation=15, shift=0.1, zoom=0.1, shear=0.1, brightness=0.2)


class InMemoryRecords:
    """Fake `Records` with n distinct noise images."""

    findings = ("Mass", "Nodule", "Effusion")

    def __init__(self, n, size=12):
        rng = np.random.default_rng(n)
        self.id = np.array([f"image-{row}" for row in range(n)])
        self.labels = rng.integers(-2, 2, (n, 3)).astype(np.int8)
        self._bytes = [encode(image) for image in rng.integers(1, 256, (n, size, size), np.uint8)]
        self.threads = set()

    def __len__(self):
        return len(self.id)

    def image_bytes(self, row):
        self.threads.add(threading.current_thread().name)
        return self._bytes[row]

    def image(self, row, size=None):
        image = decode(self.image_bytes(row), self.id[row])
        return image if size is None else resize(image, size)


def noise_examples(n, **options) -> Examples:
    return make_examples(InMemoryRecords(n, **options), range(n), ("Effusion", "Mass"), LabelPolicy(uncertain="ignore"))


def training(data, **options):
    return training_batches(data, **({"size": 8, "batch_size": 4, "augment": EVERYTHING, "seed": 5} | options))


def take(count, batches):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(some_batches, other_batches):
    for one, other in zip(some_batches, other_batches, strict=True):
        for field, ours, theirs in zip(one._fields, one, other, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=field)


def concat_shards(shards):
    """Put the batches of all processes together to global batches."""
    return [type(same[0])(*map(np.concatenate, zip(*same, strict=True))) for same in zip(*shards, strict=True)]


def grain_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def wait_for_no_threads(patience=10):
    until = time.monotonic() + patience
    while grain_threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not grain_threads()


# --- examples


def test_examples_have_the_targets_of_the_selected_findings():
    records = InMemoryRecords(9)
    policy = LabelPolicy(uncertain="ones", not_mentioned="unknown")
    data = make_examples(records, [7, 2, 4], ["Effusion", "Mass"], policy)
    labels = records.labels[[7, 2, 4]][:, [2, 0]]
    np.testing.assert_array_equal(data.label, np.isin(labels, (1, -1)))
    np.testing.assert_array_equal(data.label_mask, labels != -2)
    np.testing.assert_array_equal(data.row, [7, 2, 4])
    assert len(data) == 3


def test_unknown_finding_is_an_error():
    with pytest.raises(CxrError, match="Efusion"):
        make_examples(InMemoryRecords(2), [0], ["Efusion"], LabelPolicy())


# --- training


def test_smoothed_targets_and_a_derived_no_finding():
    records = InMemoryRecords(40)
    policy = LabelPolicy("smooth", per_finding={"Nodule": LabelPolicy("ones")})
    data = make_examples(records, range(40), ["Nodule", "Mass", "No Finding"], policy)
    mass, nodule = records.labels[:, 0], records.labels[:, 1]
    np.testing.assert_array_equal(data.label[:, 0], np.isin(nodule, (1, -1)))
    smoothed = data.label[mass == -1, 1]
    assert len(set(smoothed.tolist())) == len(smoothed) > 3
    assert ((smoothed >= 0.55) & (smoothed <= 0.85)).all()
    np.testing.assert_array_equal(data.label[:, 2] == 1, (records.labels <= 0).all(1) & (records.labels != -1).all(1))
    alone = make_examples(records, np.flatnonzero(mass == -1)[::-1], ["Mass"], LabelPolicy("smooth"))
    np.testing.assert_array_equal(alone.label[::-1, 0], smoothed)


def test_batch_has_the_images_and_targets_of_its_records():
    data = make_examples(InMemoryRecords(10, size=8), [8, 3, 5, 6], ("Effusion", "Mass"), LabelPolicy())
    for batch in take(3, training(data, augment=Augment())):
        assert [field.dtype for field in batch] == [np.uint8, np.float32, bool, bool, np.int32]
        assert [field.shape for field in batch] == [(4, 8, 8, 1), (4, 2), (4, 2), (4,), (4,)]
        assert batch.example_mask.all()
        for i, row in enumerate(batch.record):
            np.testing.assert_array_equal(batch.image[i, :, :, 0], data.records.image(row))
            index = list(data.row).index(row)
            np.testing.assert_array_equal(batch.label[i], data.label[index])
            np.testing.assert_array_equal(batch.label_mask[i], data.label_mask[index])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_stream_is_independent_of_the_number_of_threads(threads):
    data = noise_examples(11)
    assert_same(take(9, training(data, threads=0)), take(9, training(data, threads=threads)))


@pytest.mark.parametrize("start", [1, 2, 7])
def test_stream_resumes_exactly(start):
    data = noise_examples(11)
    assert_same(take(12, training(data))[start:], take(12 - start, training(data, start=start, threads=1)))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**40))
@settings(max_examples=15, deadline=None)
def test_every_epoch_is_a_permutation(n, batch_size, seed):
    epochs = 3
    batches = take(
        -(-n * epochs // batch_size), training(noise_examples(n), batch_size=batch_size, seed=seed, threads=0)
    )
    order = np.concatenate([batch.record for batch in batches])[: n * epochs].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(n), (epochs, 1)))


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    data = noise_examples(40)

    def epochs(seed):
        batches = concat_shards([take(20, training(data, seed=seed, augment=Augment(rotation=15)))])
        record = np.concatenate([b.record for b in batches]).reshape(2, 40)
        image = np.concatenate([b.image for b in batches]).reshape(2, 40, 8, 8)
        return [(r, im[np.argsort(r)]) for r, im in zip(record, image, strict=True)]

    runs = [*epochs(0), *epochs(1)]  # the second epoch of seed 0 must not be the first of seed 1
    for (order, images), (other_order, other_images) in itertools.combinations(runs, 2):
        assert (order == other_order).mean() < 0.3
        assert not (images == other_images).all(axis=(1, 2)).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_all_processes_are_the_global_batch(processes):
    data = noise_examples(11)
    shares = [take(5, training(data, batch_size=8, shard=(p, processes), threads=p % 3)) for p in range(processes)]
    assert all(len(batch.example_mask) == 8 // processes for share in shares for batch in share)
    assert_same(concat_shards(shares), take(5, training(data, batch_size=8)))


def test_larger_images_are_shrunk_first():
    data = noise_examples(3, size=32)
    [batch] = take(1, training(data, augment=Augment()))
    np.testing.assert_array_equal(batch.image[0, :, :, 0], resize(data.records.image(batch.record[0]), 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "shard": (0, 4)}, "multiple of the 4 processes"),
        ({"batch_size": 0}, "positive"),
        ({"shard": (2, 2)}, "shard 2 of 2"),
        ({"seed": -1}, "seed -1"),
        ({"start": -1}, "first batch -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_once(options, message):
    with pytest.raises(CxrError, match=message):
        training(noise_examples(3), **options)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(CxrError, match="no records"):
        training(noise_examples(0))


# --- threads and failures


def test_work_is_done_in_threads_of_the_loader():
    data = noise_examples(11)
    batches = training(data, threads=2)
    next(batches)
    assert data.records.threads == {threading.main_thread().name}
    data.records.threads.clear()
    take(8, batches)
    assert data.records.threads
    assert all(name.startswith("grain-prefetch") for name in data.records.threads)


@pytest.mark.parametrize("how", ["close", "drop", "end"])
def test_threads_end_with_the_stream(how):
    assert wait_for_no_threads()
    batches = (
        evaluation_batches(noise_examples(9), size=8, batch_size=4) if how == "end" else training(noise_examples(5))
    )
    next(batches), next(batches)
    assert 1 <= len(grain_threads()) <= 2
    if how == "close":
        batches.close()
    elif how == "end":
        assert len(list(batches)) == 1
    else:
        del batches
        gc.collect()
    assert wait_for_no_threads()


@pytest.mark.parametrize("threads", [0, 2])
def test_unreadable_record_is_named(threads):
    data = noise_examples(12)
    data.records._bytes[7] = data.records._bytes[7][:-30]
    batches = evaluation_batches(data, size=8, batch_size=3, threads=threads)
    assert [next(batches).record.tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CxrError, match=r"^image-7: the image is truncated"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_only_a_few_batches_are_loaded_ahead():
    data = noise_examples(200, size=2)
    reads = []
    image = data.records.image
    data.records.image = lambda row, size: (reads.append(row), image(row, size))[1]
    batches = training(data, threads=2, augment=Augment())
    next(batches), next(batches)
    time.sleep(0.2)
    batches.close()
    assert 8 <= len(reads) <= 4 * (2 + 3)


# --- evaluation


@given(st.integers(0, 20), st.integers(1, 6), st.sampled_from([1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_evaluation_yields_every_record_once_in_order_over_processes(n, share, processes):
    data = make_examples(InMemoryRecords(n, size=3), np.arange(n)[::-1], ("Mass",), LabelPolicy())
    batch_size = share * processes
    shares = [
        list(evaluation_batches(data, size=3, batch_size=batch_size, shard=(p, processes), threads=p))
        for p in range(processes)
    ]
    assert {len(share) for share in shares} == {evaluation_steps(n, batch_size)}
    batches = concat_shards(shares)
    assert all(len(field) == batch_size for batch in batches for field in batch)
    whole = {f: np.concatenate([getattr(b, f) for b in batches]) for f in (batches[0]._fields if batches else ())}
    if n:
        example_mask = whole["example_mask"]
        assert example_mask[:n].all()
        assert not example_mask[n:].any()
        np.testing.assert_array_equal(whole["record"][:n], data.row)
        np.testing.assert_array_equal(whole["label"][:n], data.label)
        np.testing.assert_array_equal(whole["label_mask"][:n], data.label_mask)
        assert (whole["record"][n:] == -1).all()
        assert not whole["label_mask"][n:].any()
        assert not whole["image"][n:].any()
        for image, row in zip(whole["image"][:n], data.row, strict=True):
            np.testing.assert_array_equal(image[..., 0], data.records.image(row))


# --- prepared data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("cxr_phantom", data_dir=folder, size=64, patients=12, seed=3, workers=1)
    return open_records(folder, "cxr_phantom", "64")


def test_prepared_records_are_read_as_stored_and_resume(prepared):
    data = make_examples(prepared, range(len(prepared)), prepared.findings, LabelPolicy())
    for batch in evaluation_batches(data, size=64, batch_size=5, threads=2):
        for image, row in zip(batch.image[batch.example_mask, :, :, 0], batch.record[batch.example_mask], strict=True):
            np.testing.assert_array_equal(image, decode(prepared.image_bytes(row), "stored"))
    options = {"size": 32, "batch_size": 5, "augment": EVERYTHING, "seed": 1}
    whole = take(9, training_batches(data, threads=2, **options))
    assert_same(whole[4:], take(5, training_batches(data, threads=1, start=4, **options)))
    assert len({batch.image.tobytes() for batch in whole}) == 9
