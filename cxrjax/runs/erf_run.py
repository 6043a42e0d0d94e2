"""Effective receptive fields of one trained run, for one feature map or all, and for the untrained network."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich import box
from rich.table import Table

from cxrjax.config import Config
from cxrjax.console import print_text, progress_bar, stdout
from cxrjax.errors import CxrError
from cxrjax.explain import erf
from cxrjax.explain.inputs import check_name
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.files import atomic_path, write_json
from cxrjax.inference.load_run import load_run
from cxrjax.models.network import Network
from cxrjax.report import pictures, style
from cxrjax.report.content import ErfMap
from cxrjax.runs.explain_run import load_images
from cxrjax.train.experiment import Experiment
from cxrjax.train.run_directory import create_network

PROBES = 16
"""Random backward passes per image."""
TRAINED, UNTRAINED = "trained", "untrained"
ErfsByNetwork = dict[str, dict[str, ErfMap]]
"""TRAINED or UNTRAINED -> feature map -> effective receptive field."""


def measure_run_erf(
    directory: Path,
    *,
    split: str = "test",
    data_dir: Path | None = None,
    estimator: erf.Estimator = "probe",
    images: int = 32,
    layers: Sequence[str] = (),
    untrained: bool = False,
    width_cm: float | None = None,
    mesh: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Measure the effective receptive field of a run, and write arrays, sizes and figures.

    Writes to `explain/` in the run directory: `erf.npz` (maps), `erf.json` (sizes), `erf.png` and `erf.pdf` (the last
    feature map) and, for several feature maps, `erf-layers` and `erf-depth` (size against depth).

    Args:
      directory: run directory.
      split: split that the images are taken from.
      data_dir: where the prepared data are now; default: where they were in training.
      estimator: see `erf.measure`.
      images: number of images, spread evenly over the split.
      layers: names of further feature maps, or "all"; the last one is always measured.
      untrained: measure the same architecture with other random initial weights too.
      width_cm: width in cm of what the images show, for the scale bar.
      mesh: see `load_run`.

    Returns:
      Sizes, ready for JSON: those of the trained network's last feature map, and all under `networks`.

    Raises:
      CxrError: the width is not above 0, a feature map is unknown, or see `load_run` and `erf.measure`.
    """
    if width_cm is not None and not width_cm > 0:
        raise CxrError(f"the images' width must be above 0 cm, not {width_cm}")
    experiment, network, _ = load_run(directory, data_dir, mesh)
    names = _select_layers(network, layers)
    networks = {TRAINED: network}
    if untrained:
        networks[UNTRAINED] = untrained_network(experiment.config, network.classes)
    inputs = _sample_images(experiment, split, images)
    erfs: ErfsByNetwork = {
        state: {
            name: dataclasses.replace(_measure(experiment, network, inputs, estimator, name, state), width_cm=width_cm)
            for name in names
        }
        for state, network in networks.items()
    }
    result = _to_json(erfs) | {
        "estimator": estimator, "images": len(inputs), "split": split, "image_px": experiment.config.data.image_size
    }  # fmt: skip
    _write(directory / "explain", erfs, result)
    return result


def measure_erf(experiment: Experiment, network: Network, split: str, estimator: erf.Estimator, images: int) -> ErfMap:
    """Measure the effective receptive field of the last feature map, on images spread evenly over a split."""
    return _measure(experiment, network, _sample_images(experiment, split, images), estimator)


def untrained_network(config: Config, classes: int) -> Network:
    """Return a config's network with random initial weights of another seed than the run's."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.seed += 1
    return create_network(other, classes)


def _sample_images(experiment: Experiment, split: str, count: int) -> UInt8[np.ndarray, "N H W 1"]:
    rows = experiment.examples(split).row
    return load_images(experiment, rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)])


def _select_layers(network: Network, layers: Sequence[str]) -> list[str]:
    """Return the names of the chosen feature maps, in the network's order, always with the last."""
    names = list(receptive_fields(network))
    if list(layers) == ["all"]:
        return names
    chosen = {check_name(names, name) for name in layers}
    return [name for name in names if name in chosen or name == names[-1]]


