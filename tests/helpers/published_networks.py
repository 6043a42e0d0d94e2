"""The published PyTorch networks, and what they compute for weights drawn from a seed."""

import copy
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: uv sync --group peers")
torch.set_num_threads(1)  # threads that wait for each other lose much time on a busy machine


@dataclass(frozen=True)
class Family:
    """One family: how its networks are made, and where they compute what our feature maps hold."""

    make: Callable[..., Any]
    size: tuple[int, int]  # height and width of the images compared
    places: tuple[tuple[str, str], ...]  # pattern of our name, and their module or "module[number in its list]"
    kinks: bool  # whether activations have a jump in their derivative, as ReLU has


@dataclass(frozen=True)
class Results:
    """What a network computes in one mode, in PyTorch's layout and by PyTorch's names.

    `gradients` are those of `sum(logits * weights)`, by every parameter, and by the images as "input".
    """

    features: dict[str, np.ndarray]
    logits: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def _torchvision(name: str, **settings: Any) -> Any:
    """A network of torchvision, also where that package's C extension does not load.

    Its Python code then stumbles over two operators that the extension would have declared; no network needs them.
    """
    try:
        models = pytest.importorskip("torchvision", reason="needs torchvision: uv sync --group peers").models
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        from torch import library

        operators = library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT_ALIVE.append(operators)
        import torchvision

        models = torchvision.models
    return getattr(models, name)(weights=None, **settings)


def _timm(name: str, **settings: Any) -> Any:
    _torchvision("resnet18")  # timm imports torchvision
    timm = pytest.importorskip("timm", reason="needs timm: uv sync --group peers")
    return timm.create_model(name, pretrained=False, **settings)


_KEPT_ALIVE: list[Any] = []


def _simple_cnn(_name: str, num_classes: int = 1000) -> Any:
    """The attention-fusion paper's simple CNN, with our names."""
    nn = torch.nn

    def stage(channels: int, width: int) -> Any:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, width, 3), pool=nn.MaxPool2d(2), relu=nn.ReLU()))

    head = OrderedDict(hidden=nn.Linear(128, 256), relu=nn.ReLU(), output=nn.Linear(256, num_classes))
    stages = OrderedDict(stage1=stage(3, 32), stage2=stage(32, 64), stage3=stage(64, 128))
    pooling = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    return nn.Sequential(OrderedDict(**stages, **pooling, classifier=nn.Sequential(head)))


class _ChannelsLast(torch.nn.Module):
    """Maps as one vector, in our order: channels change fastest."""

    def forward(self, maps):
        return maps.permute(0, 2, 3, 1).flatten(1)


def _sequential_cnn(name: str, num_classes: int = 1000) -> Any:
    """The six-class study's networks for 64 px without dropout, with our names."""
    nn, second = torch.nn, name == "sequential_cnn_v2"

    def stage(channels: int, width: int) -> Any:
        layers = OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=int(second)), relu=nn.ReLU())
        return nn.Sequential(layers | ({"norm": nn.BatchNorm2d(width)} if second else {"pool": nn.MaxPool2d(2)}))

    def dense(inputs: int, units: int) -> Any:
        layers = OrderedDict(linear=nn.Linear(inputs, units), relu=nn.ReLU())
        return nn.Sequential(layers | ({"norm": nn.BatchNorm1d(units)} if second else {}))

    widths = (16, 128, 32) if second else (32, 32, 32)
    stages = {f"stage{k}": stage(*pair) for k, pair in enumerate(pairwise((3, *widths)), start=1)}
    values = 32 * (64 * 64 if second else 6 * 6)
    units = (values, 128, 128) if second else (values, 128)
    rows = nn.Sequential(*(dense(*pair) for pair in pairwise(units)))
    head = nn.Sequential(OrderedDict(output=nn.Linear(128, num_classes)))
    return nn.Sequential(OrderedDict(**stages, flat=_ChannelsLast(), dense=rows, classifier=head))


def _family(
    make: Callable[..., Any], size: tuple[int, int], places: dict[str, str], *names: str, kinks: bool = True
) -> dict[str, Family]:
    return dict.fromkeys(names, Family(make, size, tuple(places.items()), kinks))


FAMILIES = {
    **_family(
        _torchvision,
        (96, 72),
        {"stem": "features.pool0", r"block(\d)": r"features.denseblock\1", "final": "features.norm5"},
        *("densenet121", "densenet169", "densenet201"),
    ),
    **_family(
        _torchvision,
        (72, 96),
        {"stem": "maxpool", r"layer(\d)": r"layer\1", "final": "layer4"},
        *("resnet18", "resnet34", "resnet50", "resnet101"),
    ),
    **_family(
        partial(_torchvision, dropout=0.0, stochastic_depth_prob=0.0),
        (64, 88),
        {
            "stem": "features.0",
            r"stage(\d)_expansion": r"features.\1.0.block.0",
            r"stage(\d)": r"features.\1",
            "final": "features.8",
        },
        *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
        kinks=False,
    ),
    **_family(
        _timm,
        (64, 96),
        {"stem": "act2", "layer1": "layer1", r"stage(\d)_branch(\d)": r"stage\1[\2]", "final": "final_layer"},
        *("hrnet_w18", "hrnet_w32", "hrnet_w48"),
    ),
    **_family(_simple_cnn, (72, 64), {r"stage(\d)": r"stage\1", "final": "stage3"}, "simple_cnn"),
    **_family(
        _sequential_cnn,
        (64, 64),
        {r"stage(\d)": r"stage\1", "final": "stage3"},
        *("sequential_cnn", "sequential_cnn_v2"),
    ),
}

