"""From a published file of weights to a directory of ours: every key accounted for, or an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cxrjax.errors import CxrError, check_choice
from cxrjax.files import write_json
from cxrjax.models.backbone import Backbone
from cxrjax.models.input_spec import NAMED, XRV, InputSpec
from cxrjax.models.registry import ARCHITECTURES
from cxrjax.weights.converted import Card, called, check_destination, check_options, sha256, together, write_converted
from cxrjax.weights.files import Contents, read_contents
from cxrjax.weights.fold_channels import fold
from cxrjax.weights.names import Named, family_of, published, shapes_of, suggestion
from cxrjax.weights.published import (
    Fit,
    Loaded,
    fit_published,
    load_published,
    published_name,
    published_names,
    published_shapes,
)

REPORT = "report.json"


@dataclass(frozen=True)
class Report:
    """What a conversion did with every key.

    Attributes:
      directory: where the weights are.
      card: what they are.
      format: of the file.
      used: our dotted path by the file's key.
      dropped: why a key of the file was not used.
      missing: our paths that the file does not fill; they get initial values where the weights are used.
      notes: what was found and changed, in words.
    """

    directory: Path
    card: Card
    format: str
    used: dict[str, str]
    dropped: dict[str, str]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "directory": str(self.directory), "card": self.card.as_dict()}

    def lines(self) -> list[str]:
        """For a person: counts, and everything out of the ordinary; `report.json` lists every key."""
        card = self.card
        outputs = f"{card.classes} outputs" if card.classes else "no head"
        why: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            why.setdefault(reason, []).append(key)
        return [
            f"{card.source} ({self.format}) -> {card.architecture}, {outputs}, inputs {called(card.inputs)}",
            *(f"note: {note}" for note in self.notes),
            f"used: {len(self.used)} keys",
            *(f"dropped: {_some(keys)}: {reason}" for reason, keys in why.items()),
            *([f"missing: {_some(list(self.missing))}: initial values stand in"] if self.missing else []),
            f"written: {self.directory} ({REPORT} lists every key)",
        ]


def _some(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 4 else f"{', '.join(keys[:2])} ... ({len(keys)} keys)"


def convert(
    file: Path,
    architecture: str,
    out: Path,
    *,
    head: Literal["keep", "drop"] = "keep",
    labels: Sequence[str] = (),
    inputs: str | None = None,
    channels: int | None = None,
    options: Mapping[str, Any] | None = None,
    restricted: bool = False,
) -> Report:
    """Convert a published file of weights; on an error nothing is written.

    Args:
      file: safetensors, or PyTorch's (`read_contents`).
      architecture: the name of our network.
      out: directory for `weights.safetensors` (float32), `card.json` and `report.json`.
      head: "keep" the file's outputs, or "drop" them.
      labels: names of the outputs, an empty one for an output that means nothing.
      inputs: what the weights expect of their images, by name (`NAMED`); None for what the file or the architecture
        says.
      channels: 1 to fold a first convolution of several channels; None to leave it.
      options: of the architecture, where it is not the default.
      restricted: read PyTorch's files with the reader here, even where PyTorch is installed.

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
    check_options(options)
    shapes_of(architecture, classes=1, **options)  # options that do not fit are told before anything is read
    if file.is_file():
        check_destination(out, file, architecture)
    contents = read_contents(file, restricted=restricted)
    family = family_of(architecture)
    named = published(contents.arrays, family)
    try:
        model, fit, notes = _fit(contents, named, architecture, head, inputs, options)
    except CxrError as error:
        other = suggestion(contents.arrays, architecture, options)
        told = f"these are weights of {other}, not of {architecture}: take --arch {other}" if other else error
        raise CxrError(f"{file}: {told}") from None
    notes = [*_origin(contents), *named.notes, *notes]
    arrays, spec = fit.arrays, model.inputs
    classes = 0 if head == "drop" else model.classes
    try:
        labels = _checked_labels(labels or (contents.labels if classes else ()), classes)
        if channels == 1:
            folded = fold(model, arrays)
            arrays, spec = folded.arrays, folded.inputs
            notes.append(folded.note(model.inputs.channels))
    except CxrError as error:
        raise CxrError(f"{file}: {error}") from None
    if classes and not labels:
        notes.append(f"the {classes} outputs have no names: --labels gives them some")
    original = named.original
    used = dict(sorted((original[name], ".".join(path)) for path, name in fit.used.items()))
    dropped = {original[name]: reason for name, reason in sorted(fit.dropped.items())} | named.dropped
    dropped |= dict.fromkeys(contents.beside, "beside the weights")
    notes = tuple(notes)
    card = Card(architecture, classes, spec, file.name, sha256(file), "", options, labels, notes)
    missing = tuple(".".join(path) for path in fit.missing)
    with together(out) as partial:
        card = write_converted(partial, card, {".".join(path): np.ascontiguousarray(a) for path, a in arrays.items()})
        report = Report(out, card, contents.format, used, dropped, missing, notes)
        write_json(partial / REPORT, report.as_dict())
    return report


