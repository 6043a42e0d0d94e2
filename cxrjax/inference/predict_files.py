"""Classify image files with a loaded model: arrays, a table, and JSON."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64
from scipy.special import expit

from cxrjax.distributed.mesh import batch_shardings, make_mesh
from cxrjax.errors import CxrError, check_positive
from cxrjax.inference.calibration_file import Calibration
from cxrjax.inference.image_files import is_prepared, prepared_size, read_prepared, read_resized
from cxrjax.inference.load_run import LoadedModel
from cxrjax.inference.mc_dropout import has_dropout, make_step, summarize_passes
from cxrjax.metrics import tables
from cxrjax.metrics.predictions import log_odds, probabilities

DEFAULT_PASSES = 100


@dataclass(frozen=True, eq=False)
class FilePredictions:
    """Predictions for N images and K findings.

    Attributes:
      id: unique names of the images.
      file: the file of each image.
      findings: K names.
      logit: f64[N, K], log p / (1 - p).
      calibrated: f64[N, K], probabilities at the temperatures fitted on validation; None without a calibration.
      positive: bool[N, K], whether a finding's probability reaches its threshold; the most likely of exclusive classes.
      uncertainty: f64[N, K], per finding, or f64[N, 1] for exclusive classes; see `measure`.
      measure: description of the uncertainty.
      threshold: uncertainty above which an image is flagged; None if unknown.
      failed: files that could not be read, with the reasons.
      notes: what the user should know about these predictions.
    """

    id: tuple[str, ...]
    file: tuple[Path, ...]
    findings: tuple[str, ...]
    logit: Float64[np.ndarray, "N K"]
    calibrated: Float64[np.ndarray, "N K"] | None
    positive: Bool[np.ndarray, "N K"]
    uncertainty: Float64[np.ndarray, "N k"]
    measure: str
    threshold: float | None
    failed: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def probability(self) -> Float64[np.ndarray, "N K"]:
        """The logistic function of the logits, 0 to 1."""
        return expit(self.logit)

    @property
    def image_uncertainty(self) -> Float64[np.ndarray, " N"]:
        """The uncertainty of each image: the mean over its findings."""
        return self.uncertainty.mean(1)

    @property
    def flag(self) -> Bool[np.ndarray, " N"] | None:
        """Which images are too uncertain to be trusted; None without a threshold."""
        return None if self.threshold is None else self.image_uncertainty > self.threshold

    def write(self, path: Path) -> None:
        """Write a table that `cxrjax score` reads.

        Columns: `id`, `file`; for each finding F `prob_F`, `logit_F`, `calibrated_F` (with a calibration) and
        `uncertainty_F` (not for exclusive classes); `uncertainty` of the image and, if a threshold is known, `flag`.
        """
        columns = {"id": pa.array(self.id, pa.string()), "file": pa.array(map(str, self.file), pa.string())}
        for prefix, values in self._by_finding().items():
            columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(self.findings)}
        columns["uncertainty"] = pa.array(self.image_uncertainty)
        if self.flag is not None:
            columns["flag"] = pa.array(self.flag)
        tables.write(path, pa.table(columns))

    def as_dict(self) -> dict[str, Any]:
        """Return the predictions ready for JSON: an entry per image, and what applies to all."""
        keys = {"prob": "probability", "calibrated": "calibrated", "uncertainty": "uncertainty_by_finding"}
        by_finding = {keys[name]: values for name, values in self._by_finding().items() if name in keys}
        images = []
        for n, name in enumerate(self.id):
            image: dict[str, Any] = {"id": name, "file": str(self.file[n])}
            for key, values in by_finding.items():
                image[key] = dict(zip(self.findings, values[n].tolist(), strict=True))
            image["uncertainty"] = float(self.image_uncertainty[n])
            if self.flag is not None:
                image["flag"] = bool(self.flag[n])
            images.append(image)
        common = {"uncertainty": self.measure, "threshold": self.threshold, "notes": list(self.notes)}
        return {"images": images, "failed": self.failed, **common}

    def _by_finding(self) -> dict[str, Float64[np.ndarray, "N K"]]:
        values = {"prob": self.probability, "logit": self.logit}
        if self.calibrated is not None:
            values["calibrated"] = self.calibrated
        if self.uncertainty.shape[1] == len(self.findings):
            values["uncertainty"] = self.uncertainty
        return values


@dataclass(frozen=True)
class PredictOptions:
    """How images are classified, see `resolve_options`.

    Attributes:
      size: side of the images, px; 0 if there are only prepared ones.
      batch_size: images per batch.
      passes: Monte Carlo dropout passes; 0 for none.
      threshold: uncertainty above which an image is flagged; None if unknown.
      calibration: the calibration for images of this size, if any.
      notes: what the user should know about these options.
    """

    size: int
    batch_size: int
    passes: int
    threshold: float | None
    calibration: Calibration | None
    notes: tuple[str, ...]


def resolve_options(
    model: LoadedModel,
    files: Sequence[Path],
    *,
    size: int = 0,
    batch_size: int = 16,
    passes: int | None = None,
    threshold: float | None = None,
) -> PredictOptions:
    """Check the options for a model, and fill in defaults.

    Args:
      model: the model to use.
      files: image files.
      size: side in px that images are resized to; 0: as in training.
      batch_size: images per batch, rounded up to a multiple of the devices.
      passes: Monte Carlo dropout passes, if the network has dropout; None: as on validation (else 100); 0: none, so
        that the uncertainty is the entropy of the probabilities.
      threshold: uncertainty above which an image is flagged; None: the one chosen on validation.

    Raises:
      CxrError: a number is out of range, or the image size is unknown.
    """
    check_positive("batch size", batch_size)
    if size < 0:
        raise CxrError(f"size must be a whole number above 0, not {size}")
    if passes is not None and (passes < 0 or passes == 1):
        raise CxrError(f"passes must be 0, for none, or at least 2, not {passes}: one pass has no spread")
    side = size or model.size
    if not side and not all(map(is_prepared, files)):
        raise CxrError("these weights do not record the image size they were trained on: give --size, such as 224")
    calibration, notes = model.calibration, []
    if calibration is None:
        notes.append(f"no calibrated probabilities: {model.uncalibrated}")
    elif size not in (0, model.size):
        calibration = None
        notes.append(f"no calibrated probabilities at {size} px: they were fitted at {model.size} px")
    if not has_dropout(model.network, (side, side) if side else prepared_size(files)):
        if passes:
            notes.append("the network's head has no dropout, so uncertainty is entropy instead of the spread of passes")
        passes = 0
    elif passes is None:
        passes = calibration.passes if calibration else DEFAULT_PASSES
    if threshold is None and calibration:
        threshold = calibration.deviation if passes else calibration.entropy
        if passes not in (0, calibration.passes):
            notes.append(f"the uncertainty threshold was chosen with {calibration.passes} passes, not {passes}")
    if threshold is None:
        notes.append("no image is flagged: there is no threshold from validation; set --uncertainty-threshold")
    return PredictOptions(side, batch_size, passes, threshold, calibration, tuple(notes))


def predict_images(
    model: LoadedModel,
    files: Sequence[Path],
    options: PredictOptions,
    *,
    threads: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> FilePredictions:
    """Classify every image; files that cannot be read are listed in the result.

    The result of an image does not depend on the batch or on other files: its pixels seed its dropout.

    Args:
      model: the model to use.
      files: PNG, JPEG or DICOM files, detected by content; `.npy` files hold prepared images, float N x H x W x C as
        the network expects them, and are used unchanged.
      options: see `resolve_options`.
      threads: decoding threads.
      advance: called with the number of finished files.
    """
    step, failed = _Step(model, options), {}
    rows = list(_grey_rows(step, [f for f in files if not is_prepared(f)], options.size, threads, failed, advance))
    rows += _prepared_rows(step, [f for f in files if is_prepared(f)], model, failed, advance)
    order = {file: number for number, file in enumerate(files)}
    rows.sort(key=lambda row: order[row.file])  # stable: the images of one file stay in order

    shape = (len(rows), len(model.findings))
    logit = np.array([row.logit for row in rows], np.float64).reshape(shape)
    calibration, probability = options.calibration, expit(logit)
    calibrated = None if calibration is None else expit(calibration.temperatures.scale(logit, model.findings))
    if options.passes:
        uncertainty = np.array([row.deviation for row in rows], np.float64).reshape(shape)
        measure = f"standard deviation of {options.passes} passes with dropout"
    else:
        best = probability if calibrated is None else calibrated
        uncertainty = summarize_passes([best], exclusive=model.exclusive).entropy
        measure = f"entropy of the {'' if calibrated is None else 'calibrated '}probability, in nats"
    return FilePredictions(
        id=_unique_names([row.name for row in rows]), file=tuple(row.file for row in rows), findings=model.findings,
        logit=logit, calibrated=calibrated, positive=_is_positive(probability, model, calibration),
        uncertainty=uncertainty, measure=measure, threshold=options.threshold, failed=failed, notes=options.notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """One image: its name and file, its log-odds f64[K], and the standard deviations f64[K] over its passes."""

    name: str
    file: Path
    logit: Float64[np.ndarray, " K"]
    deviation: Float64[np.ndarray, " K"]


class _Step:
    """Runs up to a batch of images on the devices; returns their log-odds f64[n, K] and deviations over the passes."""

    def __init__(self, model: LoadedModel, options: PredictOptions):
        mesh = make_mesh(0, 1)
        self._sharding = batch_shardings(mesh)
        self._network, self._loss = model.network, model.loss
        self._jitted, self._key = make_step(mesh, options.passes), jax.random.key(0)
        self.batch_size = -(-options.batch_size // mesh.shape["data"]) * mesh.shape["data"]

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return an iterator over the log-odds and deviations of each image."""
        count = len(images)
        padded = np.zeros((self.batch_size, *images[0].shape), images[0].dtype)
        padded[:count] = images
        numbers = np.zeros(self.batch_size, np.int32)
        numbers[:count] = [zlib.crc32(image.tobytes()) >> 1 for image in images]
        placed = jax.device_put(padded, self._sharding.image)
        logits, passes = self._jitted(self._network, placed, self._key, numbers)
        odds = log_odds(np.asarray(logits)[:count], self._loss)
        return zip(odds, self._deviations(passes, odds), strict=True)

    def _deviations(self, passes: jax.Array | None, odds: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n K"]:
        if passes is None:
            return np.zeros_like(odds)
        by_pass = np.asarray(passes)[: len(odds)].swapaxes(0, 1)
        return summarize_passes(probabilities(logits, self._loss) for logits in by_pass).std


def _grey_rows(
    step: _Step,
    files: Sequence[Path],
    size: int,
    threads: int,
    failed: dict[str, str],
    advance: Callable[[int], None],
) -> Iterator[_Row]:
    """Yield the rows of image files, a batch at a time."""
    pending: list[tuple[Path, np.ndarray]] = []

    def flush() -> Iterator[_Row]:
        if pending:
            for (file, _), row in zip(pending, step([image for _, image in pending]), strict=True):
                yield _Row(str(file), file, *row)
        pending.clear()

    for file, image in read_resized(files, size, threads):
        try:
            pending.append((file, image.result()[..., None]))
        except CxrError as error:
            failed[str(file)] = str(error)
        if len(pending) == step.batch_size:
            yield from flush()
        advance(1)
    yield from flush()


def _prepared_rows(
    step: _Step,
    files: Sequence[Path],
    model: LoadedModel,
    failed: dict[str, str],
    advance: Callable[[int], None],
) -> Iterator[_Row]:
    """Yield the rows of files with prepared images, file by file."""
    for file in files:
        rows: list[_Row] = []
        try:
            images = read_prepared(file, model.network.input_spec)
            for first in range(0, len(images), step.batch_size):
                batch = np.asarray(images[first : first + step.batch_size]).astype(model.network.dtype)
                rows += [_Row(f"{file}[{first + k}]", file, *row) for k, row in enumerate(step(batch))]
        except CxrError as error:
            failed[str(file)] = str(error) if str(error).startswith(str(file)) else f"{file}: {error}"
        else:
            yield from rows
        advance(1)


def _is_positive(
    probability: Float64[np.ndarray, "N K"], model: LoadedModel, calibration: Calibration | None
) -> Bool[np.ndarray, "N K"]:
    """Apply the thresholds from validation, or else 0.5; of exclusive classes the most likely is positive."""
    if model.exclusive:
        return np.arange(probability.shape[1]) == probability.argmax(1)[:, None]
    if calibration is None:
        return probability >= 0.5
    return probability >= np.array([np.inf if limit is None else limit for limit in calibration.thresholds])


def _unique_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return file names, as data sets name images, or the whole paths if file names are not unique."""
    names = tuple(Path(path).name for path in paths)
    return names if len(set(names)) == len(names) else tuple(paths)