_RELU_FOLLOWS = ("features.norm5",)  # and it is no module


def published(name: str) -> Any:
    """The network in float64, at 1000 classes; every parameter and running statistic is drawn from a seed.

    Running statistics are drawn near those of images like the compared ones. Independent ones would let the signal die
    or explode over a hundred layers, and deep features would depend on biases alone.
    """
    module = FAMILIES[name].make(name, num_classes=1000).double()
    rng = np.random.default_rng(7)
    norms = [norm for norm in module.modules() if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    with torch.no_grad():
        for parameter in module.parameters():
            shape = tuple(parameter.shape)
            deviation = 0.1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:]))
            parameter.copy_(torch.from_numpy(deviation * rng.standard_normal(shape)))
        for norm in norms:
            norm.weight.copy_(torch.from_numpy(rng.uniform(0.6, 1.4, norm.num_features)))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        module.train()(torch.from_numpy(images(name, seed=1)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            shift = 0.1 * torch.from_numpy(rng.standard_normal(norm.num_features))
            norm.running_mean += shift * norm.running_var.sqrt()
            norm.running_var *= torch.from_numpy(rng.uniform(0.5, 2.0, norm.num_features))
    return module.float().double()  # values that float32 holds, so that the type changes arithmetic alone


def images(name: str, seed: int = 0) -> np.ndarray:
    """Two smooth images with noise, 2 x 3 x H x W: float64, of values that float32 holds."""
    height, width = FAMILIES[name].size
    rng = np.random.default_rng(seed)
    smooth = np.kron(rng.standard_normal((2, 3, height // 8, width // 8)), np.ones((8, 8)))
    return (smooth + 0.3 * rng.standard_normal(smooth.shape)).astype(np.float32).astype(np.float64)


def run(module: Any, places: dict[str, str], pixels: np.ndarray, weights: np.ndarray, *, train: bool) -> Results:
    """What the network computes in one mode, in the type of `pixels`; the network stays as it is.

    Args:
      module: a PyTorch network.
      places: by our names of the feature maps, where the module has them.
      pixels: images, B x C x H x W.
      weights: of the logits in the function whose gradients are taken, B x K.
      train: whether in training mode.
    """
    module = copy.deepcopy(module).to(torch.from_numpy(pixels).dtype).train(train)
    maps = {}
    for name, place in places.items():
        _watch(module, place, lambda value, name=name: maps.__setitem__(name, value))
    given = torch.from_numpy(pixels).requires_grad_()
    logits = module(given)
    (logits * torch.from_numpy(weights)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    statistics = {name: buffer for name, buffer in module.named_buffers() if ".running_" in name}

    def as_numpy(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    return Results(
        as_numpy(maps), logits.detach().numpy(), as_numpy({"input": given.grad, **gradients}), as_numpy(statistics)
    )


def places_of(name: str, features: Iterable[str]) -> dict[str, str]:
    """Where the published network has each of our feature maps."""
    found = {}
    for feature in features:
        fits = [re.sub(ours, theirs, feature) for ours, theirs in FAMILIES[name].places if re.fullmatch(ours, feature)]
        assert len(fits) == 1, f"{name}: say where the published network computes {feature}"
        found[feature] = fits[0]
    return found


def _watch(module: Any, place: str, keep: Callable[[Any], None]) -> None:
    """Call `keep` with a copy of what the module at `place` returns (later layers may work in place)."""
    path, _, item = place.partition("[")

    def hook(_module, _inputs, result):
        value = (result[int(item.rstrip("]")) - 1] if item else result).detach().clone()
        keep(torch.relu(value) if path in _RELU_FOLLOWS else value)

    module.get_submodule(path).register_forward_hook(hook)


def arithmetic(module: Any, size: int, only: str = "") -> int:
    """Multiply-adds of one image's forward pass as PyTorch counts them; of modules that `only` fits, or of all."""
    from torch.utils.flop_counter import FlopCounterMode

    module = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(1, 3, size, size, device="meta", dtype=torch.float64))
    if not only:
        return counter.get_total_flops() // 2
    counts = counter.get_flop_counts().items()
    return sum(sum(of.values()) for name, of in counts if re.search(only, name)) // 2
