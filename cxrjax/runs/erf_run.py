"""One run's effective receptive fields: of one feature map or of all, trained and untrained, as arrays and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich import box
from rich.table import Table

from cxrjax.config import Config
from cxrjax.console import progress_bar, print_text, stdout
from cxrjax.errors import CxrError
from cxrjax.explain import erf
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.files import atomic_path, write_json
from cxrjax.inference.load_run import open_run
from cxrjax.models.network import Network
from cxrjax.report import pictures as figures
from cxrjax.report import style
from cxrjax.report.content import Field
from cxrjax.runs.saliency_run import load_images
from cxrjax.train.described import network_of
from cxrjax.train.experiment import Experiment

PROBES = 16
"""Random backward passes an image."""
TRAINED, UNTRAINED = "trained", "untrained"
Fields = dict[str, dict[str, Field]]


def erf_run(
    directory: Path,
    *,
    part: str = "test",
    data_dir: Path | None = None,
    estimator: erf.Estimator = "probe",
    images: int = 32,
    layers: Sequence[str] = (),
    untrained: bool = False,
    width_cm: float | None = None,
    mesh: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The effective receptive field of a run: arrays, numbers and figures in `explain/` of its directory.

    `erf.npz` holds the maps, `erf.json` their sizes; `erf.png` and `erf.pdf` show the last feature map's, and
    `erf-depth.png` and `.pdf` size against depth where there are several feature maps.

    Args:
      directory: of the run.
      part: whose images are used.
      data_dir: where the prepared data lie now; default where they lay in training.
      estimator: see `erf.measure`.
      images: how many, spread evenly over the part.
      layers: names of further feature maps, or "all"; the last is always measured.
      untrained: also measure the same architecture with fresh initial values.
      width_cm: of what the images show, for the scale bar.
      mesh: see `open_run`.

    Returns:
      Sizes, ready for JSON: the last feature map's of the trained network, and under `networks` everyone's.

    Raises:
      CxrError: no such feature map, width out of range, or what `open_run` and `erf.measure` raise.
    """
    if width_cm is not None and not width_cm > 0:
        raise CxrError(f"the images' width must be above 0 cm, not {width_cm}")
    experiment, network, _ = open_run(directory, data_dir, mesh)
    names = _chosen(network, layers)
    networks = {TRAINED: network} | ({UNTRAINED: fresh(experiment.config, network.classes)} if untrained else {})
    loaded = _images(experiment, part, images)
    found: Fields = {
        state: {
            name: dataclasses.replace(_measured(experiment, each, loaded, estimator, name, state), width_cm=width_cm)
            for name in names
        }
        for state, each in networks.items()
    }
    result = _numbers(found) | {
        "estimator": estimator, "images": len(loaded), "part": part, "image_px": experiment.config.data.size
    }  # fmt: skip
    _write(directory / "explain", found, result)
    return result


def measure_field(
    experiment: Experiment,
    network: Network,
    part: str,
    estimator: erf.Estimator,
    images: int,
    *,
    layer: str | None = None,
) -> Field:
    """Equation 1 over images spread evenly over a part; of the last feature map by default."""
    return _measured(experiment, network, _images(experiment, part, images), estimator, layer)


def fresh(config: Config, classes: int) -> Network:
    """The architecture that a config describes, with initial values that its run did not begin with."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.seed += 1
    return network_of(other, classes)


def _images(experiment: Experiment, part: str, images: int) -> UInt8[np.ndarray, "N H W 1"]:
    rows = experiment.part(part).row
    return load_images(experiment, rows[np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(int)])


def _chosen(network: Network, layers: Sequence[str]) -> list[str]:
    """Names of feature maps in the network's order, the last always among them."""
    every = list(receptive_fields(network))
    if list(layers) == ["all"]:
        return every
    unknown = [name for name in layers if name not in every]
    if unknown:
        raise CxrError(f"no feature map {unknown[0]!r}; this network has {', '.join(every)}")
    return [name for name in every if name in layers or name == every[-1]]


