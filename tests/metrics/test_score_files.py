"""Scoring of files: the published CheXNet predictions reproduce their AUCs; incompatible files are refused."""

import csv
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cxrjax.errors import CxrError
from cxrjax.findings import NIH14
from cxrjax.metrics.predictions import Predictions
from cxrjax.metrics.scores import read_labels, score_files

NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID\n"
    "00000003_000.png,Effusion|Pleural_Thickening,0,3\n"
    "00000001_000.png,No Finding,0,1\n"
    "00000001_001.png,Mass,1,1\n"
    "00000002_000.png,Effusion,0,2\n"
)
PREDICTED = (
    "Image Index,prob_Effusion,prob_Pleural Thickening\n"
    "00000001_000.png,0.1,0.2\n00000003_000.png,0.9,0.8\n00000002_000.png,0.05,0.7\n"
)


def written(tmp_path, text, name):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_published_aucs_are_reproduced_to_the_last_digits(shared):
    data = shared / "data"
    scores = score_files(
        data / "published" / "chexnet_predictions.csv.gz", data / "nih" / "Data_Entry_2017_v2020.csv.gz", resamples=0
    )
    with (data / "published" / "chexnet_aucs.csv").open() as file:
        published = {row["label"]: float(row["auc"]) for row in csv.DictReader(file)}
    assert [row.finding for row in scores.findings] == list(NIH14) == list(published)
    for row in scores.findings:
        assert row.auroc == pytest.approx(published[row.finding], abs=1e-12)
    assert (scores.images, scores.mean.findings) == (22_433, 14)
    assert scores.patients < scores.images / 3


SCRIPT = """
import sys, time
from pathlib import Path
from cxrjax.metrics.scores import score_files
scores = score_files(Path(sys.argv[1]), Path(sys.argv[2]), resamples=int(sys.argv[3]))
print(time.process_time(), scores.mean.auroc, scores.mean.auroc_interval)
print([name for name in ("jax", "flax", "grain", "matplotlib", "tensorflow", "sklearn") if name in sys.modules])
"""


@pytest.mark.parametrize(("resamples", "seconds"), [(0, 5), (1000, 60)])
def test_the_whole_process_is_quick_and_needs_no_jax(shared, resamples, seconds):
    data = shared / "data"
    files = (data / "published" / "chexnet_predictions.csv.gz", data / "nih" / "Data_Entry_2017_v2020.csv.gz")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, files), str(resamples)], capture_output=True, text=True, check=True
    )
    figures, loaded = run.stdout.splitlines()
    assert float(figures.split()[0]) < seconds  # processor time of all threads, so that a busy machine does not count
    assert loaded == "[]"


def test_images_are_joined_by_name(tmp_path):
    predicted, labels = written(tmp_path, PREDICTED, "p.csv"), written(tmp_path, NIH, "l.csv")
    scores = score_files(predicted, labels, resamples=0)
    assert [row.finding for row in scores.findings] == ["Effusion", "Pleural Thickening"]  # NIH writes an underscore
    assert [row.auroc for row in scores.findings] == [0.5, 1.0]
    assert [(row.positives, row.negatives) for row in scores.findings] == [(2, 1), (1, 2)]
    assert scores.patients == 3


def test_no_finding_can_be_predicted_too(tmp_path):
    labels = read_labels(written(tmp_path, NIH, "l.csv"), ["No_Finding", "mass"])
    np.testing.assert_array_equal(labels.label, [[0, 0], [1, 0], [0, 1], [0, 0]])


GENERIC = "id,patient,label_Effusion,Pleural Thickening,Mass\na,1,1.0,0,\nb,1,0.0,1,\nc,2,-1.0,-2,\nd,3,,,\n"
GENERIC_PREDICTED = "id,logit_Effusion,logit_Pleural_Thickening\nd,1,1\nc,2,2\nb,3,3\na,4,4\n"


def test_a_column_per_finding(tmp_path):
    labels = written(tmp_path, GENERIC, "l.csv")
    read = read_labels(labels, ["Effusion", "Pleural_Thickening", "Mass"])
    np.testing.assert_array_equal(read.label, [[1, 0, -2], [0, 1, -2], [-1, -2, -2], [-2, -2, -2]])
    predicted = written(tmp_path, GENERIC_PREDICTED, "p.csv")
    scores = score_files(predicted, labels, resamples=0)
    assert [(row.positives, row.negatives) for row in scores.findings] == [(1, 1), (1, 1)]  # what is unsure counts not
    assert [row.auroc for row in scores.findings] == [1, 0]


def test_parquet_labels(tmp_path):
    columns = {"id": ["a", "b"], "patient": ["x", "y"], "label_Mass": pa.array([1, -1], pa.int8()), "boxes": [[1], []]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "records.parquet")
    labels = read_labels(tmp_path / "records.parquet", ["Mass"])
    np.testing.assert_array_equal(labels.label, [[1], [-1]])
    assert list(labels.patient) == ["x", "y"]


def test_prediction_tables_need_no_label_file(tmp_path):
    table = Predictions(
        np.array(["a", "b"]), np.array(["1", "2"]), ("Mass",), np.array([[1.0], [0.0]]), np.array([[1], [0]]),
        np.ones((2, 1), bool),
    )  # fmt: skip
    table.write(tmp_path / "p.parquet")
    assert score_files(tmp_path / "p.parquet", resamples=0).mean.auroc == 1
    bare = written(tmp_path, PREDICTED, "p.csv")
    with pytest.raises(CxrError, match="has no labels: give a file that does with --labels"):
        score_files(bare)


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (
            PREDICTED + "x.png,0.1,0.1\ny.png,0.1,0.1\nz.png,0.1,0.1\nw.png,0.1,0.1\n", NIH,
            r"l.csv: no labels for 4 of 7 predicted images \(x.png, y.png, z.png, ...\)",
        ),
        (PREDICTED.replace("Effusion", "Effussion"), NIH, "l.csv: no finding named 'Effussion'; choose from"),
        (PREDICTED, NIH.replace("Mass", "Lump"), "l.csv: row 3 lists 'Lump', which is none of"),
        (PREDICTED, NIH + "00000002_000.png,Mass,0,2\n", "l.csv: row 5 repeats the id 00000002_000.png"),
        (PREDICTED, GENERIC.replace("Effusion", "Edema"), "l.csv: no label column for Effusion; columns are id"),
        (PREDICTED, GENERIC.replace("1.0", "0.7"), "l.csv: column 'label_Effusion' is 0.7 in row 1; a label is"),
        (PREDICTED, GENERIC.replace("1.0", "yes"), "l.csv: column 'label_Effusion' is 'yes' in row 1, not a number"),
        (PREDICTED, GENERIC, "no labels for 3 of 3 predicted images"),
        (PREDICTED, GENERIC.replace("Mass", "pleural_thickening"), "both mean 'Pleural Thickening'; keep one"),
        (PREDICTED, "name,Finding Labels\na,Mass\n", "l.csv: no column named 'id' or 'Image Index'"),
    ],
)  # fmt: skip
def test_incompatible_files_are_refused(tmp_path, predicted, labels, message):
    with pytest.raises(CxrError, match=message) as error:
        score_files(written(tmp_path, predicted, "p.csv"), written(tmp_path, labels, "l.csv"))
    assert "\n" not in str(error.value)
