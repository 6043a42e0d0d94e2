"""A trained network over image files: no prepared data set, no labels."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float64, UInt8
from scipy.special import expit

from cxrjax.data.images import decode, resize
from cxrjax.errors import CxrError
from cxrjax.evaluate import tables
from cxrjax.models.inputs import check_range
from cxrjax.models.network import Network
from cxrjax.models.options import positive
from cxrjax.parallel.mesh import batch_shardings, make_mesh
from cxrjax.train.described import best_network
from cxrjax.train.losses import log_odds
from cxrjax.train.step import make_predict_step
from cxrjax.weights import load_converted, read_converted

IMAGES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
PREPARED = ".npy"


@dataclass(frozen=True)
class Trained:
    """A network that can be used.

    Attributes:
      network: parameters and statistics.
      findings: names of its outputs.
      size: side of the images it was trained on, in px; 0 where that is unknown.
      loss: name of the loss it was trained with, which says whether the findings are exclusive.
    """

    network: Network
    findings: tuple[str, ...]
    size: int = 0
    loss: str = "bce"


@dataclass(frozen=True)
class Classified:
    """Logits f64[N, K] of N images, and the files that could not be used, each with the reason."""

    id: tuple[str, ...]
    findings: tuple[str, ...]
    logit: Float64[np.ndarray, "N K"]
    failed: dict[str, str]

    @property
    def probability(self) -> Float64[np.ndarray, "N K"]:
        """The logistic function of the logits, 0 to 1."""
        return expit(self.logit)

    def write(self, path: Path) -> None:
        """A table that `cxrjax score` reads: `id`, and per finding F `prob_F` and `logit_F`."""
        columns = {"id": pa.array(self.id, pa.string())}
        for prefix, values in (("prob", self.probability), ("logit", self.logit)):
            columns |= {f"{prefix}_{f}": pa.array(values[:, k]) for k, f in enumerate(self.findings)}
        tables.write(path, pa.table(columns))

    def as_dict(self) -> dict:
        """For JSON: one entry per image, probability by finding."""
        rows = zip(self.id, self.probability.tolist(), strict=True)
        images = [{"id": name, "probability": dict(zip(self.findings, row, strict=True))} for name, row in rows]
        return {"images": images, "failed": self.failed}


def open_trained(directory: Path) -> Trained:
    """A run's best network, or converted weights with a head; the data it was trained on need not be here.

    Raises:
      CxrError: neither a run nor converted weights, no checkpoint yet, or weights without a head.
    """
    if (directory / "card.json").is_file():
        if (directory / "config.json").exists():
            raise CxrError(f"{directory} holds a run and converted weights: move one of them away")
        card, _ = read_converted(directory)
        names = card.labels or ("",) * card.classes
        findings = tuple(name or f"output_{k}" for k, name in enumerate(names))
        return Trained(load_converted(directory), findings)
    config, findings, network = best_network(directory)
    return Trained(network, findings, config.data.size, config.loss.name)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and every image in the folders among them, in order.

    Raises:
      CxrError: a path does not exist, or nothing is found.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise CxrError(f"{path} does not exist")
        found = (f for f in path.rglob("*") if f.suffix.lower() in IMAGES and not f.name.startswith("."))
        files += sorted(f for f in found if f.is_file()) if path.is_dir() else [path]
    if not files:
        raise CxrError(f"no images in {', '.join(map(str, paths))}: looked for {', '.join(IMAGES)}")
    return list(dict.fromkeys(files))


def classify(
    trained: Trained,
    files: Sequence[Path],
    *,
    size: int = 0,
    batch: int = 16,
    threads: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> Classified:
    """Logits of every image; a file that cannot be used is noted and the others go on.

    Args:
      trained: what to use.
      files: PNG, JPEG or DICOM, whose content decides; `.npy` files hold images prepared elsewhere, float
        N x H x W x C as the network expects them, and are used as they are.
      size: side in px that images are resized to; 0 for the one trained at.
      batch: images at once, rounded up to a multiple of the devices.
      threads: decoding threads.
      advance: told how many files are done.

    Raises:
      CxrError: no size is known.
    """
    positive("batch", batch)
    if size < 0:
        raise CxrError(f"size must be a whole number above 0, not {size}")
    size = size or trained.size
    grey = [file for file in files if file.suffix.lower() != PREPARED]
    if grey and not size:
        raise CxrError("these weights do not say what size of image they were trained on: give --size, such as 224")
    found: dict[str, Float[np.ndarray, " K"]] = {}
    failed: dict[str, str] = {}
    mesh = make_mesh(0, 1)
    devices = mesh.shape["data"]
    batch = -(-batch // devices) * devices
    step, sharding = make_predict_step(mesh), batch_shardings(mesh).image
    pending: list[tuple[str, UInt8[np.ndarray, "H W"]]] = []

    def flush() -> None:
        images = np.zeros((batch, size, size, 1), np.uint8)
        for row, (_, image) in enumerate(pending):
            images[row, :, :, 0] = image
        logits = np.asarray(step(trained.network, jax.device_put(images, sharding)))
        found.update((name, logits[row]) for row, (name, _) in enumerate(pending))
        pending.clear()

    for file, outcome in _decoded(grey, size, threads):
        try:
            pending.append((str(file), outcome.result()))
        except (CxrError, OSError) as error:
            failed[str(file)] = f"{file}: {error.strerror}" if isinstance(error, OSError) else str(error)
        if len(pending) == batch:
            flush()
        advance(1)
    if pending:
        flush()
    for file in [file for file in files if file.suffix.lower() == PREPARED]:
        try:
            found.update(_prepared(trained.network, file, batch))
        except CxrError as error:
            failed[str(file)] = str(error)
        advance(1)
    names = tuple(found)
    logit = np.array([found[name] for name in names], np.float64).reshape(len(names), len(trained.findings))
    return Classified(_ids(names), trained.findings, log_odds(logit, trained.loss), failed)


def _decoded(files: Sequence[Path], size: int, threads: int) -> Iterator[tuple[Path, Future]]:
    """Each file with its decoded and resized image to come, a few ahead."""

    def load(file: Path) -> UInt8[np.ndarray, "H W"]:
        return resize(decode(file.read_bytes(), str(file)), size)

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[Path, Future]] = deque()
        for file in files:
            ahead.append((file, pool.submit(load, file)))
            if len(ahead) > 4 * threads:
                yield ahead.popleft()
        yield from ahead


def _prepared(network: Network, file: Path, batch: int) -> dict[str, Float[np.ndarray, " K"]]:
    """Logits of images that are normalised already, by `FILE[row]`."""
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CxrError(f"{file}: not a NumPy array ({error})") from None
    if not np.issubdtype(images.dtype, np.floating):
        raise CxrError(f"{file}: holds {images.dtype}; prepared images are floats (give grey images as PNG)")
    if images.ndim != 4 or not images.size:
        raise CxrError(f"{file}: holds an array of shape {images.shape}; prepared images are N x H x W x C")
    forward = jax.jit(lambda network, images: network.model()(images))
    found = {}
    for first in range(0, len(images), batch):
        part = np.asarray(images[first : first + batch], network.dtype)
        try:
            check_range(part, network.inputs)
            rows = np.asarray(forward(network, part))
        except CxrError as error:
            raise CxrError(f"{file}: {error}") from None
        found |= {f"{file}[{first + row}]": logit for row, logit in enumerate(rows)}
    return found


def _ids(names: Sequence[str]) -> tuple[str, ...]:
    """File names, as data sets name images; whole paths where those are not unique."""
    short = tuple(Path(name).name for name in names)
    return short if len(set(short)) == len(short) else tuple(names)
