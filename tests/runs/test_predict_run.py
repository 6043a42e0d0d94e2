"""`cxrjax predict` on files of every kind, good and bad, against SciPy and the network itself."""

import json
import zlib

import cv2
import jax
import numpy as np
import pyarrow.csv
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, softmax
from scipy.stats import entropy

from cxrjax import config as configs
from cxrjax.cli.main import main
from cxrjax.data.images import decode, encode
from cxrjax.data.records import open_records
from cxrjax.explain.localisation import normalise
from cxrjax.explain.saliency import saliency
from cxrjax.inference.load_run import load_model
from cxrjax.metrics.predictions import Predictions
from cxrjax.models.input_spec import prepare
from cxrjax.train.loop import train

SIX = (
    "data.dataset=six_class", "data.stored_size=32", "data.image_size=32", "data.num_threads=1", "split.name=official",
    "train.batch_size=4", "train.steps_per_epoch=4", "train.epochs=1", "mesh.data=1", "loss.name=cross_entropy",
    "model.name=sequential_cnn",
    "model.options.image_size=32", "model.options.widths=(4,4,4)", "model.options.dropout=0.0",
    "optimizer.schedule=constant", "optimizer.warmup_fraction=0",
)  # fmt: skip


def trained(directory, overrides, *, evaluated=True):
    train(configs.load_config("demo:32", overrides), directory)
    if evaluated:
        assert main(["evaluate", str(directory), "--resamples", "0"]) == 0
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_overrides):
    """A run of a network without dropout, evaluated."""
    return trained(tmp_path_factory.mktemp("runs") / "run", [*tiny_overrides, "train.epochs=1"])


@pytest.fixture(scope="module")
def dropout_run(tmp_path_factory, tiny_overrides):
    """A run of a network with dropout, evaluated with 8 passes."""
    more = ("train.epochs=1", "model.options.dropout=0.4", "study.passes=8")
    return trained(tmp_path_factory.mktemp("runs") / "dropping", [*tiny_overrides, *more])


@pytest.fixture(scope="module")
def six(tmp_path_factory, six_classes):
    """A run of a network of six exclusive classes, evaluated."""
    directory = tmp_path_factory.mktemp("runs") / "six"
    config = configs.load_config("sequential_cnn", [f"data.data_dir={six_classes}", *SIX])
    train(config, directory)
    assert main(["evaluate", str(directory), "--resamples", "0"]) == 0
    return directory


@pytest.fixture(scope="module")
def grey(phantom_data):
    """Five grey images, u8[5, 32, 32], no two alike."""
    records = open_records(phantom_data, "cxr_phantom", "32")
    return np.stack([records.image(row) for row in range(5)])


@pytest.fixture
def folder(grey, tmp_path):
    """Five images: PNG, PNG of 16 x the size, JPEG, DICOM, DICOM without an ending; and three files that are none."""
    image_folder = tmp_path / "images"
    image_folder.mkdir()
    (image_folder / "a.png").write_bytes(encode(grey[0]))
    (image_folder / "b.png").write_bytes(encode(np.kron(grey[1], np.ones((4, 4), np.uint8))))
    (image_folder / "c.jpg").write_bytes(encode(grey[2], "jpeg"))
    (image_folder / "d.dcm").write_bytes(dicom(grey[3]))
    (image_folder / "e.dicom").write_bytes(dicom(grey[4]))
    return image_folder


def dicom(image) -> bytes:
    """An inverted 12-bit radiograph, as pydicom writes it."""
    import io

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, "1.2.3"
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    file: Dataset = FileDataset("", {}, bytes(128), meta)
    file.Modality, file.PhotometricInterpretation, file.SamplesPerPixel = "DX", "MONOCHROME1", 1
    file.Rows, file.Columns = image.shape
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.PixelData = (4095 - 16 * image.astype(np.uint16)).tobytes()
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def predict(capsys, tmp_path, *arguments):
    """Exit code, the JSON, and all that was printed as one line."""
    code = main(["predict", *map(str, arguments), "--json", str(tmp_path / "p.json")])
    text = " ".join("".join(capsys.readouterr()).split())
    return code, json.loads((tmp_path / "p.json").read_text()), text


def column(result, name):
    values = [image[name] for image in result["images"]]
    return np.array([list(value.values()) if isinstance(value, dict) else value for value in values])


def network_says(directory, images):
    network = load_model(directory).network
    return np.asarray(jax.jit(lambda x: network.apply(x)[0])(images[..., None]), np.float64)


