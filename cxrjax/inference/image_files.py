"""Image files of any origin: found in folders, and read a few ahead of their use."""

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


def is_prepared(file: Path) -> bool:
    """Whether a file holds images that were prepared elsewhere, as the network expects them."""
    return file.suffix.lower() == PREPARED


def read_grey(file: Path) -> UInt8[np.ndarray, "H W"]:
    """A PNG, JPEG or DICOM radiograph; the content decides.

    Raises:
      CxrError: it cannot be read.
    """
    try:
        return decode(file.read_bytes(), str(file))
    except OSError as error:
        raise CxrError(f"{file}: {error.strerror}") from None


def resized(files: Sequence[Path], size: int, threads: int) -> Iterator[tuple[Path, Future]]:
    """Each file with its decoded image at size x size px to come, a few ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[Path, Future]] = deque()
        for file in files:
            ahead.append((file, pool.submit(lambda file: resize(read_grey(file), size), file)))
            if len(ahead) > 4 * threads:
                yield ahead.popleft()
        yield from ahead


def shape_of_prepared(files: Sequence[Path]) -> tuple[int, int]:
    """Height and width of the first prepared images that can be read; (0, 0) where none can."""
    for file in files:
        try:
            shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
        except (OSError, ValueError):
            continue
        if len(shape) == 4:
            return shape[1], shape[2]
    return 0, 0


def read_prepared(file: Path, inputs: InputSpec) -> Float[np.ndarray, "N H W C"]:
    """Images that are normalised already; they stay on disk until they are used.

    Raises:
      CxrError: no array of floats N x H x W x C with values that this network can expect.
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
        check_range(images, inputs)
    except CxrError as error:
        raise CxrError(f"{file}: {error}") from None
    return images
