"""Image files through a trained network: a table, overlays, and what the terminal shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool
from PIL import Image

from cxrjax.console import progress_bar, print_text, stdout
from cxrjax.data.images import resize
from cxrjax.errors import CxrError
from cxrjax.explain.localisation import normalise
from cxrjax.explain.saliency import saliency
from cxrjax.files import atomic_path
from cxrjax.findings import positions
from cxrjax.inference.image_files import image_files, is_prepared, read_grey
from cxrjax.inference.load_run import Trained, open_trained
from cxrjax.inference.predict_files import Classified, Manner, classify, decide
from cxrjax.metrics import tables
from cxrjax.report.content import Cam
from cxrjax.report.pictures import overlay
from cxrjax.report.tables import highest

_AT_ONCE = 16  # whole images in memory
_SMALLEST, _LARGEST = 320, 1024  # px of an overlay's longer side


def predict_files(
    directory: Path,
    paths: Sequence[Path],
    *,
    size: int = 0,
    batch: int = 16,
    passes: int | None = None,
    threshold: float | None = None,
    out: Path | None = None,
    overlays: Path | None = None,
    findings: Sequence[str] = (),
) -> dict[str, Any]:
    """What a run, or converted weights, say of image files and of all images in folders.

    Args:
      directory: of a run or of converted weights.
      paths: files and folders.
      size: as `decide` takes it, and likewise `batch`, `passes` and `threshold`.
      batch: see there.
      passes: see there.
      threshold: see there.
      out: where a table goes; none is written of no image.
      overlays: where Grad-CAM overlays go, as FINDING/IMAGE.png.
      findings: of the overlays, for every image; empty for those that are above their thresholds in each.

    Returns:
      What `Classified.as_dict` gives, for JSON; with "overlays" in each image where these were asked for.

    Raises:
      CxrError: what the words themselves do wrong; files that cannot be used are listed under "failed".
    """
    if out is not None:
        tables.kind_of(out)
    if overlays is not None and overlays.exists() and not overlays.is_dir():
        raise CxrError(f"{overlays} is a file: give --overlays a folder, or a name that is free")
    if findings and overlays is None:
        raise CxrError("--findings chooses overlays: give --overlays DIR too")
    trained, files = open_trained(directory), image_files(paths)
    wanted = positions(list(findings), trained.findings)
    manner = decide(trained, files, size=size, batch=batch, passes=passes, threshold=threshold)
    with progress_bar("classifying", len(files)) as advance:
        found = classify(trained, files, manner, advance=advance)
    result = found.as_dict()
    if not found.id:
        print_text("no image could be used, and nothing is written")
        return result
    for note in found.notes:
        print_text(note)
    print_text(f"uncertainty: {found.measure}" + ("" if found.flag is None else f", flagged above {found.threshold:.4g}"))
    stdout.print(highest(found.id, found.findings, found.probability, found.flag))
    if out is not None:
        found.write(out)
        print_text(f"table: {out}")
    if overlays is not None:
        chosen = np.isin(np.arange(len(found.findings)), wanted)
        shown = np.broadcast_to(chosen, found.logit.shape) if wanted else found.called
        written = write_overlays(trained, found, manner, shown, overlays)
        for image, of_image in zip(result["images"], written, strict=True):
            image["overlays"] = {finding: str(path) for finding, path in of_image.items()}
        print_text(f"{sum(map(len, written))} overlays: {overlays}")
    return result


def write_overlays(
    trained: Trained, found: Classified, manner: Manner, shown: Bool[np.ndarray, "N K"], folder: Path
) -> list[dict[str, Path]]:
    """Grad-CAM over each image, for the findings that are to be shown of it.

    Returns:
      For each image the files written, by finding; none of prepared images, which have no picture.
    """
    written: list[dict[str, Path]] = [{} for _ in found.id]
    rows = [n for n, file in enumerate(found.file) if shown[n].any() and not is_prepared(file)]
    columns, batch = np.flatnonzero(shown[rows].any(0)).tolist(), min(manner.batch, _AT_ONCE, len(rows))
    with progress_bar("overlays", len(rows)) as advance:
        for first in range(0, len(rows), batch or 1):
            part = rows[first : first + batch]
            images = [read_grey(found.file[n]) for n in part]
            seen = [resize(image, manner.size) for image in images]
            seen += seen[-1:] * (batch - len(part))  # one shape, compiled once
            maps = normalise(saliency(trained.network, np.stack(seen)[..., None], columns))
            for n, image, of_image in zip(part, images, maps, strict=False):
                for k, cam in zip(columns, of_image, strict=True):
                    if shown[n, k]:
                        path = folder / quote(found.findings[k], safe=" ") / f"{_stem(found.id[n])}.png"
                        _write(Cam(image, cam, float(found.probability[n, k])), path)
                        written[n][found.findings[k]] = path
                advance()
    return written


def _write(cam: Cam, path: Path) -> None:
    side = min(max(_SMALLEST, *cam.image.shape), _LARGEST)
    with atomic_path(path) as temporary:
        Image.fromarray(overlay(cam, side)).save(temporary, "PNG")


def _stem(name: str) -> str:
    """An image's name as that of a file; other endings than .png stay, so that no two names become one."""
    return quote(name.removesuffix(".png"), safe=" ")
