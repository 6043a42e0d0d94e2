"""What a network says of images: as arrays, as a table, and for JSON."""

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
from cxrjax.inference.calibration_file import Fitted
from cxrjax.inference.image_files import is_prepared, read_prepared, resized, shape_of_prepared
from cxrjax.inference.load_run import Trained
from cxrjax.inference.mc_dropout import has_dropout, make_step
from cxrjax.metrics import tables
from cxrjax.metrics.predictions import log_odds, probabilities
from cxrjax.metrics.uncertainty import summarize_passes


@dataclass(frozen=True, eq=False)
class Classified:
    """N images, K findings.

    Attributes:
      id: unique names of the images.
      file: where each came from.
      findings: K names.
      logit: f64[N, K], log p / (1 - p).
      calibrated: f64[N, K], the probabilities at the temperatures fitted on validation; None without these.
      called: bool[N, K], whether a finding's probability is at least its threshold; the likeliest of exclusive classes.
      uncertainty: f64[N, K], of each finding, or f64[N, 1] over exclusive classes; see `measure`.
      measure: what uncertainty is, in words.
      threshold: the uncertainty of an image above which it is flagged; None where none is known.
      failed: files that could not be used, each with the reason.
      notes: what the user should know of the above, a line each.
    """

    id: tuple[str, ...]
    file: tuple[Path, ...]
    findings: tuple[str, ...]
    logit: Float64[np.ndarray, "N K"]
    calibrated: Float64[np.ndarray, "N K"] | None
    called: Bool[np.ndarray, "N K"]
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
    def of_image(self) -> Float64[np.ndarray, " N"]:
        """The uncertainty of each image: the mean over its findings."""
        return self.uncertainty.mean(1)

    @property
    def flag(self) -> Bool[np.ndarray, " N"] | None:
        """Which images are too uncertain to be trusted; None without a threshold."""
        return None if self.threshold is None else self.of_image > self.threshold

    def write(self, path: Path) -> None:
        """A table that `cxrjax score` reads.

        Columns: `id`, `file`; per finding F `prob_F`, `logit_F`, `calibrated_F` (where fitted) and `uncertainty_F` (but
        over exclusive classes); `uncertainty` of the image and, where a threshold is known, `flag`.
        """
        columns = {"id": pa.array(self.id, pa.string()), "file": pa.array(map(str, self.file), pa.string())}
        for prefix, values in self._by_finding().items():
            columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(self.findings)}
        columns["uncertainty"] = pa.array(self.of_image)
        if self.flag is not None:
            columns["flag"] = pa.array(self.flag)
        tables.write(path, pa.table(columns))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an entry per image, and what all have in common."""
        named = {"prob": "probability", "calibrated": "calibrated", "uncertainty": "uncertainty_by_finding"}
        by_finding = {named[name]: values for name, values in self._by_finding().items() if name in named}
        images = []
        for n, name in enumerate(self.id):
            image: dict[str, Any] = {"id": name, "file": str(self.file[n])}
            for key, values in by_finding.items():
                image[key] = dict(zip(self.findings, values[n].tolist(), strict=True))
            image["uncertainty"] = float(self.of_image[n])
            if self.flag is not None:
                image["flag"] = bool(self.flag[n])
            images.append(image)
        about = {"uncertainty": self.measure, "threshold": self.threshold, "notes": list(self.notes)}
        return {"images": images, "failed": self.failed, **about}

    def _by_finding(self) -> dict[str, Float64[np.ndarray, "N K"]]:
        values = {"prob": self.probability, "logit": self.logit}
        if self.calibrated is not None:
            values["calibrated"] = self.calibrated
        if self.uncertainty.shape[1] == len(self.findings):
            values["uncertainty"] = self.uncertainty
        return values


PASSES = 100


@dataclass(frozen=True)
class Manner:
    """How images are to be classified; `decide` makes one.

    Attributes:
      size: side of the images in px; 0 where only prepared ones are given.
      batch: images at once.
      passes: of Monte Carlo dropout; 0 for none.
      threshold: of uncertainty; None where none is known.
      fitted: what holds for images of this size.
      notes: what was decided that the user did not say.
    """

    size: int
    batch: int
    passes: int
    threshold: float | None
    fitted: Fitted | None
    notes: tuple[str, ...]


def decide(
    trained: Trained,
    files: Sequence[Path],
    *,
    size: int = 0,
    batch: int = 16,
    passes: int | None = None,
    threshold: float | None = None,
) -> Manner:
    """How to classify with this network.

    Args:
      trained: what to use.
      files: to be classified.
      size: side in px that images are resized to; 0 for the one trained at.
      batch: images at once, rounded up to a multiple of the devices.
      passes: of Monte Carlo dropout, where the network has some; None for as many as on validation (else 100), 0 for
        none: uncertainty is then the entropy of the probabilities.
      threshold: uncertainty above which an image is flagged; None for the one chosen on validation.

    Raises:
      CxrError: a number is out of range, or no size is known.
    """
    check_positive("batch", batch)
    if size < 0:
        raise CxrError(f"size must be a whole number above 0, not {size}")
    if passes is not None and (passes < 0 or passes == 1):
        raise CxrError(f"passes must be 0, for none, or at least 2, not {passes}: one pass shows no differences")
    side = size or trained.size
    if not side and not all(map(is_prepared, files)):
        raise CxrError("these weights do not say what size of image they were trained on: give --size, such as 224")
    fitted, notes = trained.fitted, []
    if fitted is None:
        notes.append(f"no calibrated probabilities: {trained.unfitted}")
    elif size not in (0, trained.size):
        fitted = None
        notes.append(f"no calibrated probabilities at {size} px: they were fitted at {trained.size} px")
    if not has_dropout(trained.network, (side, side) if side else shape_of_prepared(files)):
        if passes:
            notes.append("the network's head has no dropout, so there are no passes, and uncertainty is entropy")
        passes = 0
    elif passes is None:
        passes = fitted.passes if fitted else PASSES
    if threshold is None and fitted:
        threshold = fitted.deviation if passes else fitted.entropy
        if passes not in (0, fitted.passes):
            notes.append(f"the threshold of uncertainty was chosen with {fitted.passes} passes; here are {passes}")
    if threshold is None:
        notes.append("no image is flagged: no threshold of uncertainty was chosen on validation; --uncertain gives one")
    return Manner(side, batch, passes, threshold, fitted, tuple(notes))


def classify(
    trained: Trained,
    files: Sequence[Path],
    manner: Manner,
    *,
    threads: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> Classified:
    """What a network says of every image; a file that cannot be used is noted and the others go on.

    An image's result is the same in every batch and beside any other files: its dropout is drawn by its pixels.

    Args:
      trained: what to use.
      files: PNG, JPEG or DICOM, whose content decides; `.npy` files hold images prepared elsewhere, float
        N x H x W x C as the network expects them, and are used as they are.
      manner: of `decide`.
      threads: decoding threads.
      advance: told how many files are done.
    """
    run, failed = _Step(trained, manner), {}
    rows = list(_grey(run, [file for file in files if not is_prepared(file)], manner.size, threads, failed, advance))
    rows += _prepared(run, [file for file in files if is_prepared(file)], trained, failed, advance)
    place = {file: number for number, file in enumerate(files)}
    rows.sort(key=lambda row: place[row.file])  # stable: the images of one file stay in order

    shape = (len(rows), len(trained.findings))
    logit = np.array([row.logit for row in rows], np.float64).reshape(shape)
    fitted, probability = manner.fitted, expit(logit)
    calibrated = None if fitted is None else expit(fitted.temperatures.scale(logit, trained.findings))
    if manner.passes:
        uncertainty = np.array([row.deviation for row in rows], np.float64).reshape(shape)
        measure = f"standard deviation of {manner.passes} passes with dropout"
    else:
        of = probability if calibrated is None else calibrated
        uncertainty = summarize_passes([of], exclusive=trained.exclusive).entropy
        measure = f"entropy of the {'' if calibrated is None else 'calibrated '}probability, in nats"
    return Classified(
        id=_ids([row.name for row in rows]), file=tuple(row.file for row in rows), findings=trained.findings,
        logit=logit, calibrated=calibrated, called=_called(probability, trained, fitted), uncertainty=uncertainty,
        measure=measure, threshold=manner.threshold, failed=failed, notes=manner.notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """One image: its name and file, its log-odds f64[K], and the deviations f64[K] of its passes."""

    name: str
    file: Path
    logit: Float64[np.ndarray, " K"]
    deviation: Float64[np.ndarray, " K"]


class _Step:
    """Images, any number up to a batch, on the devices: log-odds f64[n, K], and the deviations of their passes."""

    def __init__(self, trained: Trained, manner: Manner):
        mesh = make_mesh(0, 1)
        self._sharding = batch_shardings(mesh)
        self._network, self._loss, self._passes = trained.network, trained.loss, manner.passes
        self._jitted, self._key = make_step(mesh, manner.passes), jax.random.key(0)
        self.batch = -(-manner.batch // mesh.shape["data"]) * mesh.shape["data"]

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-odds and deviations of each image."""
        count = len(images)
        padded = np.zeros((self.batch, *images[0].shape), images[0].dtype)
        padded[:count] = images
        numbers = np.zeros(self.batch, np.int32)
        numbers[:count] = [zlib.crc32(image.tobytes()) >> 1 for image in images]
        placed = jax.device_put(padded, self._sharding.image)
        logits, passes = self._jitted(self._network, placed, self._key, numbers)
        odds = log_odds(np.asarray(logits)[:count], self._loss)
        return zip(odds, self._deviations(passes, odds), strict=True)

    def _deviations(self, passes: jax.Array | None, odds: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n K"]:
        if passes is None:
            return np.zeros_like(odds)
        each = np.asarray(passes)[: len(odds)].swapaxes(0, 1)
        return summarize_passes(probabilities(logits, self._loss) for logits in each).std


def _grey(
    run: _Step,
    files: Sequence[Path],
    size: int,
    threads: int,
    failed: dict[str, str],
    advance: Callable[[int], None],
) -> Iterator[_Row]:
    """Rows of image files, a batch at a time."""
    pending: list[tuple[Path, np.ndarray]] = []

    def flush() -> Iterator[_Row]:
        if pending:
            for (file, _), row in zip(pending, run([image for _, image in pending]), strict=True):
                yield _Row(str(file), file, *row)
        pending.clear()

    for file, outcome in resized(files, size, threads):
        try:
            pending.append((file, outcome.result()[..., None]))
        except CxrError as error:
            failed[str(file)] = str(error)
        if len(pending) == run.batch:
            yield from flush()
        advance(1)
    yield from flush()


def _prepared(
    run: _Step,
    files: Sequence[Path],
    trained: Trained,
    failed: dict[str, str],
    advance: Callable[[int], None],
) -> Iterator[_Row]:
    """Rows of files that hold images prepared elsewhere, file by file."""
    for file in files:
        rows: list[_Row] = []
        try:
            images = read_prepared(file, trained.network.input_spec)
            for first in range(0, len(images), run.batch):
                part = np.asarray(images[first : first + run.batch]).astype(trained.network.dtype)
                rows += [_Row(f"{file}[{first + k}]", file, *row) for k, row in enumerate(run(part))]
        except CxrError as error:
            failed[str(file)] = str(error) if str(error).startswith(str(file)) else f"{file}: {error}"
        else:
            yield from rows
        advance(1)


def _called(
    probability: Float64[np.ndarray, "N K"], trained: Trained, fitted: Fitted | None
) -> Bool[np.ndarray, "N K"]:
    """Which findings are there by validation's thresholds, or else one half; of exclusive classes the likeliest."""
    if trained.exclusive:
        return np.arange(probability.shape[1]) == probability.argmax(1)[:, None]
    if fitted is None:
        return probability >= 0.5
    return probability >= np.array([np.inf if each is None else each for each in fitted.thresholds])


def _ids(names: Sequence[str]) -> tuple[str, ...]:
    """File names, as data sets name images; whole paths where those are not unique."""
    short = tuple(Path(name).name for name in names)
    return short if len(set(short)) == len(short) else tuple(names)
