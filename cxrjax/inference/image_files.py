"""Find image files of any origin in folders, and decode them ahead of their use."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from cxrjax.data.images import decode, resize
from cxrjax.errors import CxrError
from cxrjax.models.input_spec import InputSpec, check_range

IMAGES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
PREPARED = ".npy"


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and every image in the given folders, in order.

    Raises:
      CxrError: a path does not exist, or there are no images.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise CxrError(f"{path} does not exist")
        images = (f for f in path.rglob("*") if f.suffix.lower() in IMAGES and not f.name.startswith("."))
        files += sorted(f for f in images if f.is_file()) if path.is_dir() else [path]
    if not files:
        raise CxrError(f"no images in {', '.join(map(str, paths))}: looked for {', '.join(IMAGES)}")
    return list(dict.fromkeys(files))


def is_prepared(file: Path) -> bool:
    """Return whether a file holds images that are already prepared for a network."""
    return file.suffix.lower() == PREPARED


def read_grey(file: Path) -> UInt8[np.ndarray, "H W"]:
    """Read a PNG, JPEG or DICOM radiograph; the type is detected from the content.

    Raises:
      CxrError: the file cannot be read.
    """
    try:
        return decode(file.read_bytes(), str(file))
    except OSError as error:
        raise CxrError(f"{file}: {error.strerror}") from None


def read_resized(files: Sequence[Path], size: int, threads: int) -> Iterator[tuple[Path, Future]]:
    """Yield each file with a future of its image at size x size px; some are decoded ahead."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Path, Future]] = deque()
        for file in files:
            pending.append((file, pool.submit(lambda file: resize(read_grey(file), size), file)))
            if len(pending) > 4 * threads:
                yield pending.popleft()
        yield from pending


def prepared_size(files: Sequence[Path]) -> tuple[int, int]:
    """Return height and width of the first readable prepared images; (0, 0) if there are none."""
    for file in files:
        try:
            shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
        except (OSError, ValueError):
            continue
        if len(shape) == 4:
            return shape[1], shape[2]
    return 0, 0


def read_prepared(file: Path, input_spec: InputSpec) -> Float[np.ndarray, "N H W C"]:
    """Open normalised images as a memory-mapped array.

    Raises:
      CxrError: not an array of floats N x H x W x C with values in the network's input range.
    """
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CxrError(f"{file}: not a NumPy array ({error})") from None
    if not np.issubdtype(images.dtype, np.floating):
        raise CxrError(f"{file}: holds {images.dtype}; prepared images are floats (give grey images as PNG)")
    if images.ndim != 4 or not images.size:
        raise CxrError(f"{file}: holds an array of shape {images.shape}; prepared images are N x H x W x C")
    try:
        check_range(images, input_spec)
    except CxrError as error:
        raise CxrError(f"{file}: {error}") from None
    return images
