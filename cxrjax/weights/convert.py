"""Conversion of a published weight file to a directory of ours: every key is accounted for, or it is an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxrjax.errors import CxrError, check_choice
from cxrjax.files import write_json
from cxrjax.models import ARCHITECTURES
from cxrjax.models.backbone import Backbone
from cxrjax.models.input_spec import INPUT_SPECS, XRV, InputSpec, input_spec_name, one_channel, prepare
from cxrjax.weights.converted import (
    Card,
    check_architecture_options,
    check_destination,
    sha256,
    staging_directory,
    write_converted,
)
from cxrjax.weights.files import WeightFile, read_weight_file
from cxrjax.weights.published import (
    FittedWeights,
    RenamedArrays,
    abstract_model,
    fit_published,
    get_family,
    published_name,
    published_names,
    published_shapes,
    suggest_architecture,
    to_published_names,
)

REPORT = "report.json"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did with every key.

    Attributes:
      directory: directory of the converted weights.
      card: description of the weights.
      format: format of the file.
      used: our dotted path by the file's key.
      dropped: reason by the file's key, for keys that were not used.
      missing: our paths that the file does not fill; they get initial values where the weights are used.
      notes: what the conversion found and changed.
    """

    directory: Path
    card: Card
    format: str
    used: dict[str, str]
    dropped: dict[str, str]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {**vars(self), "directory": str(self.directory), "card": self.card.as_dict()}

    def lines(self) -> list[str]:
        """Return the report for the terminal: counts, and everything unusual; `report.json` lists every key."""
        card = self.card
        outputs = f"{card.classes} outputs" if card.classes else "no head"
        keys_by_reason: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            keys_by_reason.setdefault(reason, []).append(key)
        missing = [f"missing: {_abbreviate(list(self.missing))}: these keep initial values"] if self.missing else []
        return [
            f"{card.source} ({self.format}) -> {card.architecture}, {outputs}, "
            f"inputs {input_spec_name(card.input_spec)}",
            *(f"note: {note}" for note in self.notes),
            f"used: {len(self.used)} keys",
            *(f"dropped: {_abbreviate(keys)}: {reason}" for reason, keys in keys_by_reason.items()),
            *missing,
            f"written: {self.directory} ({REPORT} lists every key)",
        ]


