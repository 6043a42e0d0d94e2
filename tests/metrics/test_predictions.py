"""Prediction tables: validation, round trips on disk, and the order of probabilities."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit

from cxrjax.errors import CxrError
from cxrjax.metrics import tables
from cxrjax.metrics.auc import auroc
from cxrjax.metrics.predictions import Predictions, logits_from_probabilities


def some(n=5, findings=("Mass", "Pleural Effusion")):
    rng = np.random.default_rng(0)
    return Predictions(
        id=np.array([f"{i:04}" for i in range(n)]),
        patient=np.array([f"{i // 2:02}" for i in range(n)]),
        findings=findings,
        logit=rng.normal(size=(n, len(findings))) * 30,
        label=rng.integers(0, 2, (n, len(findings))),
        label_mask=rng.random((n, len(findings))) < 0.7,
    )


def written(tmp_path, text, name="peer.csv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.csv.gz"])
def test_tables_round_trip(tmp_path, name):
    before = some()
    before.write(tmp_path / "new folder" / name)
    after = Predictions.read(tmp_path / "new folder" / name)
    assert after.findings == before.findings
    for field in ("id", "patient", "logit", "label_mask"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))  # to the last bit
    np.testing.assert_array_equal(after.label[before.label_mask], before.label[before.label_mask])
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.csv.gz"
    some().write(path)
    before = path.read_bytes()

    def half(table, file):
        file.write(b"id,pat")
        raise OSError("disk full")

    monkeypatch.setattr(tables.pyarrow.csv, "write_csv", half)
    with pytest.raises(OSError, match="disk full"):
        some(3).write(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["peer.csv", "peer.csv.gz"])
def test_an_external_file(tmp_path, name):
    path = written(tmp_path, "Image Index,prob_Mass,prob_Pleural_Thickening\n0001,0.25,1.0\n0002,0.5,0\n", name)
    table = Predictions.read(path)
    assert table.findings == ("Mass", "Pleural_Thickening")
    assert list(table.id) == list(table.patient) == ["0001", "0002"]
    np.testing.assert_allclose(table.probability, [[0.25, 1], [0.5, 0]], rtol=1e-15, atol=0)
    assert not table.label_mask.any()


def test_unsure_external_labels_do_not_count(tmp_path):
    text = "id,patient,logit_Mass,label_Mass\na,1,0.5,1.0\nb,1,-inf,0\nc,2,inf,-1\nd,2,2,\n"
    table = Predictions.read(written(tmp_path, text))
    np.testing.assert_array_equal(table.label_mask[:, 0], [True, True, False, False])
    np.testing.assert_array_equal(np.argsort(table.logit[:, 0]), [1, 0, 3, 2])
    assert np.isfinite(table.logit).all()


def test_an_external_parquet_file(tmp_path):
    path = tmp_path / "peer.parquet"
    columns = {"dicom_id": ["a", "b"], "subject_id": [10, 11], "prob_Mass": pa.array([0.5, 0.25], pa.float32())}
    pyarrow.parquet.write_table(pa.table(columns), path)
    table = Predictions.read(path)
    assert list(table.patient) == ["10", "11"]
    np.testing.assert_array_equal(table.logit[:, 0], logit([0.5, 0.25]))


probabilities = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 0.5, 1 - 2**-53])), min_size=1, max_size=30
)


@given(probabilities, st.integers(-3, 3))
def test_logits_keep_the_order_and_ties_of_probabilities(values, steps):
    p = np.array(values)
    close = np.clip(p + steps * np.spacing(p), 0, 1)  # neighbours that rounding would merge
    p = np.concatenate([p, close])
    values = logits_from_probabilities(p[:, None])[:, 0]
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(np.unique(p, return_inverse=True)[1], np.unique(values, return_inverse=True)[1])
    inside = (p > 0) & (p < 1)
    np.testing.assert_allclose(values[inside], logit(p[inside]), rtol=1e-13, atol=1e-14)


def test_auc_does_not_change_where_plain_logits_would_make_ties():
    p = 1e-200 * (1 + np.arange(8) * 2.0**-52)
    assert len(np.unique(np.log(p))) == 1
    label = np.array([0, 0, 1, 0, 1, 0, 1, 1])
    assert auroc(logits_from_probabilities(p[:, None])[:, 0], label) == auroc(p, label) == 13 / 16


def test_select():
    table = some(findings=("A", "B", "C")).select(["C", "A"])
    np.testing.assert_array_equal(table.logit, some(findings=("A", "B", "C")).logit[:, [2, 0]])
    assert table.findings == ("C", "A")
    with pytest.raises(CxrError, match="unknown finding 'B'"):
        table.select(["B"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": np.array(["a", "b", "a"])}, "row 3 repeats the id a"),
        ({"logit": np.array([[0.0], [np.nan], [0.0]])}, r"row 2 \(id b\): the logit of Mass is nan"),
        ({"logit": np.zeros((3, 2))}, r"logit has shape \(3, 2\), not \(3, 1\)"),
        ({"label": np.array([[0], [1], [2]])}, r"row 3 \(id c\): the label of Mass is 2.0, neither 0 nor 1"),
        ({"patient": np.array(["p"])}, "patient has shape"),
    ],
)
def test_invalid_tables_are_refused(change, message):
    good = {
        "id": np.array(["a", "b", "c"]), "patient": np.array(["p", "p", "q"]), "findings": ("Mass",),
        "logit": np.zeros((3, 1)), "label": np.zeros((3, 1)), "label_mask": np.ones((3, 1), bool),
    }  # fmt: skip
    Predictions(**good)
    with pytest.raises(CxrError, match=message):
        Predictions(**(good | change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,prob_Mass\na,0.5\n", "no column named 'id' or 'Image Index' or 'dicom_id'; columns are name, prob_Mass"),
        ("id,Mass\na,0.5\n", "no column named logit_FINDING or prob_FINDING; columns are id, Mass"),
        ("id,ID,prob_Mass\na,a,0.5\n", "columns 'id' and 'ID' both mean 'id'"),
        ("id,prob_Mass,Prob_mass\na,0.5,0.5\n", "columns 'prob_Mass' and 'Prob_mass' are of one finding"),
        ("id,prob_Mass\na,0.5\nb,1.5\n", r"row 2 \(id b\): the score of Mass is 1.5, not a probability"),
        ("id,prob_Mass\na,0.5\nb,\n", r"row 2 \(id b\): the score of Mass is nan, not a number"),
        ("id,logit_Mass\na,nan\nb,1\n", r"row 1 \(id a\): the score of Mass is nan, not a number"),
        ("id,prob_Mass\na,0.5\nb,high\n", "column 'prob_Mass' is 'high' in row 2, not a number"),
        ("id,prob_Mass\na,0.5\na,0.5\n", "peer.csv: row 2 repeats the id a"),
        ("id,prob_Mass\na,0.5\n,0.5\n", "column 'id' is empty in row 2"),
        ("id,prob_Mass,label_Mass\na,0.5,3\n", "column 'label_Mass' is 3 in row 1; a label is"),
        ("id,prob_Mass,prob_Edema,label_Mass\na,0.5,0.5,1\n", "no column label_Edema, though others"),
        ("id,prob_Mass\n", "has no rows"),
        ("id,prob_Mass\na,0.5,0.5\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(CxrError, match=message) as error:
        Predictions.read(path)
    assert "\n" not in str(error.value)


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(CxrError, match="no such file"):
        Predictions.read(tmp_path / "none.csv")
    with pytest.raises(CxrError, match=r"must end in .parquet, .csv or .csv.gz"):
        Predictions.read(written(tmp_path, "id", "p.xlsx"))
    with pytest.raises(CxrError, match=r"p.parquet cannot be read"):
        Predictions.read(written(tmp_path, "id,prob_Mass\n", "p.parquet"))
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"id,prob_Mass\n" + b"a,0.5\n" * 1000)[:40])
    with pytest.raises(CxrError, match=r"cut.csv.gz cannot be read"):
        Predictions.read(cut)
    with pytest.raises(CxrError, match="must end in"):
        some().write(tmp_path / "p.npz")
