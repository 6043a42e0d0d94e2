"""Classify image files with a trained network: a table, Grad-CAM overlays and a summary in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool

from cxrjax.console import print_text, progress_bar, stdout
from cxrjax.data.images import resize
from cxrjax.errors import CxrError
from cxrjax.explain.localisation import normalise
from cxrjax.explain.saliency import saliency
from cxrjax.findings import finding_indices
from cxrjax.inference.image_files import find_images, is_prepared, read_grey
from cxrjax.inference.load_run import LoadedModel, load_model
from cxrjax.inference.predict_files import FilePredictions, PredictOptions, predict_images, resolve_options
from cxrjax.metrics import tables
from cxrjax.report.content import Cam
from cxrjax.report.tables import likeliest_findings
from cxrjax.runs.explain_run import write_overlay

_OVERLAY_BATCH = 16  # full-size images in memory
_LARGEST_OVERLAY = 1024  # px


def predict_files(
    directory: Path,
    paths: Sequence[Path],
    *,
    size: int = 0,
    batch_size: int = 16,
    passes: int | None = None,
    threshold: float | None = None,
    out: Path | None = None,
    overlays: Path | None = None,
    findings: Sequence[str] = (),
) -> dict[str, Any]:
    """Classify image files, and all images in folders, with a run or converted weights.

    Args:
      directory: run directory, or directory of converted weights.
      paths: files and folders.
      size: side of the images, px; 0: as in training.
      batch_size: images per batch.
      passes: Monte Carlo dropout passes; None: as on validation.
      threshold: uncertainty above which an image is flagged; None: the one chosen on validation.
      out: table to write; nothing is written if no image could be read.
      overlays: folder for Grad-CAM overlays, as FINDING/IMAGE.png.
      findings: findings to overlay on every image; default: those above their thresholds in each image.

    Returns:
      `FilePredictions.as_dict()`, ready for JSON, with the overlays' paths in each image where they were asked for.
      Unreadable files are listed under "failed".

    Raises:
      CxrError: an argument is out of range, or they contradict each other.
    """
    if out is not None:
        tables.table_format(out)
    if overlays is not None and overlays.exists() and not overlays.is_dir():
        raise CxrError(f"{overlays} is a file: give --overlays a folder, or a name that is free")
    if findings and overlays is None:
        raise CxrError("--findings chooses overlays: give --overlays DIR too")
    model, files = load_model(directory), find_images(paths)
    columns = finding_indices(list(findings), model.findings)
    options = resolve_options(model, files, size=size, batch_size=batch_size, passes=passes, threshold=threshold)
    with progress_bar("classifying", len(files)) as advance:
        predictions = predict_images(model, files, options, advance=advance)
    result = predictions.as_dict()
    if not predictions.id:
        print_text("no image could be read; nothing is written")
        return result
    for note in predictions.notes:
        print_text(note)
    flagged = "" if predictions.flag is None else f", flagged above {predictions.threshold:.4g}"
    print_text(f"uncertainty: {predictions.measure}{flagged}")
    stdout.print(likeliest_findings(predictions.id, predictions.findings, predictions.probability, predictions.flag))
    if out is not None:
        predictions.write(out)
        print_text(f"table: {out}")
    if overlays is not None:
        selected = np.isin(np.arange(len(predictions.findings)), columns)
        shown = np.broadcast_to(selected, predictions.logit.shape) if columns else predictions.positive
        written = write_overlays(model, predictions, options, shown, overlays)
        for image, image_overlays in zip(result["images"], written, strict=True):
            image["overlays"] = {finding: str(path) for finding, path in image_overlays.items()}
        print_text(f"{sum(map(len, written))} overlays: {overlays}")
    return result


def write_overlays(
    model: LoadedModel,
    predictions: FilePredictions,
    options: PredictOptions,
    shown: Bool[np.ndarray, "N K"],
    folder: Path,
) -> list[dict[str, Path]]:
    """Write Grad-CAM over each image for the findings marked in `shown`.

    Returns:
      For each image the files written, by finding; none for prepared arrays, which have no image to draw on.
    """
    written: list[dict[str, Path]] = [{} for _ in predictions.id]
    rows = [n for n, file in enumerate(predictions.file) if shown[n].any() and not is_prepared(file)]
    columns = np.flatnonzero(shown[rows].any(0)).tolist()
    batch_size = min(options.batch_size, _OVERLAY_BATCH, len(rows))
    with progress_bar("overlays", len(rows)) as advance:
        for start in range(0, len(rows), batch_size or 1):
            batch = rows[start : start + batch_size]
            images = [read_grey(predictions.file[n]) for n in batch]
            inputs = [resize(image, options.size) for image in images]
            inputs += inputs[-1:] * (batch_size - len(batch))  # one shape compiles once
            maps = normalise(saliency(model.network, np.stack(inputs)[..., None], columns))
            for n, image, image_maps in zip(batch, images, maps, strict=False):
                for k, heat in zip(columns, image_maps, strict=True):
                    if shown[n, k]:
                        finding, cam = predictions.findings[k], Cam(image, heat, float(predictions.probability[n, k]))
                        finding_folder = folder / quote(finding, safe=" ")
                        written[n][finding] = write_overlay(cam, finding_folder, predictions.id[n], _LARGEST_OVERLAY)
                advance()
    return written