def _measure(
    experiment: Experiment,
    network: Network,
    images: UInt8[np.ndarray, "N H W 1"],
    estimator: erf.Estimator,
    layer: str | None = None,
    state: str = "",
) -> ErfMap:
    size, seed = experiment.config.data.image_size, experiment.config.seed
    passes = {"sum": 1, "probe": PROBES}.get(estimator)  # exact: one per channel, which only the network knows
    total = None if passes is None else passes * len(images)
    title = (state, "receptive field", layer and f"of {layer}", f"at {size} px")
    with progress_bar(" ".join(filter(None, title)), total, unit="passes") as advance:
        measured = erf.measure(
            network, images, estimator=estimator, probes=PROBES, layer=layer, seed=seed, mesh=experiment.mesh,
            advance=advance,
        )  # fmt: skip
    return ErfMap(
        map=measured.map / measured.map.max(),
        area_fraction=measured.area_fraction,
        diameter_px=measured.diameter,
        diameter_fraction=measured.diameter / size,
        theoretical_px=receptive_fields(network)[measured.layer].size,
        mass=measured.mass,
        gaussian_px=erf.fit_least_squares(measured.map).diameter(measured.mass),
    )


def _to_json(erfs: ErfsByNetwork) -> dict[str, Any]:
    """Return the sizes of every field, with Gaussians fitted by moments and by least squares."""

    def sizes(field: ErfMap) -> dict[str, Any]:
        numbers = {key: value for key, value in dataclasses.asdict(field).items() if key != "map"}
        fits = {"moments": erf.fit_moments(field.map), "least_squares": erf.fit_least_squares(field.map)}
        gaussian = {name: dataclasses.asdict(fit) | {"diameter_px": fit.diameter(field.mass)}
                    for name, fit in fits.items()}  # fmt: skip
        finite = {
            name: {key: value if np.isfinite(value) else None for key, value in fit.items()}
            for name, fit in gaussian.items()
        }
        return numbers | {"gaussian": finite}

    networks = {state: {layer: sizes(field) for layer, field in row.items()} for state, row in erfs.items()}
    return list(networks[TRAINED].values())[-1] | {"networks": networks}


def _write(folder: Path, erfs: ErfsByNetwork, result: Mapping[str, Any]) -> None:
    last = {state: list(row.values())[-1] for state, row in erfs.items()}
    field = last[TRAINED]
    arrays = {f"{state}_{layer}": field.map for state, row in erfs.items() for layer, field in row.items()}
    with atomic_path(folder / "erf.npz") as temporary:
        np.savez_compressed(temporary, map=field.map, **arrays)  # pyright: ignore
    write_json(folder / "erf.json", dict(result))
    figures = {"erf": pictures.erf_grid({f"{field.map.shape[1]} px": last}, whole=True)}
    if len(erfs[TRAINED]) > 1:
        figures |= {"erf-layers": pictures.erf_grid(erfs), "erf-depth": pictures.size_by_depth(erfs)}
    for name, figure in figures.items():
        for suffix in ("png", "pdf"):
            style.save(figure, folder / f"{name}.{suffix}")
    stdout.print(_table(erfs))
    print_text(
        f"{field.mass:.2%} of the effective receptive field lie in {field.area_fraction:.1%} of the image, an "
        f"equivalent diameter of {field.diameter_px:.1f} px ({field.diameter_fraction:.0%} of the width)\n"
        + "\n".join(str(folder / f"{name}.png") for name in figures)
    )


def _table(erfs: ErfsByNetwork) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    columns = ("network", "feature map", "diameter, px", "of the width", "Gaussian fit, px", "theoretical, px")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 else "left")
    for state, row in erfs.items():
        for layer, field in row.items():
            table.add_row(
                state, layer, f"{field.diameter_px:.1f}", f"{field.diameter_fraction:.0%}", f"{field.gaussian_px:.1f}",
                f"{field.theoretical_px:.0f}",
            )  # fmt: skip
    return table