def _abbreviate(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 4 else f"{', '.join(keys[:2])} ... ({len(keys)} keys)"


def convert(
    file: Path,
    architecture: str,
    out: Path,
    *,
    head: Literal["keep", "drop"] = "keep",
    labels: Sequence[str] = (),
    input_spec: str | None = None,
    channels: int | None = None,
    options: Mapping[str, Any] | None = None,
    restricted: bool = False,
) -> ConversionReport:
    """Convert a published file of weights; on an error nothing is written.

    Args:
      file: safetensors or PyTorch (see `read_weight_file`).
      architecture: name of our network.
      out: directory for `weights.safetensors` (float32), `card.json` and `report.json`.
      head: "keep" the file's outputs, or "drop" them.
      labels: names of the outputs; an empty name for an output without a meaning.
      input_spec: what the weights expect of their images, by name (`INPUT_SPECS`); None for what the file or the
        architecture says.
      channels: 1 to fold a first convolution of several channels; None to leave it.
      options: options of the architecture, where they are not its defaults.
      restricted: read PyTorch files with the reader here, even where PyTorch is installed.

    Raises:
      CxrError: the file cannot be read; a key is missing, unexpected, or of another shape; values are not finite; the
        file is of another architecture (the message names it) or takes other inputs; `out` is a run's directory, or
        holds the file itself or another conversion.
    """
    file, out, options = Path(file), Path(out), dict(options or {})
    check_choice("head", head, ("keep", "drop"))
    check_choice("network", architecture, ARCHITECTURES)
    if channels not in (None, 1):
        raise CxrError(f"channels = {channels}: weights can be folded to 1 channel only")
    check_architecture_options(options)
    abstract_model(architecture, classes=1, **options)  # refuse bad options before reading anything
    if file.is_file():
        check_destination(out, file, architecture)
    content = read_weight_file(file, restricted=restricted)
    renamed = to_published_names(content.arrays, get_family(architecture))
    try:
        model, fitted, notes = _fit(content, renamed, architecture, head, input_spec, options)
    except CxrError as error:
        other = suggest_architecture(content.arrays, architecture, options)
        reason = f"these are weights of {other}, not of {architecture}: use --arch {other}" if other else error
        raise CxrError(f"{file}: {reason}") from None
    notes = [*_origin_notes(content), *renamed.notes, *notes]
    arrays, spec = fitted.arrays, model.input_spec
    classes = 0 if head == "drop" else model.classes
    try:
        labels = _check_labels(labels or (content.labels if classes else ()), classes)
        if channels == 1:
            folded = fold_channels(model, arrays)
            arrays, spec = folded.arrays, folded.input_spec
            notes.append(folded.note(model.input_spec.channels))
    except CxrError as error:
        raise CxrError(f"{file}: {error}") from None
    if classes and not labels:
        notes.append(f"the {classes} outputs have no names: --labels sets them")
    original = renamed.original
    used = dict(sorted((original[name], ".".join(path)) for path, name in fitted.used.items()))
    dropped = {original[name]: reason for name, reason in sorted(fitted.dropped.items())} | renamed.dropped
    dropped |= dict.fromkeys(content.other_entries, "not part of the weights")
    notes = tuple(notes)
    card = Card(architecture, classes, spec, file.name, sha256(file), "", options, labels, notes)
    missing = tuple(".".join(path) for path in fitted.missing)
    with staging_directory(out) as staging:
        card = write_converted(staging, card, {".".join(path): np.ascontiguousarray(a) for path, a in arrays.items()})
        report = ConversionReport(out, card, content.format, used, dropped, missing, notes)
        write_json(staging / REPORT, report.as_dict())
    return report


def _fit(
    content: WeightFile,
    renamed: RenamedArrays,
    architecture: str,
    head: str,
    input_spec: str | None,
    options: dict[str, Any],
) -> tuple[Backbone, FittedWeights, list[str]]:
    """Return the network of the weights (shapes only), the weights that fit it, and notes."""
    family = get_family(architecture)
    bias = renamed.arrays.get(name := published_name(family, ("classifier", "output", "bias")))
    outputs = len(bias) if bias is not None and bias.ndim == 1 else 0
    if head == "keep" and not outputs:
        raise CxrError(f"the file has no head, {name} is missing: --head drop converts the rest")
    if input_spec:
        spec = INPUT_SPECS[check_choice("inputs", input_spec, INPUT_SPECS)]
    else:
        spec = XRV if _is_torchxrayvision(content, renamed) else ARCHITECTURES[architecture].input_spec
    _check_input_spec(content, renamed, family, spec)
    model = abstract_model(architecture, classes=outputs or 1, input_spec=spec, **options)
    notes, skip = [], []
    if head == "drop":
        skip = ["classifier", *_unfitting_modules(model, renamed)]
        notes.append(f"the head{f' ({outputs} outputs)' if outputs else ''} was dropped")
        notes += [f"module {module} was dropped: it does not fit" for module in skip[1:]]
    fitted = fit_published(model, renamed.arrays, skip=skip)
    types = {renamed.arrays[name].dtype.name for name in fitted.used.values()} - {"float32"}
    notes += [f"{dtype} values were written as float32" for dtype in sorted(types)]
    return model, fitted, notes


def _unfitting_modules(model: Backbone, renamed: RenamedArrays) -> list[str]:
    """Return the replaceable modules other than the head that are absent or all of another width.

    Anything in between is damage, which `fit_published` reports.
    """
    shapes, names, arrays = published_shapes(model), published_names(model), renamed.arrays

    def is_unfitting(module: str) -> bool:
        module_names = {path: name for path, name in names.items() if path[0] == module}
        kernels = [name for path, name in module_names.items() if path[-1] == "kernel"]
        is_absent = bool(module_names) and not any(name in arrays for name in module_names.values())
        differs = [name in arrays and arrays[name].shape != shapes[name] for name in kernels]
        return is_absent or (bool(differs) and all(differs))

    return [module for module in model.replaceable if module != "classifier" and is_unfitting(module)]


def _is_torchxrayvision(content: WeightFile, renamed: RenamedArrays) -> bool:
    return renamed.torchxrayvision or content.module.startswith("torchxrayvision.")


def _check_input_spec(content: WeightFile, renamed: RenamedArrays, family: type[Backbone], spec: InputSpec) -> None:
    """Raise a `CxrError` if the weights cannot be for such inputs."""
    name = input_spec_name(spec)
    if _is_torchxrayvision(content, renamed) and spec != XRV:
        raise CxrError(f"torchxrayvision's weights take -1024 to 1024: inputs must be xrv, not {name}")
    conv = getattr(family, "stem", ("",))[0]
    first = renamed.arrays.get(published_name(family, (*conv.split("."), "kernel"))) if conv else None
    if first is not None and first.ndim == 4 and first.shape[1] != spec.channels:
        channels = first.shape[1]
        fitting = [name for name, other in INPUT_SPECS.items() if other.channels == channels]
        raise CxrError(
            f"the first convolution takes {channels} channels and inputs {name} give {spec.channels}: "
            + (f"set --inputs to one of {', '.join(fitting)}" if fitting else "no input specification has as many")
            + (", and channels=1 folds them" if spec.channels == 1 else "")
        )


def _origin_notes(content: WeightFile) -> list[str]:
    """Say where in the file the weights were."""
    notes = [f"they were under {content.wrapper} in the file"] if content.wrapper else []
    if content.module:
        notes.append(f"the file holds a whole module, {content.module}: its arrays were read, nothing was run")
    return notes


def _check_labels(labels: Sequence[str], classes: int) -> tuple[str, ...]:
    """Return the labels if there are as many as outputs, without duplicates."""
    labels = tuple(labels)
    named = [label for label in labels if label]
    if labels and len(labels) != classes:
        raise CxrError(f"{len(labels)} labels for {classes} outputs" + ("" if classes else ": the head was dropped"))
    if len(set(named)) < len(named):
        raise CxrError(f"label {next(label for label in named if named.count(label) > 1)!r} is given twice")
    return labels


_SIDE = 64  # of the random image, px
Arrays = dict[tuple[str, ...], np.ndarray]


@dataclass(frozen=True)
class FoldedWeights:
    """Weights for one channel.

    Attributes:
      arrays: all of the network's, by our path.
      input_spec: what the network now expects.
      exact: whether it computes the same for every image, up to rounding.
      inner_error: relative difference of the first maps of a random image, where the convolution sees no padding.
      edge_error: the same where it does.
    """

    arrays: Arrays
    input_spec: InputSpec
    exact: bool
    inner_error: float
    edge_error: float

    def note(self, channels: int) -> str:
        """Describe what was done and what it costs."""
        exactness = "exact" if self.exact else "exact but at the edge, where padding is 0 after normalisation"
        return (
            f"{channels} input channels folded to 1, {exactness}; the first maps of a random image differ by "
            f"{self.inner_error:.1e} inside and {self.edge_error:.1e} at the edge (relative)"
        )


def fold_channels(model: Backbone, arrays: Arrays) -> FoldedWeights:
    """Sum the first convolution over its input channels, and move the normalisation's offset into the next norm.

    Of the model, shapes alone are enough; `arrays` are its weights by our path, HWIO.

    Raises:
      CxrError: it has one channel already, or nothing follows the convolution that could take up the constant.
    """
    if model.input_spec.channels == 1:
        raise CxrError("these weights take one channel already: leave out --channels 1")
    if not getattr(model, "stem", ("",))[0]:
        raise CxrError("this network has no single first convolution that could be folded")
    before, after = model.input_spec, one_channel(model.input_spec)
    conv, norm = (tuple(path.split(".")) if path else () for path in model.stem)
    kernel = arrays[*conv, "kernel"].astype(np.float64)
    mean, std = (np.array(values)[None, None, :, None] for values in (before.mean, before.std))
    all_alike = len(set(zip(before.mean, before.std, strict=True))) == 1
    summed = (kernel / std * after.std[0]).sum(2, keepdims=True)
    constant = np.zeros(kernel.shape[-1]) if all_alike else (kernel * (after.mean[0] - mean) / std).sum((0, 1, 2))
    folded = arrays | {(*conv, "kernel"): summed.astype(np.float32)}
    if (bias := (*conv, "bias")) in arrays:
        folded[bias] = (arrays[bias] + constant).astype(np.float32)
    elif norm:
        folded[*norm, "mean"] = (arrays[*norm, "mean"] - constant).astype(np.float32)
    elif constant.any():
        raise CxrError("the first convolution has neither a bias nor a norm after it: it cannot be folded")
    maps = _first_maps(model, before, arrays, conv, norm)
    difference = maps - _first_maps(model, after, folded, conv, norm)
    is_inner = _sees_no_padding(model, conv, kernel.shape)
    inner_error, edge_error = (
        float(np.linalg.norm(difference[:, where]) / np.linalg.norm(maps[:, where])) if where.any() else 0.0
        for where in (is_inner, ~is_inner)
    )
    return FoldedWeights(folded, after, all_alike or bool(is_inner.all()), inner_error, edge_error)


def _first_maps(model: Backbone, input_spec: InputSpec, arrays: Arrays, conv: tuple, norm: tuple) -> np.ndarray:
    """Return the first convolution of a random image, less the running mean of the next norm."""
    grey = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, _SIDE, _SIDE, 1), np.uint8))
    maps = _convolve(model, conv, np.asarray(prepare(grey, input_spec, jnp.float32)), arrays[*conv, "kernel"])
    maps = maps + arrays.get((*conv, "bias"), np.zeros(1, np.float32))
    return maps - arrays[*norm, "mean"] if norm else maps


def _sees_no_padding(model: Backbone, conv: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """Return bool[H, W] of the first maps: whether all of the kernel lies on the image."""
    ones = np.ones((1, _SIDE, _SIDE, 1), np.float32)
    return _convolve(model, conv, ones, np.ones((*shape[:2], 1, 1), np.float32))[0, :, :, 0] == shape[0] * shape[1]


def _convolve(model: Backbone, conv: tuple, images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with the strides and padding of the model's convolution."""
    layer: Any = model
    for name in conv:
        layer = layer[int(name)] if isinstance(layer, nnx.List) else getattr(layer, name)
    maps = jax.lax.conv_general_dilated(
        jnp.asarray(images), jnp.asarray(kernel), layer.strides, layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    return np.asarray(maps)