def test_every_kind_of_file_and_a_table_of_all_numbers(run, folder, grey, tmp_path, capsys):
    code, result, text = predict(capsys, tmp_path, run, folder, "--out", tmp_path / "p.csv")
    assert code == 0, text
    assert [image["id"] for image in result["images"]] == ["a.png", "b.png", "c.jpg", "d.dcm", "e.dicom"]
    seen = [grey[0], grey[1], *(decode((folder / name).read_bytes(), name) for name in ("c.jpg", "d.dcm", "e.dicom"))]
    stretched = (grey[3].astype(float) - grey[3].min()) * 255 / np.ptp(grey[3])
    np.testing.assert_allclose(seen[3], stretched, atol=0.51)
    logits = network_says(run, np.stack(seen))
    np.testing.assert_allclose(column(result, "probability"), expit(logits), atol=1e-5)

    table = pyarrow.csv.read_csv(tmp_path / "p.csv").to_pydict()
    findings = load_model(run).findings
    prefixes = ("prob", "logit", "calibrated", "uncertainty")
    expected = {"id", "file", "uncertainty", "flag"} | {f"{prefix}_{f}" for prefix in prefixes for f in findings}
    assert set(table) == expected
    assert table["file"][3] == str(folder / "d.dcm")
    for k, finding in enumerate(findings):
        np.testing.assert_allclose(table[f"prob_{finding}"], column(result, "probability")[:, k])
        np.testing.assert_allclose(table[f"calibrated_{finding}"], column(result, "calibrated")[:, k])
    assert table["flag"] == [image["flag"] for image in result["images"]]
    np.testing.assert_allclose(Predictions.read(tmp_path / "p.csv").logit, logits, rtol=1e-4, atol=1e-5)


def test_calibration_and_threshold_come_from_validation(run, folder, tmp_path, capsys):
    _, result, text = predict(capsys, tmp_path, run, folder)
    assert main(["evaluate", str(run), "--split", "validation", "--resamples", "0"]) == 0
    validation = Predictions.read(run / "predictions" / "validation.parquet")
    calibrated, everywhere = column(result, "calibrated"), []
    odds = np.log(column(result, "probability") / (1 - column(result, "probability")))
    for k in range(len(validation.findings)):
        label_mask = validation.label_mask[:, k]
        signed = np.where(validation.label[label_mask, k] > 0, 1, -1) * validation.logit[label_mask, k]
        best = minimize_scalar(lambda s, z=signed: -log_expit(s * z).mean(), bounds=(0.01, 100), method="bounded",
                               options={"xatol": 1e-9}).x  # fmt: skip
        np.testing.assert_allclose(calibrated[:, k], expit(best * odds[:, k]), atol=1e-4)
        everywhere.append(expit(best * validation.logit[:, k]))
    unsure = entropy(np.stack([everywhere, 1 - np.array(everywhere)]), axis=0).mean(0)
    assert result["threshold"] == pytest.approx(np.sort(unsure)[int(np.ceil(0.9 * len(unsure))) - 1], abs=1e-4)
    ours = entropy(np.stack([calibrated, 1 - calibrated]), axis=0)
    np.testing.assert_allclose(column(result, "uncertainty_by_finding"), ours, atol=1e-9)
    np.testing.assert_allclose(column(result, "uncertainty"), ours.mean(1), atol=1e-9)
    np.testing.assert_array_equal(column(result, "flag"), ours.mean(1) > result["threshold"])
    assert "entropy of the calibrated probability" in text


def test_without_evaluation_there_is_no_calibration(folder, tmp_path, tiny_overrides, capsys):
    run = trained(tmp_path / "run", [*tiny_overrides, "train.epochs=1"], evaluated=False)
    code, result, text = predict(capsys, tmp_path, run, folder, "--out", tmp_path / "p.parquet")
    assert code == 0
    assert "calibrated" not in result["images"][0]
    assert "flag" not in result["images"][0]
    assert (
        f"no calibrated probabilities: there is no {run / 'calibration.json'}: run `cxrjax evaluate {run}` to fit it"
        in text
    )
    assert "no image is flagged" in text
    assert "entropy of the probability" in text
    names = pyarrow.parquet.read_schema(tmp_path / "p.parquet").names
    assert not any(name.startswith(("calibrated", "flag")) for name in names)
    _, result, _ = predict(capsys, tmp_path, run, folder, "--uncertainty-threshold", "0.2")
    np.testing.assert_array_equal(column(result, "flag"), column(result, "uncertainty") > 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored["checkpoint"].update(step=1), "is of another checkpoint (step 1): run `cxrjax evaluate"),
        (lambda stored: stored.pop("entropy"), "cannot be read"),
        (lambda stored: stored["temperatures"].pop("values"), "cannot be read"),
    ],
)
def test_a_calibration_that_does_not_fit_is_ignored(run, folder, tmp_path, capsys, change, message):
    original = (run / "calibration.json").read_text()
    stored = json.loads(original)
    change(stored)
    (run / "calibration.json").write_text(json.dumps(stored))
    try:
        code, result, text = predict(capsys, tmp_path, run, folder)
    finally:
        (run / "calibration.json").write_text(original)
    assert code == 0
    assert message in text
    assert "calibrated" not in result["images"][0]