def _measured(
    experiment: Experiment,
    network: Network,
    loaded: UInt8[np.ndarray, "N H W 1"],
    estimator: erf.Estimator,
    layer: str | None = None,
    state: str = "",
) -> Field:
    config = experiment.config
    passes = {"sum": 1, "probe": PROBES}.get(estimator)  # exact: one a channel, which only the network knows
    total = None if passes is None else passes * len(loaded)
    what = " ".join(word for word in (state, "receptive field", layer and f"of {layer}", f"at {config.data.size} px")
                    if word)  # fmt: skip
    with progress_bar(what, total, unit="passes") as advance:
        measured = erf.measure(
            network, loaded, estimator=estimator, probes=PROBES, layer=layer, seed=config.seed, mesh=experiment.mesh,
            advance=advance,
        )  # fmt: skip
    return Field(
        map=measured.map / measured.map.max(),
        area_fraction=measured.area_fraction,
        diameter_px=measured.diameter,
        diameter_fraction=measured.diameter / config.data.size,
        theoretical_px=receptive_fields(network)[measured.layer].size,
        mass=measured.mass,
        gaussian_px=erf.fitted(measured.map).diameter(measured.mass),
    )


def _numbers(found: Fields) -> dict[str, Any]:
    """Sizes of every field, and Gaussians by both ways of fitting."""

    def one(field: Field) -> dict[str, Any]:
        numbers = {key: value for key, value in dataclasses.asdict(field).items() if key != "map"}
        fits = {"moments": erf.by_moments(field.map), "least_squares": erf.fitted(field.map)}
        return numbers | {
            "gaussian": {
                name: {key: _finite(value) for key, value in dataclasses.asdict(fit).items()}
                | {"diameter_px": _finite(fit.diameter(field.mass))}
                for name, fit in fits.items()
            }
        }

    networks = {state: {name: one(field) for name, field in row.items()} for state, row in found.items()}
    return list(networks[TRAINED].values())[-1] | {"networks": networks}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _write(folder: Path, found: Fields, result: Mapping[str, Any]) -> None:
    last = {state: dict([list(row.items())[-1]]) for state, row in found.items()}
    arrays = {f"{state}_{name}": field.map for state, row in found.items() for name, field in row.items()}
    [field] = last[TRAINED].values()
    with atomic_path(folder / "erf.npz") as temporary:
        np.savez_compressed(temporary, map=field.map, **arrays)  # pyright: ignore
    write_json(folder / "erf.json", dict(result))
    side_by_side = {state: next(iter(row.values())) for state, row in last.items()}
    drawn = {"erf": figures.field_grid({f"{field.map.shape[1]} px": side_by_side}, whole=True)}
    if len(found[TRAINED]) > 1:
        drawn |= {"erf-layers": figures.field_grid(found), "erf-depth": figures.size_by_depth(found)}
    for name, figure in drawn.items():
        for kind in ("png", "pdf"):
            style.save(figure, folder / f"{name}.{kind}")
    stdout.print(_table(found))
    print_text(
        f"{field.mass:.2%} of the effective receptive field lie in {field.area_fraction:.1%} of the image, an "
        f"equivalent diameter of {field.diameter_px:.1f} px ({field.diameter_fraction:.0%} of the width)\n"
        + "\n".join(str(folder / f"{name}.png") for name in drawn)
    )


def _table(found: Fields) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for number, column in enumerate(
        ("network", "feature map", "diameter, px", "of the width", "Gaussian fit, px", "theoretical, px")
    ):
        table.add_column(column, justify="right" if number > 1 else "left")
    for state, row in found.items():
        for name, field in row.items():
            table.add_row(
                state, name, f"{field.diameter_px:.1f}", f"{field.diameter_fraction:.0%}", f"{field.gaussian_px:.1f}",
                f"{field.theoretical_px:.0f}",
            )  # fmt: skip
    return table
