"""Saliency maps of one trained run, and how well they locate findings that the data set annotates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy.special import expit

from cxrjax.console import print_text, progress_bar, stdout
from cxrjax.data.images import resize
from cxrjax.errors import CxrError
from cxrjax.explain import boxes, saliency
from cxrjax.explain.localisation import Localisation, localisation, normalise, pooled, resolvable, smooth
from cxrjax.files import atomic_path, write_json
from cxrjax.findings import finding_indices
from cxrjax.inference.load_run import load_run
from cxrjax.metrics.predictions import log_odds
from cxrjax.models.network import Network
from cxrjax.report import pictures, style, tables
from cxrjax.report.content import Cam, MapsReport
from cxrjax.report.page import hit_rates, write_page
from cxrjax.runs.evaluate_run import read_provenance
from cxrjax.train.experiment import Experiment

_MASK_SIDE = 256  # resolution at which masks are compared with maps
_SMOOTHING = 0.02  # of the image width; pixel attributions are too noisy to form regions without it
_IMAGES_ON_PAGE = 4  # per finding
_SMALLEST_OVERLAY = 320  # px


@dataclass(frozen=True)
class Cams:
    """Maps of N images and K findings: f32[N, K, h, w] >= 0; `row` indexes the records, probabilities are f64[N, K]."""

    findings: tuple[str, ...]
    row: Int[np.ndarray, " N"]
    maps: Float[np.ndarray, "N K h w"]
    probability: Float[np.ndarray, "N K"]


@dataclass(frozen=True)
class SaliencyOptions:
    """How maps are computed, and how boxes are read from them.

    Attributes:
      method: one of `saliency.METHODS`.
      threshold: fraction of a map's maximum above which a pixel is marked.
      regions: which marked regions get a box, see `boxes.detected`.
      baseline: for integrated gradients, see `saliency.baselines`.
      steps: for integrated gradients.
    """

    method: saliency.Method = "gradcam"
    threshold: float = 0.5
    regions: boxes.Regions = "peak"
    baseline: saliency.Baseline = "black"
    steps: int = saliency.STEPS

    def smoothing(self, side: int) -> float:
        """Return the standard deviation, in px, of the blur that maps of this side get before boxes are read."""
        return _SMOOTHING * side if self.method == "integrated" else 0.0


@dataclass(frozen=True)
class Positives:
    """n images that show a finding, with its true masks and boxes; both are empty where the data have none."""

    row: Int[np.ndarray, " n"]
    masks: list[Bool[np.ndarray, "H W"]]
    boxes: list[boxes.Boxes]


@dataclass(frozen=True)
class FindingMaps:
    """Results for the maps of one finding.

    Attributes:
      shape: rows and columns of a map.
      boxes: boxes read from each map.
      localisation: pointing scores; None where the data do not locate the finding.
      shown: maps for the report, by image id.
      gain: sum over images of |logit - logit of the baseline|, which integrated gradients should add up to.
      error: sum over images of the absolute difference between that gain and the maps' sums.
    """

    shape: tuple[int, int]
    boxes: list[boxes.Boxes]
    localisation: Localisation | None
    shown: dict[str, Cam]
    gain: float
    error: float


def explain_run(
    directory: Path,
    options: SaliencyOptions,
    *,
    split: str = "test",
    data_dir: Path | None = None,
    findings: Sequence[str] | None = None,
    images: int = 8,
    mesh: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Compute saliency maps of a run's positive images and score them against masks and boxes.

    For a finding that the data set locates, all positive images with a mask or box are used; for other findings the
    first `images` positives. Writes to `explain/METHOD` in the run directory: `scores.json`; `index.html`, the report
    page; `hits.png` and `.pdf`; `FINDING/maps.npz` with ids, maps (signed for integrated gradients) and
    probabilities; and `FINDING/ID.png` for each of the first `images` images.

    Returns:
      The scores, ready for JSON.

    Raises:
      CxrError: an option is out of range, a finding is unknown, or no image of the split shows one of the findings.
    """
    boxes.detected(np.zeros((1, 1)), threshold=options.threshold, regions=options.regions)  # fail early on bad options
    experiment, network, _ = load_run(directory, data_dir, mesh)
    findings = tuple(findings or experiment.findings)
    finding_indices(findings, experiment.findings)
    positives = {finding: find_positives(experiment, split, finding, images) for finding in findings}
    total = sum(len(images.row) for images in positives.values())
    if not total:
        raise CxrError(
            f"no image of the {split} split shows {', '.join(findings)}: choose other --findings or another --split"
        )
    folder = directory / "explain" / options.method
    results = {}
    with progress_bar(options.method, total) as advance:
        for finding, shown in positives.items():
            if len(shown.row):
                finding_folder = folder / quote(finding, safe=" ")
                results[finding] = _explain_finding(
                    experiment, network, options, finding, shown, images, finding_folder, advance
                )
    located = _score_localisation(positives, results)
    scores = _to_json(options, split, positives, results, located)
    cams = {finding: result.shown for finding, result in results.items() if result.shown}
    _write_report(experiment, options, cams, located, scores, directory)
    return scores


