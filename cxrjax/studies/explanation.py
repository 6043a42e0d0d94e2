"""One run, explained: effective receptive field and Grad-CAM, as arrays, pictures and numbers."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy.special import expit

from cxrjax.console import bar, say
from cxrjax.data.images import resize
from cxrjax.errors import CxrError
from cxrjax.evaluate.predict import open_run
from cxrjax.explain import erf, gradcam
from cxrjax.explain.localisation import localisation, resolvable
from cxrjax.explain.receptive_field import theoretical
from cxrjax.files import beside, write_json
from cxrjax.findings import positions
from cxrjax.models.network import Network
from cxrjax.parallel.mesh import make_mesh
from cxrjax.report import pictures, style
from cxrjax.report.content import Cam, Field
from cxrjax.train.experiment import Experiment
from cxrjax.train.inference import logits_of
from cxrjax.train.step import make_predict_step

_MASK_SIDE = 256  # on which masks are compared with maps
_PROBES = 16  # random backward passes an image


@dataclasses.dataclass(frozen=True)
class Cams:
    """Grad-CAM of N rows of the records table and K findings: maps f32[N,K,h,w] >= 0, probabilities f32[N,K]."""

    findings: tuple[str, ...]
    row: Int[np.ndarray, " N"]
    maps: Float[np.ndarray, "N K h w"]
    probability: Float[np.ndarray, "N K"]


def erf_run(
    directory: Path,
    *,
    part: str = "test",
    data_dir: Path | None = None,
    estimator: erf.Estimator = "probe",
    images: int = 32,
) -> dict[str, Any]:
    """The effective receptive field of a run: `explain/erf.npz`, `erf.png` and `erf.json` in its directory."""
    experiment, network, _ = open_run(directory, data_dir)
    field = measure_field(experiment, network, part, estimator, images)
    name = f"{experiment.config.data.size} px"
    folder = directory / "explain"
    _save_arrays(folder / "erf.npz", map=field.map)
    style.save(pictures.erf_maps({name: field}), folder / "erf.png")
    result = {key: value for key, value in dataclasses.asdict(field).items() if key != "map"}
    used = min(images, len(experiment.part(part)))
    result |= {"estimator": estimator, "images": used, "part": part, "image_px": experiment.config.data.size}
    write_json(folder / "erf.json", result)
    say(
        f"{field.mass:.2%} of the effective receptive field lie in {field.area_fraction:.1%} of the image, an "
        f"equivalent diameter of {field.diameter_px:.1f} px ({field.diameter_fraction:.0%} of the width); "
        f"theoretical: {field.theoretical_px:.0f} px\n{folder / 'erf.png'}"
    )
    return result


def measure_field(experiment: Experiment, network: Network, part: str, estimator: erf.Estimator, images: int) -> Field:
    """Equation 1 over images spread evenly over a part."""
    rows = experiment.part(part).row
    chosen = rows[np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(int)]
    config = experiment.config
    passes = {"sum": 1, "probe": _PROBES}.get(estimator)  # exact: one a channel, which only the network knows
    total = None if passes is None else passes * len(chosen)
    with bar(f"receptive field at {config.data.size} px", total, unit="passes") as advance:
        measured = erf.measure(
            network,
            load_images(experiment, chosen),
            estimator=estimator,
            probes=_PROBES,
            seed=config.seed,
            advance=advance,
        )
    reach = theoretical(network)
    return Field(
        map=measured.map / measured.map.max(),
        area_fraction=measured.area_fraction,
        diameter_px=measured.diameter,
        diameter_fraction=measured.diameter / config.data.size,
        theoretical_px=reach.size,
        mass=measured.mass,
    )


def gradcam_run(
    directory: Path,
    *,
    part: str = "test",
    data_dir: Path | None = None,
    findings: Sequence[str] | None = None,
    images: int = 8,
) -> dict[str, Any]:
    """Grad-CAM of a run's positives, and how well it points where the data say the finding is.

    Images with a mask or box of the finding are taken, all of them; of findings without any, the first `images`
    positives. Writes `explain/gradcam.npz` (ids, maps, probabilities), `explain/gradcam.json` (localisation) and, for
    the first `images` of each finding, overlays `explain/gradcam/FINDING/ID.png`.
    """
    experiment, network, _ = open_run(directory, data_dir)
    findings = tuple(findings or experiment.findings)
    positions(findings, experiment.findings)
    shown = {finding: _positives(experiment, part, finding, images) for finding in findings}
    rows = np.unique(np.concatenate([of.row for of in shown.values()]))
    if not len(rows):
        raise CxrError(
            f"no image of part {part} shows {', '.join(findings)}: choose other --findings or another --split"
        )
    cams = compute_cams(experiment, network, rows, findings)

    folder, records = directory / "explain", experiment.records
    _save_arrays(
        folder / "gradcam.npz", id=records.id[cams.row], finding=np.array(findings), map=cams.maps,
        probability=cams.probability,
    )  # fmt: skip
    result: dict[str, Any] = {"part": part, "map": list(cams.maps.shape[-2:]), "findings": {}}
    with bar("overlays", sum(min(images, len(of.row)) for of in shown.values())) as advance:
        for finding, of in shown.items():
            for row in of.row[:images]:
                _write_overlay(experiment, cams, finding, int(row), folder / "gradcam")
                advance()
            result["findings"][finding] = {"images": len(of.row)} | _localised(cams, finding, of)
    result["resolvable"] = resolvable(cams.maps.shape[-2:])
    write_json(folder / "gradcam.json", result)
    _print_localisation(result)
    say(f"overlays: {folder / 'gradcam'}")
    return result


def load_images(
    experiment: Experiment, rows: Sequence[int] | np.ndarray, size: int = 0
) -> UInt8[np.ndarray, "N H W 1"]:
    """Images of these rows of the records table, at a size in px; by default the one that the network sees."""
    size = size or experiment.config.data.size
    return np.stack([resize(experiment.records.image(int(row)), size) for row in rows])[..., None]


def compute_cams(
    experiment: Experiment, network: Network, rows: Int[np.ndarray, " N"], findings: Sequence[str]
) -> Cams:
    """Grad-CAM and probabilities of these rows of the records table."""
    wanted = positions(findings, experiment.findings)
    images = load_images(experiment, rows)
    maps = gradcam.gradcam(network, images, wanted)
    every = experiment.part_of_rows(rows)
    mesh = make_mesh(1, 1)
    logits = logits_of(
        network, every, make_predict_step(mesh), mesh, size=experiment.config.data.size, batch=min(len(rows), 16)
    )
    return Cams(tuple(findings), np.asarray(rows), maps, expit(logits[:, wanted]))


def cam_of(experiment: Experiment, cams: Cams, finding: str, row: int) -> Cam:
    """One map as the report shows it."""
    n, k = int(np.flatnonzero(cams.row == row)[0]), cams.findings.index(finding)
    return Cam(
        image=load_images(experiment, [row])[0, ..., 0],
        cam=gradcam.normalise(cams.maps[n, k]),
        probability=float(cams.probability[n, k]),
        mask=experiment.records.mask(row, finding, _MASK_SIDE),
    )


@dataclasses.dataclass(frozen=True)
class Positives:
    """Rows of images that show a finding, and where it is in each; masks is empty where the data do not say."""

    row: Int[np.ndarray, " n"]
    masks: list[Bool[np.ndarray, "H W"]]


def _positives(experiment: Experiment, part: str, finding: str, most: int) -> Positives:
    [k] = positions([finding], experiment.findings)
    examples = experiment.part(part)
    rows = examples.row[(examples.label[:, k] > 0.5) & examples.known[:, k]]
    masks = {int(row): experiment.records.mask(int(row), finding, _MASK_SIDE) for row in rows}
    located = [row for row, mask in masks.items() if mask is not None and mask.any()]
    if located:
        return Positives(np.array(located, np.int32), [masks[row] for row in located])  # pyright: ignore
    return Positives(rows[:most], [])


def _localised(cams: Cams, finding: str, positives: Positives) -> dict[str, Any]:
    if not positives.masks:
        return {}
    index = np.searchsorted(cams.row, positives.row)
    scores = localisation(cams.maps[index, cams.findings.index(finding)], positives.masks)
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in dataclasses.asdict(scores).items()
    }


def _write_overlay(experiment: Experiment, cams: Cams, finding: str, row: int, folder: Path) -> None:
    name = quote(str(experiment.records.id[row]).removesuffix(".png"), safe=" ")
    cam = cam_of(experiment, cams, finding, row)
    side = max(320, cam.image.shape[0])
    with beside(folder / quote(finding, safe=" ") / f"{name}.png") as temporary:
        Image.fromarray(pictures.overlay(cam, side)).save(temporary, "PNG")


def _print_localisation(result: dict[str, Any]) -> None:
    for finding, of in result["findings"].items():
        if "hit_rate" in of:
            say(
                f"{finding:24} {of['hits']:4d} of {of['images']:4d} maps point at it: {of['hit_rate']:.2f} "
                f"({of['low']:.2f}-{of['high']:.2f}), by chance {of['chance']:.2f}"
                + (f"; {of['empty']} maps are empty" if of["empty"] else "")
            )
        else:
            say(f"{finding:24} {of['images']:4d} images, none with a mask or box")
    if not result["resolvable"]:
        rows, columns = result["map"]
        say(f"the maps have only {rows} x {columns} cells: too coarse for pointing to mean much")


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    with beside(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # pyright: ignore
