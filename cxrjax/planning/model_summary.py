"""Summaries of networks by tracing alone: parameters, feature maps, receptive fields, operations, inputs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.extend.core import Jaxpr
from rich import box
from rich.table import Table

from cxrjax.console import progress_bar
from cxrjax.errors import CxrError, check_choice, check_positive
from cxrjax.explain.inputs import with_names
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.jaxprs import needed_equations, subjaxprs
from cxrjax.models import ARCHITECTURES, abstract
from cxrjax.models.input_spec import INPUT_SPECS, InputSpec
from cxrjax.models.network import Network, parameter_count


@dataclass(frozen=True)
class FeatureMap:
    """One feature map.

    Attributes:
      name: name in the backbone.
      channels: number of channels.
      height: number of rows, for images of the summary's size.
      width: number of columns.
      stride: px between neighbouring positions; 0 if no local path leads to the image.
      receptive_field: side, px, of the theoretical receptive field of the local paths, not clipped to the image.
      whole: whether some path reads the whole image (squeeze-and-excitation, attention), so that every pixel counts.
    """

    name: str
    channels: int
    height: int
    width: int
    stride: float
    receptive_field: int
    whole: bool


@dataclass(frozen=True)
class ModelSummary:
    """The summary of one network.

    Attributes:
      name: name in configs.
      reference: the implementation or paper that defines it.
      classes: number of findings.
      parameters: number of parameters, without batch statistics.
      size: side of the square images, px.
      multiply_adds: multiply-adds of convolutions and matrix products, padding included, in the forward pass of one
        image.
      inputs: what the network expects of its images.
      maps: feature maps in order; the head takes the last.
    """

    name: str
    reference: str
    classes: int
    parameters: int
    size: int
    multiply_adds: int
    inputs: InputSpec
    maps: tuple[FeatureMap, ...]

    @property
    def gflops(self) -> float:
        """Floating-point operations per image in 1e9: two per multiply-add."""
        return 2 * self.multiply_adds / 1e9

    def as_dict(self) -> dict[str, Any]:
        """Return the summary ready for JSON."""
        return {**asdict(self), "gflops": self.gflops}


def summarize_model(name: str, *, size: int = 224, classes: int = 14) -> ModelSummary:
    """Summarize a network.

    Args:
      name: name in the registry.
      size: side of the square images, px; a network with a fixed image size keeps its own.
      classes: number of findings.

    Raises:
      CxrError: the name is unknown, classes or size are out of range, or the network does not take this size.
    """
    network = abstract(name, classes=classes)
    size = getattr(network.model(), "image_size", check_positive("size", size))
    image = jax.ShapeDtypeStruct((1, size, size, network.input_spec.channels), network.dtype)

    def forward(network: Network, images: jax.Array) -> Any:
        model = network.model()
        features = model.features(images)
        return with_names(features), model.head(features)

    program, (features, _) = jax.make_jaxpr(forward, return_shape=True)(network, image)
    fields = receptive_fields(network)
    maps = [
        FeatureMap(
            name=str(feature),
            channels=maps.shape[-1],
            height=maps.shape[1],
            width=maps.shape[2],
            stride=fields[feature].stride,
            receptive_field=int(fields[feature].size),
            whole=bool(fields[feature].whole),
        )
        for feature, maps in features
    ]
    return ModelSummary(
        name=name,
        reference=ARCHITECTURES[name].reference,
        classes=classes,
        parameters=parameter_count(network),
        size=size,
        multiply_adds=multiply_adds(program.jaxpr),
        inputs=network.input_spec,
        maps=tuple(maps),
    )


def summarize_models(names: Sequence[str] = (), *, size: int = 224, classes: int = 14) -> list[ModelSummary]:
    """Summarize these networks, or all of the registry; see `summarize_model`."""
    chosen = [check_choice("network", name, ARCHITECTURES) for name in names] or list(ARCHITECTURES)
    with progress_bar("tracing", len(chosen), unit="networks") as advance:
        summaries = []
        for name in chosen:
            try:
                summaries.append(summarize_model(name, size=size, classes=classes))
            except CxrError as error:
                raise CxrError(f"{name} at {size} px: {error}") from error
            advance()
    return summaries


def multiply_adds(jaxpr: Jaxpr, results: Sequence[bool] | None = None) -> int:
    """Count the multiply-adds of a program's convolutions and matrix products, as papers do.

    Products with padding count; element-wise operations, and operations that no result needs, do not. (XLA's cost
    analysis leaves out padding, counts element-wise operations and sees a device's substitutes for convolutions.) A
    conditional counts its most expensive branch; a loop without a fixed number of iterations counts one.

    Args:
      jaxpr: the program.
      results: which of its results are needed; default: all.
    """
    return sum(_multiply_adds(equation, needed) for equation, needed in needed_equations(jaxpr, results))


def _multiply_adds(equation: Any, needed: Sequence[bool]) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        outputs, kernel = equation.outvars[0].aval.size, equation.invars[1].aval
        return outputs * kernel.size // kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    counts = []
    for program in subjaxprs(equation):
        # The results of a call are those of its program; a loop feeds them back, so it needs all.
        is_call = len(program.jaxpr.outvars) == len(needed) and name not in ("scan", "while")
        counts.append(multiply_adds(program.jaxpr, needed if is_call else None))
    if name == "cond":  # of branches for several platforms, the last is the general one
        return counts[-1] if parameters.get("branches_platforms") else max(counts)
    return sum(counts) * (parameters["length"] if name == "scan" else 1)


def overview_table(summaries: Sequence[ModelSummary]) -> Table:
    """Return a terminal table with a line per network."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("network", no_wrap=True)
    for column in ("parameters", "maps", "stride, px", "field, px", "GFLOPs", "at px"):
        table.add_column(column, justify="right")
    table.add_column("inputs", no_wrap=True)
    table.add_column("reference", overflow="fold")
    for summary in summaries:
        last = summary.maps[-1]
        table.add_row(
            summary.name, f"{summary.parameters:,}", f"{last.channels}", f"{last.stride:g}",
            "whole image" if last.whole else f"{last.receptive_field:,}",
            f"{summary.gflops:.2f}", f"{summary.size}", _spec_name(summary.inputs), summary.reference,
        )  # fmt: skip
    return table


def detail_table(summary: ModelSummary) -> Table:
    """Return a terminal table of a network's feature maps, with everything else in the title."""
    table = Table(
        title=f"{summary.name} ({summary.reference})\n{summary.parameters:,} parameters at {summary.classes} findings, "
        f"{summary.gflops:.2f} GFLOPs at {summary.size} px\n{_describe_inputs(summary.inputs)}",
        title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("maps", no_wrap=True)
    for column in ("channels", f"size at {summary.size} px", "stride, px", "receptive field, px"):
        table.add_column(column, justify="right")
    for maps in summary.maps:
        table.add_row(
            maps.name, f"{maps.channels}", f"{maps.height} x {maps.width}", f"{maps.stride:g}", _format_field(maps)
        )  # fmt: skip
    return table


def _format_field(maps: FeatureMap) -> str:
    local = f"{maps.receptive_field:,}" if maps.receptive_field else ""
    return " ".join(filter(None, (local, "+ whole image" if local else "whole image"))) if maps.whole else local


def _spec_name(inputs: InputSpec) -> str:
    return next((name for name, spec in INPUT_SPECS.items() if spec == inputs), "its own")


def _describe_inputs(inputs: InputSpec) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (inputs.mean, inputs.std))
    kind = _spec_name(inputs)
    return (
        f"inputs {kind}: grey 0..255 to {inputs.low:g}..{inputs.high:g} in {inputs.channels} "
        f"channel{'s' if inputs.channels > 1 else ''}, less mean {mean}, over deviation {std}"
    )