def load_images(
    experiment: Experiment, rows: Sequence[int] | np.ndarray, size: int = 0
) -> UInt8[np.ndarray, "N H W 1"]:
    """Load images by their rows in the records, at `size` px; default: the size that the network takes."""
    size = size or experiment.config.data.image_size
    return np.stack([resize(experiment.records.image(int(row)), size) for row in rows])[..., None]


def compute_cams(
    experiment: Experiment, network: Network, rows: Int[np.ndarray, " N"], findings: Sequence[str], **options: Any
) -> Cams:
    """Compute maps and probabilities of images, given by their rows; see `saliency.saliency` for the options."""
    images = load_images(experiment, rows)
    columns = finding_indices(findings, experiment.findings)
    maps = saliency.saliency(network, images, columns, mesh=experiment.mesh, **options)
    logits = saliency.logits(network, images, mesh=experiment.mesh)
    probability = expit(log_odds(logits, experiment.config.loss.name))
    return Cams(tuple(findings), np.asarray(rows), maps, probability[:, columns])


def make_cam(experiment: Experiment, cams: Cams, finding: str, row: int, detected: boxes.Boxes | None = None) -> Cam:
    """Return one map for a report, with the boxes detected in it."""
    n, k = int(np.flatnonzero(cams.row == row)[0]), cams.findings.index(finding)
    return Cam(
        image=load_images(experiment, [row])[0, ..., 0],
        cam=normalise(cams.maps[n, k]),
        probability=float(cams.probability[n, k]),
        mask=experiment.records.mask(row, finding, _MASK_SIDE),
        boxes=detected,
    )


def write_overlay(cam: Cam, folder: Path, image_id: str, largest: int | None = None) -> Path:
    """Write a map over its image as a PNG named after the image; `largest` limits the longer side, in px."""
    side = max(_SMALLEST_OVERLAY, *cam.image.shape)
    # Suffixes other than .png stay in the name, so that two ids never share a file.
    path = folder / f"{quote(image_id.removesuffix('.png'), safe=' ')}.png"
    with atomic_path(path) as temporary:
        overlay = pictures.overlay(cam, side if largest is None else min(side, largest))
        Image.fromarray(overlay).save(temporary, "PNG")
    return path


def find_positives(experiment: Experiment, split: str, finding: str, limit: int) -> Positives:
    """Return all positives of a finding that have a mask or box, or the first `limit` positives if none has."""
    [k] = finding_indices([finding], experiment.findings)
    examples, records = experiment.examples(split), experiment.records
    rows = examples.row[(examples.label[:, k] > 0.5) & examples.label_mask[:, k]]
    masks = {int(row): records.mask(int(row), finding, _MASK_SIDE) for row in rows}
    masks = {row: mask for row, mask in masks.items() if mask is not None and mask.any()}
    if not masks:
        return Positives(rows[:limit], [], [])
    true_boxes = []
    for row, mask in masks.items():
        drawn = [(box.x, box.y, box.w, box.h) for box in records.boxes(row) if box.finding == finding]
        true_boxes.append(np.array(drawn) if drawn else boxes.boxes_of(mask))
    return Positives(np.array(list(masks), np.int32), list(masks.values()), true_boxes)


def _explain_finding(
    experiment: Experiment,
    network: Network,
    options: SaliencyOptions,
    finding: str,
    positives: Positives,
    limit: int,
    folder: Path,
    advance: Callable[[int], None],
) -> FindingMaps:
    """Compute, write and score the maps of one finding; show `limit` of them. Large maps are not kept in memory."""
    integrated = options.method == "integrated"
    cams = compute_cams(
        experiment, network, positives.row, [finding], method=options.method, baseline=options.baseline,
        steps=options.steps, signed=integrated, advance=advance,
    )  # fmt: skip
    ids = experiment.records.id[positives.row]
    with atomic_path(folder / "maps.npz") as temporary:
        np.savez_compressed(temporary, id=ids, map=cams.maps[:, 0], probability=cams.probability[:, 0])
    total_gain = error = 0.0
    if integrated:
        [k] = finding_indices([finding], experiment.findings)
        images = load_images(experiment, positives.row)
        ends = images, saliency.baselines(images, options.baseline)
        gain = np.subtract(*(saliency.logits(network, end, mesh=experiment.mesh) for end in ends))[:, k]
        total_gain = float(np.abs(gain).sum())
        error = float(np.abs(cams.maps.sum((1, 2, 3), np.float64) - gain).sum())
        cams = replace(cams, maps=smooth(np.maximum(cams.maps, 0), options.smoothing(images.shape[2])))
    detected = [boxes.detected(map[0], threshold=options.threshold, regions=options.regions) for map in cams.maps]
    shown = {}
    for row, image_id, image_boxes in list(zip(positives.row, map(str, ids), detected, strict=True))[:limit]:
        shown[image_id] = make_cam(experiment, cams, finding, int(row), image_boxes)
        write_overlay(shown[image_id], folder, image_id)
    points = localisation(cams.maps[:, 0], positives.masks) if positives.masks else None
    return FindingMaps(cams.maps.shape[-2:], detected, points, shown, total_gain, error)