def test_other_sizes_are_not_calibrated(run, folder, tmp_path, capsys):
    _, result, text = predict(capsys, tmp_path, run, folder, "--size", 24)
    assert "no calibrated probabilities at 24 px: they were fitted at 32 px" in text
    assert "calibrated" not in result["images"][0]


def test_dropout_depends_on_the_image_alone(dropout_run, folder, grey, tmp_path, capsys):
    _, result, text = predict(capsys, tmp_path, dropout_run, folder)
    assert "standard deviation of 8 passes with dropout" in text
    network = load_model(dropout_run).network

    @jax.jit
    def passes(network, image, number):
        model = network.model()
        features = model.features(prepare(image[None, ..., None], network.input_spec, network.dtype))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 8)
        return [model.head(features, key=key)[0] for key in keys]

    drawn = np.asarray(passes(network, grey[0], zlib.crc32(grey[0].tobytes()) >> 1), np.float64)
    np.testing.assert_allclose(column(result, "uncertainty_by_finding")[0], expit(drawn).std(0), atol=1e-6)
    np.testing.assert_allclose(column(result, "uncertainty"), column(result, "uncertainty_by_finding").mean(1))
    np.testing.assert_array_equal(column(result, "flag"), column(result, "uncertainty") > result["threshold"])
    assert json.loads((dropout_run / "calibration.json").read_text())["deviation"] == result["threshold"]

    files = sorted(folder.iterdir())
    for arguments in ([folder, "--batch-size", 1], [folder, "--batch-size", 64], files[::-1], [files[3]]):
        _, other, _ = predict(capsys, tmp_path, dropout_run, *arguments)
        ours = {image["id"]: image for image in result["images"]}
        for image in other["images"]:
            for name in ("probability", "calibrated", "uncertainty_by_finding"):
                theirs = list(ours[image["id"]][name].values())
                np.testing.assert_allclose(list(image[name].values()), theirs, rtol=1e-5, atol=1e-7)


def test_number_of_passes(dropout_run, run, folder, tmp_path, capsys):
    _, result, text = predict(capsys, tmp_path, dropout_run, folder, "--passes", 4)
    assert "standard deviation of 4 passes" in text
    assert "the uncertainty threshold was chosen with 8 passes, not 4" in text
    _, result, text = predict(capsys, tmp_path, dropout_run, folder, "--passes", 0)
    assert result["uncertainty"] == "entropy of the calibrated probability, in nats"
    _, result, text = predict(capsys, tmp_path, run, folder, "--passes", 4)
    assert "the network's head has no dropout" in text
    assert result["uncertainty"].startswith("entropy")
    assert main(["predict", str(dropout_run), str(folder), "--passes", "1"]) == 1
    assert "at least 2, not 1" in capsys.readouterr().err


def test_exclusive_classes_sum_to_one(six, folder, grey, tmp_path, capsys):
    code, result, text = predict(
        capsys, tmp_path, six, folder, "--out", tmp_path / "p.csv", "--overlays", tmp_path / "cams"
    )
    assert code == 0, text
    np.testing.assert_allclose(column(result, "probability").sum(1), 1, atol=1e-6)
    logits = network_says(six, grey[:2])
    np.testing.assert_allclose(column(result, "probability")[:2], softmax(logits, axis=1), atol=1e-5)
    [temperature] = set(json.loads((six / "calibration.json").read_text())["temperatures"]["values"])
    np.testing.assert_allclose(column(result, "calibrated")[:2], softmax(logits / temperature, axis=1), atol=1e-5)
    np.testing.assert_allclose(column(result, "uncertainty"), entropy(column(result, "calibrated"), axis=1), atol=1e-6)
    assert "uncertainty_by_finding" not in result["images"][0]
    for image in result["images"]:
        assert list(image["overlays"]) == [max(image["probability"], key=image["probability"].get)]
    assert len(list((tmp_path / "cams").rglob("*.png"))) == 5


