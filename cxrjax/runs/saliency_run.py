"""One run, explained: where its findings come from in the images, and how well that fits where they are."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy.special import expit

from cxrjax.console import progress_bar, print_text, stdout
from cxrjax.data.images import resize
from cxrjax.errors import CxrError
from cxrjax.explain import boxes
from cxrjax.explain import saliency as maps
from cxrjax.explain.localisation import Localisation, localisation, normalise, pooled, resolvable, smooth
from cxrjax.files import atomic_path, write_json
from cxrjax.findings import positions
from cxrjax.inference.load_run import open_run
from cxrjax.metrics.predictions import log_odds
from cxrjax.models.network import Network
from cxrjax.report import localisation_tables, pictures, style
from cxrjax.report.content import Cam, MapsReport
from cxrjax.report.page import write_page
from cxrjax.runs.evaluate_run import provenance
from cxrjax.train.experiment import Experiment

_MASK_SIDE = 256  # on which masks are compared with maps
_SMOOTHING = 0.02  # of the image's width: pixels' attributions are a noise of dots, which has no regions
_PICTURED = 4  # images of each finding on the page
_OUTLINED = "Cyan outlines the truth, a dashed line the box around what the map marks."


Located = Mapping[str, tuple[Localisation, boxes.BoxScores]]


@dataclasses.dataclass(frozen=True)
class Cams:
    """Maps of N rows of the records table and K findings: f32[N,K,h,w] >= 0, probabilities f64[N,K]."""

    findings: tuple[str, ...]
    row: Int[np.ndarray, " N"]
    maps: Float[np.ndarray, "N K h w"]
    probability: Float[np.ndarray, "N K"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How maps are made and read.

    Attributes:
      method: one of `saliency.METHODS`.
      threshold: share of its maximum from which on a map marks a place.
      regions: which of the marked regions get a box, see `boxes.detected`.
      baseline: of integrated gradients, see `saliency.baselines`.
      steps: of integrated gradients.
    """

    method: maps.Method = "gradcam"
    threshold: float = 0.5
    regions: boxes.Regions = "peak"
    baseline: maps.Baseline = "black"
    steps: int = maps.STEPS

    def smoothing(self, side: int) -> float:
        """Standard deviation in px of the blur that maps of this side get before they are read."""
        return _SMOOTHING * side if self.method == "integrated" else 0.0


@dataclasses.dataclass(frozen=True)
class Positives:
    """n images that show a finding, and where it is in each; masks and boxes are empty where the data do not say."""

    row: Int[np.ndarray, " n"]
    masks: list[Bool[np.ndarray, "H W"]]
    boxes: list[boxes.Boxes]


@dataclasses.dataclass(frozen=True)
class Explained:
    """What came of the maps of one finding.

    Attributes:
      shape: of a map, rows and columns.
      found: boxes around what each map marks.
      points: how well they point; None where the data do not locate the finding.
      pictures: the first of them, by the image's id.
      gained: what integrated gradients are to add up to, the logit less the baseline's, as absolute values added up.
      missed: how far their sums are from it, likewise.
    """

    shape: tuple[int, int]
    found: list[boxes.Boxes]
    points: Localisation | None
    pictures: dict[str, Cam]
    gained: float
    missed: float