def load_file(model: Backbone, file: Path, *, leave: Sequence[str] = ()) -> Loaded:
    """Fill a network with a published file of weights, in place, as `load_published` does.

    Args:
      model: of the file's architecture.
      file: safetensors, or PyTorch's.
      leave: modules, of the model's `replaceable`, that keep their values.

    Raises:
      CxrError: as `read_contents` and `load_published`, or the file's weights take other inputs; the network stays as
        it was.
    """
    contents = read_contents(file)
    named = published(contents.arrays, type(model))
    try:
        _check_inputs(contents, named, type(model), model.inputs)
        return load_published(model, named.arrays, leave=leave)
    except CxrError as error:
        raise CxrError(f"{file}: {error}") from None


def _fit(
    contents: Contents, named: Named, architecture: str, head: str, inputs: str | None, options: dict[str, Any]
) -> tuple[Backbone, Fit, list[str]]:
    """The network that the weights are for, of shapes only; the weights as it wants them; and what to say of it."""
    family = family_of(architecture)
    bias = named.arrays.get(name := published_name(family, ("classifier", "output", "bias")))
    outputs = len(bias) if bias is not None and bias.ndim == 1 else 0
    if head == "keep" and not outputs:
        raise CxrError(f"there is no head in it, {name} is missing: --head drop takes the rest")
    spec = NAMED[check_choice("inputs", inputs, NAMED)] if inputs else ARCHITECTURES[architecture].inputs
    spec = XRV if _of_torchxrayvision(contents, named) and not inputs else spec
    _check_inputs(contents, named, family, spec)
    model = shapes_of(architecture, classes=outputs or 1, inputs=spec, **options)
    notes, leave = [], []
    if head == "drop":
        leave = ["classifier", *_unfitting(model, named)]
        notes.append(f"the head{f' ({outputs} outputs)' if outputs else ''} was dropped")
        notes += [f"module {module} was dropped: it does not fit" for module in leave[1:]]
    fit = fit_published(model, named.arrays, leave=leave)
    kinds = {named.arrays[name].dtype.name for name in fit.used.values()} - {"float32"}
    notes += [f"{kind} values were written as float32" for kind in sorted(kinds)]
    return model, fit, notes


def _unfitting(model: Backbone, named: Named) -> list[str]:
    """The replaceable modules beside the head that are absent or of another width: anything less is damage."""
    shapes, names, arrays = published_shapes(model), published_names(model), named.arrays

    def replaced(module: str) -> bool:
        own = {path: name for path, name in names.items() if path[0] == module}
        kernels = [name for path, name in own.items() if path[-1] == "kernel"]
        absent = bool(own) and not any(name in arrays for name in own.values())
        other = [name in arrays and arrays[name].shape != shapes[name] for name in kernels]
        return absent or (bool(other) and all(other))

    return [module for module in model.replaceable if module != "classifier" and replaced(module)]


def _of_torchxrayvision(contents: Contents, named: Named) -> bool:
    return named.torchxrayvision or contents.module.startswith("torchxrayvision.")


def _check_inputs(contents: Contents, named: Named, family: type[Backbone], spec: InputSpec) -> None:
    """Raise a `CxrError` if the weights cannot be for such inputs."""
    if _of_torchxrayvision(contents, named) and spec != XRV:
        raise CxrError(f"torchxrayvision's weights take -1024 to 1024: inputs must be xrv, not {called(spec)}")
    conv = getattr(family, "stem", ("",))[0]
    first = named.arrays.get(published_name(family, (*conv.split("."), "kernel"))) if conv else None
    if first is not None and first.ndim == 4 and first.shape[1] != spec.channels:
        there = first.shape[1]
        names = [name for name, other in NAMED.items() if other.channels == there]
        raise CxrError(
            f"its first convolution takes {there} channels and inputs {called(spec)} give {spec.channels}: "
            + (f"say what the weights expect, one of {', '.join(names)}, as inputs" if names else "nothing here does")
            + (", and channels=1 folds them" if spec.channels == 1 else "")
        )


def _origin(contents: Contents) -> list[str]:
    """Where in the file the weights were."""
    return [f"they were under {contents.wrapper} in the file"] * bool(contents.wrapper) + [
        f"the file holds a whole module, {contents.module}: its arrays were taken, nothing was run"
    ] * bool(contents.module)


def _checked_labels(labels: Sequence[str], classes: int) -> tuple[str, ...]:
    """Labels, if they can be those of so many outputs."""
    labels = tuple(labels)
    named = [label for label in labels if label]
    if labels and len(labels) != classes:
        raise CxrError(f"{len(labels)} labels for {classes} outputs" + ("" if classes else ": the head was dropped"))
    if len(set(named)) < len(named):
        raise CxrError(f"label {next(label for label in named if named.count(label) > 1)!r} is given twice")
    return labels