def _score_localisation(positives: Mapping[str, Positives], results: Mapping[str, FindingMaps]) -> tables.Located:
    """Score each finding that the data locate, and all of them pooled where there are several."""
    located, detected, true = {}, [], []
    for finding, result in results.items():
        if result.localisation is not None:
            located[finding] = result.localisation, boxes.box_scores(result.boxes, positives[finding].boxes)
            detected += result.boxes
            true += positives[finding].boxes
    if len(located) > 1:
        all_findings = pooled([points for points, _ in located.values()])
        located[tables.ALL] = all_findings, boxes.box_scores(detected, true)
    return located


def _to_json(
    options: SaliencyOptions,
    split: str,
    positives: Mapping[str, Positives],
    results: Mapping[str, FindingMaps],
    located: tables.Located,
) -> dict[str, Any]:
    def scores(name: str) -> dict[str, Any]:
        if name not in located:
            return {}
        points, box_scores = located[name]
        finite = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(points).items()
        }
        return finite | {"boxes": asdict(box_scores)}

    shape = next(iter(results.values())).shape
    result: dict[str, Any] = {
        **asdict(options),
        "split": split,
        "map": list(shape),
        "smoothing_px": options.smoothing(shape[1]),
        "resolvable": resolvable(shape),
        "findings": {finding: {"images": len(images.row)} | scores(finding) for finding, images in positives.items()},
    }
    if tables.ALL in located:
        result["overall"] = scores(tables.ALL)
    if options.method == "integrated":
        gain = sum(result.gain for result in results.values())
        result["incompleteness"] = sum(result.error for result in results.values()) / gain if gain else None
    else:
        del result["baseline"], result["steps"]
    return result


def _write_report(
    experiment: Experiment,
    options: SaliencyOptions,
    cams: Mapping[str, Mapping[str, Cam]],
    located: tables.Located,
    scores: dict[str, Any],
    directory: Path,
) -> None:
    folder, config = directory / "explain" / options.method, experiment.config
    write_json(folder / "scores.json", scores)
    score_tables = tables.localisation_tables(located) if located else []
    for table in score_tables:
        stdout.print(tables.terminal_table(table))
    if located:
        figure = hit_rates(located)
        for suffix in ("png", "pdf"):
            style.save(figure, folder / f"hits.{suffix}")
    notes = _notes(options, scores)
    report = MapsReport(
        title=f"{tables.METHOD_NAMES[options.method]}: {config.title or config.model.name}, "
        f"{config.data.image_size} px",
        cams={finding: dict(list(images.items())[:_IMAGES_ON_PAGE]) for finding, images in cams.items()},
        located=located,
        tables=score_tables,
        lead=[
            f"What the network's score for each finding depends on, in images of the {scores['split']} split that show "
            "it. Cyan outlines the true mask or box; dashed boxes surround the regions that the map marks.",
        ],
        notes=notes,
        provenance=read_provenance(directory),
    )
    page = write_page(report, folder / "index.html")
    for note in notes:
        print_text(note)
    print_text(f"maps and images: {folder}\nreport: {page}")


def _notes(options: SaliencyOptions, scores: Mapping[str, Any]) -> list[str]:
    """Say how the numbers are to be read."""
    regions = {"peak": "The region of the maximum gets a box.", "all": "Every marked region gets a box."}
    notes = [
        f"A map marks pixels above {options.threshold:g} of its maximum. {regions[options.regions]} An image with "
        "several true boxes counts as a hit if one of them is hit. Intervals (95%, Wilson) treat images as "
        "independent, although images of one patient are not."
    ]
    if not scores["resolvable"]:
        rows, columns = scores["map"]
        notes.append(f"The maps have only {rows} x {columns} cells, which is too coarse for pointing scores.")
    if options.method == "integrated":
        error = scores["incompleteness"]
        notes.append(
            f"Integrated gradients with a {options.baseline} baseline and {options.steps} steps. Boxes are read from "
            f"the positive attributions, blurred by {scores['smoothing_px']:.1f} px."
            + ("" if error is None else f" The attributions miss {error:.1%} of the change in logits.")
        )
    unlocated = [finding for finding, numbers in scores["findings"].items() if "hits" not in numbers]
    if unlocated:
        notes.append(f"No mask or box in these images for {', '.join(unlocated)}.")
    return notes