def saliency_run(
    directory: Path,
    reading: Reading,
    *,
    part: str = "test",
    data_dir: Path | None = None,
    findings: Sequence[str] | None = None,
    images: int = 8,
    mesh: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Saliency maps of a run's positives, and how well they show where the data say the finding is.

    Images with a mask or box of the finding are taken, all of them; of findings without any, the first `images`
    positives. In `explain/METHOD` of the run's directory, `scores.json` holds the scores, `index.html` shows them with
    pictures, `hits.png` and `hits.pdf` plot them; `FINDING/maps.npz` has ids, maps (signed for integrated gradients)
    and probabilities, and `FINDING/ID.png` shows each of the first `images`.

    Returns:
      The scores as one dict, ready for JSON.
    """
    boxes.detected(np.zeros((1, 1)), threshold=reading.threshold, regions=reading.regions)  # refuse now, not later
    experiment, network, _ = open_run(directory, data_dir, mesh)
    findings = tuple(findings or experiment.findings)
    positions(findings, experiment.findings)
    shown = {finding: _positives(experiment, part, finding, images) for finding in findings}
    if not any(len(of.row) for of in shown.values()):
        raise CxrError(
            f"no image of part {part} shows {', '.join(findings)}: choose other --findings or another --split"
        )
    folder = directory / "explain" / reading.method
    explained = {}
    with progress_bar(reading.method, sum(len(of.row) for of in shown.values())) as advance:
        for finding, of in shown.items():
            if len(of.row):
                explained[finding] = _explain(experiment, network, reading, finding, of, images, folder, advance)
    located = _located(shown, explained)
    result = _numbers(reading, part, shown, explained, located)
    _write(experiment, reading, part, explained, located, result, directory)
    return result


def load_images(
    experiment: Experiment, rows: Sequence[int] | np.ndarray, size: int = 0
) -> UInt8[np.ndarray, "N H W 1"]:
    """Images of these rows of the records table, at a size in px; by default the one that the network sees."""
    size = size or experiment.config.data.size
    return np.stack([resize(experiment.records.image(int(row)), size) for row in rows])[..., None]


def compute_cams(
    experiment: Experiment, network: Network, rows: Int[np.ndarray, " N"], findings: Sequence[str], **options: Any
) -> Cams:
    """Maps and probabilities of these rows of the records table; options are those of `saliency.saliency`."""
    return _cams(experiment, network, load_images(experiment, rows), rows, findings, **options)


def _cams(
    experiment: Experiment,
    network: Network,
    images: UInt8[np.ndarray, "N H W 1"],
    rows: Int[np.ndarray, " N"],
    findings: Sequence[str],
    **options: Any,
) -> Cams:
    wanted = positions(findings, experiment.findings)
    found = maps.saliency(network, images, wanted, mesh=experiment.mesh, **options)
    logits = maps.logits(network, images, mesh=experiment.mesh)
    probability = expit(log_odds(logits, experiment.config.loss.name))
    return Cams(tuple(findings), np.asarray(rows), found, probability[:, wanted])


def cam_of(experiment: Experiment, cams: Cams, finding: str, row: int, found: boxes.Boxes | None = None) -> Cam:
    """One map as a report shows it, with the boxes that were found in it."""
    n, k = int(np.flatnonzero(cams.row == row)[0]), cams.findings.index(finding)
    return Cam(
        image=load_images(experiment, [row])[0, ..., 0],
        cam=normalise(cams.maps[n, k]),
        probability=float(cams.probability[n, k]),
        mask=experiment.records.mask(row, finding, _MASK_SIDE),
        boxes=found,
    )


def _positives(experiment: Experiment, part: str, finding: str, most: int) -> Positives:
    [k] = positions([finding], experiment.findings)
    examples, records = experiment.part(part), experiment.records
    rows = examples.row[(examples.label[:, k] > 0.5) & examples.label_mask[:, k]]
    masks = {int(row): records.mask(int(row), finding, _MASK_SIDE) for row in rows}
    places = {row: mask for row, mask in masks.items() if mask is not None and mask.any()}
    if not places:
        return Positives(rows[:most], [], [])
    drawn = {row: [box for box in records.boxes(row) if box.finding == finding] for row in places}
    true = [
        np.array([(box.x, box.y, box.w, box.h) for box in drawn[row]]) if drawn[row] else boxes.boxes_of(mask)
        for row, mask in places.items()
    ]
    return Positives(np.array(list(places), np.int32), list(places.values()), true)


def _explain(
    experiment: Experiment,
    network: Network,
    reading: Reading,
    finding: str,
    positives: Positives,
    most: int,
    folder: Path,
    advance: Any,
) -> Explained:
    """Compute, save and read the maps of one finding; the maps themselves, which may be large, are not kept."""
    folder = folder / quote(finding, safe=" ")
    images = load_images(experiment, positives.row)
    whole = reading.method == "integrated"
    cams = _cams(
        experiment, network, images, positives.row, [finding], method=reading.method, baseline=reading.baseline,
        steps=reading.steps, signed=whole, advance=advance,
    )  # fmt: skip
    ids = experiment.records.id[positives.row]
    with atomic_path(folder / "maps.npz") as temporary:
        np.savez_compressed(temporary, id=ids, map=cams.maps[:, 0], probability=cams.probability[:, 0])
    gained = missed = 0.0
    if whole:
        [k] = positions([finding], experiment.findings)
        ends = images, maps.baselines(images, reading.baseline)
        gain = np.subtract(*(maps.logits(network, each, mesh=experiment.mesh) for each in ends))
        gained = float(np.abs(gain[:, k]).sum())
        missed = float(np.abs(cams.maps.sum((1, 2, 3), np.float64) - gain[:, k]).sum())
        positive = np.maximum(cams.maps, 0)
        cams = dataclasses.replace(cams, maps=smooth(positive, reading.smoothing(images.shape[2])))
    found = [boxes.detected(map[0], threshold=reading.threshold, regions=reading.regions) for map in cams.maps]
    pictured = {}
    for row, name, of in list(zip(positives.row, ids, found, strict=True))[:most]:
        cam = pictured[str(name)] = cam_of(experiment, cams, finding, int(row), of)
        with atomic_path(folder / f"{quote(str(name).removesuffix('.png'), safe=' ')}.png") as temporary:
            Image.fromarray(pictures.overlay(cam, max(320, cam.image.shape[0]))).save(temporary, "PNG")
    points = localisation(cams.maps[:, 0], positives.masks) if positives.masks else None
    return Explained(cams.maps.shape[-2:], found, points, pictured, gained, missed)


def _located(shown: Mapping[str, Positives], explained: Mapping[str, Explained]) -> Located:
    """Scores of each finding that the data locate, and of all of them pooled where there are several."""
    located, found, true = {}, [], []
    for finding, of in explained.items():
        if of.points is not None:
            located[finding] = of.points, boxes.box_scores(of.found, shown[finding].boxes)
            found += of.found
            true += shown[finding].boxes
    if len(located) > 1:
        located[localisation_tables.ALL] = (
            pooled([points for points, _ in located.values()]),
            boxes.box_scores(found, true),
        )
    return located


def _numbers(
    reading: Reading,
    part: str,
    shown: Mapping[str, Positives],
    explained: Mapping[str, Explained],
    located: Located,
) -> dict[str, Any]:
    def scores(name: str) -> dict[str, Any]:
        if name not in located:
            return {}
        points, fit = located[name]
        numbers = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in dataclasses.asdict(points).items()
        }
        return numbers | {"boxes": dataclasses.asdict(fit)}

    shape = next(iter(explained.values())).shape
    result: dict[str, Any] = {
        **dataclasses.asdict(reading),
        "part": part,
        "map": list(shape),
        "smoothing_px": reading.smoothing(shape[1]),
        "resolvable": resolvable(shape),
        "findings": {finding: {"images": len(of.row)} | scores(finding) for finding, of in shown.items()},
    }
    if localisation_tables.ALL in located:
        result["overall"] = scores(localisation_tables.ALL)
    gained = sum(of.gained for of in explained.values())
    if reading.method == "integrated":
        missed = sum(of.missed for of in explained.values())
        result["incompleteness"] = missed / gained if gained else None
    else:
        del result["baseline"], result["steps"]
    return result


def _write(
    experiment: Experiment,
    reading: Reading,
    part: str,
    explained: Mapping[str, Explained],
    located: Located,
    result: dict[str, Any],
    directory: Path,
) -> None:
    folder, config = directory / "explain" / reading.method, experiment.config
    write_json(folder / "scores.json", result)
    tables = localisation_tables.tables(located) if located else []
    for table in tables:
        stdout.print(localisation_tables.terminal(table))
    if located:
        figure = localisation_tables.hit_rates(located)
        for kind in ("png", "pdf"):
            style.save(figure, folder / f"hits.{kind}")
    notes = _notes(reading, result)
    method = localisation_tables.NAMES[reading.method]
    report = MapsReport(
        title=f"{method}: {config.title or config.model.name}, {config.data.size} px",
        cams={finding: dict(list(of.pictures.items())[:_PICTURED]) for finding, of in explained.items() if of.pictures},
        located=located,
        tables=tables,
        lead=[
            f"Where the network sees each finding, in images of the {part} part that show it. {_OUTLINED}",
        ],
        notes=notes,
        provenance=provenance(directory),
    )
    page = write_page(report, folder / "index.html")
    for note in notes:
        print_text(note)
    print_text(f"maps and pictures: {folder}\nreport: {page}")


def _notes(reading: Reading, result: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    unlocated = [finding for finding, of in result["findings"].items() if "hits" not in of]
    notes = [
        f"A map marks where it reaches {reading.threshold:g} of its maximum; "
        + {"peak": "the region that holds the maximum gets a box.", "all": "every region gets a box."}[reading.regions]
        + " An image with several true boxes is hit if one of them is. Intervals (95 %, Wilson) take images as "
        "independent, which those of one patient are not."
    ]
    if not result["resolvable"]:
        rows, columns = result["map"]
        notes.append(f"The maps have only {rows} x {columns} cells: too coarse for pointing to mean much.")
    if reading.method == "integrated":
        share = result["incompleteness"]
        notes.append(
            f"Integrated gradients from a {reading.baseline} baseline in {reading.steps} steps; positive parts, "
            f"blurred by {result['smoothing_px']:.1f} px, are read."
            + ("" if share is None else f" Their sums miss {share:.1%} of what the logits gain.")
        )
    if unlocated:
        notes.append(f"Without a mask or box in these images: {', '.join(unlocated)}.")
    return notes