def test_overlays_of_findings_above_their_thresholds(run, folder, grey, tmp_path, capsys):
    _, result, text = predict(capsys, tmp_path, run, folder, "--overlays", tmp_path / "cams", "--batch-size", 2)
    thresholds = json.loads((run / "calibration.json").read_text())["thresholds"]
    limits = np.array([np.inf if limit is None else limit for limit in thresholds])
    findings, written = load_model(run).findings, 0
    for image, probability in zip(result["images"], column(result, "probability"), strict=True):
        assert list(image["overlays"]) == [f for f, above in zip(findings, probability >= limits, strict=True) if above]
        for finding, path in image["overlays"].items():
            assert path == str(tmp_path / "cams" / finding / f"{image['id'].removesuffix('.png')}.png")
            assert cv2.imread(path).shape == (320, 320, 3)
            written += 1
    assert written == len(list((tmp_path / "cams").rglob("*.*")))
    assert f"{written} overlays" in text


def test_overlays_of_named_findings_show_their_maps(run, grey, tmp_path, capsys):
    wide = np.kron(grey[1], np.ones((20, 30), np.uint8))
    (tmp_path / "wide.png").write_bytes(encode(wide))
    arguments = (run, tmp_path / "wide.png", "--overlays", tmp_path / "cams", "--findings", "Mass,Cardiomegaly")
    _, result, _ = predict(capsys, tmp_path, *arguments)
    assert list(result["images"][0]["overlays"]) == ["Cardiomegaly", "Mass"]
    picture = cv2.imread(str(tmp_path / "cams" / "Mass" / "wide.png")).astype(float)
    assert picture.shape == (640, 960, 3)
    index = load_model(run).findings.index("Mass")
    heat = normalise(saliency(load_model(run).network, grey[1:2, ..., None], [index]))[0, 0]
    coloured = cv2.resize((picture.max(2) - picture.min(2)), heat.shape[::-1], interpolation=cv2.INTER_AREA)
    if heat.max() > 0:
        assert np.corrcoef(coloured.ravel(), heat.ravel())[0, 1] > 0.3
    else:
        assert coloured.max() < 1
    np.save(tmp_path / "x.npy", prepare(grey[:1, ..., None], load_model(run).network.input_spec, np.float32))
    code, result, _ = predict(capsys, tmp_path, run, tmp_path / "x.npy", *arguments[2:])
    assert (code, result["images"][0]["overlays"]) == (0, {})


def test_bad_files_fail_alone_with_exit_code_1(run, folder, tmp_path, capsys):
    (folder / "0.png").write_bytes(b"")
    (folder / "bb.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "z.dcm").write_bytes(dicom(np.zeros((8, 8)))[:200])
    (folder / "nobody.jpg").symlink_to(folder / "nothing.jpg")
    code, result, text = predict(
        capsys, tmp_path, run, folder, folder / "a.png", "--out", tmp_path / "p.csv", "--batch-size", 2
    )
    assert code == 1
    assert [image["id"] for image in result["images"]] == ["a.png", "b.png", "c.jpg", "d.dcm", "e.dicom"]
    assert set(result["failed"]) == {str(folder / name) for name in ("0.png", "bb.png", "z.dcm")}
    assert "3 failed: " in text
    assert len(pyarrow.csv.read_csv(tmp_path / "p.csv")) == 5


def test_only_bad_files_write_nothing(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "worse.dcm").write_bytes(bytes(128) + b"DICM")
    arguments = (run, tmp_path, "--out", tmp_path / "p.csv", "--overlays", tmp_path / "cams")
    code, result, text = predict(capsys, tmp_path, *arguments)
    assert code == 1
    assert (result["images"], len(result["failed"])) == ([], 2)
    assert "no image could be read; nothing is written" in text
    assert "2 failed: " in text
    assert not (tmp_path / "p.csv").exists()
    assert not (tmp_path / "cams").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.txt"], "x.txt: the name must end in .parquet, .csv or .csv.gz"),
        (["--findings", "Mass"], "give --overlays DIR too"),
        (["--overlays", "FILE"], "is a file: give --overlays a folder"),
    ],
)
def test_bad_arguments_fail_before_any_work(tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / "file") if word == "FILE" else word for word in arguments]
    assert main(["predict", str(tmp_path / "no-run"), str(tmp_path / "no-image.png"), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_unknown_finding_fails_before_images_are_read(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    arguments = [str(run), str(tmp_path / "bad.png"), "--overlays", str(tmp_path / "cams"), "--findings", "Mas"]
    assert main(["predict", *arguments]) == 1
    assert "did you mean Mass" in capsys.readouterr().err
