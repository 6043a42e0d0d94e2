"""Published PyTorch networks with random weights, and what they compute."""

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

torch = pytest.importorskip("torch", reason="needs PyTorch: uv sync --group parity")
torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine


@dataclass(frozen=True)
class Family:
    """A family: how to make its networks, and which of their modules return our feature maps."""

    make: Callable[..., Any]
    size: tuple[int, int]  # height and width of the images compared
    modules: tuple[tuple[str, str], ...]  # pattern of our feature's name, and their module or "module[output number]"
    kinks: bool  # whether the activation's derivative has a jump, as ReLU's


@dataclass(frozen=True)
class Results:
    """Results of a network in one mode, in PyTorch's layout and by PyTorch's names.

    `gradients` are those of `sum(logits * weights)` for every parameter, and for the images as "input".
    """

    features: dict[str, np.ndarray]
    logits: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def _torchvision(name: str, **settings: Any) -> Any:
    """A network of torchvision, also where its C extension does not load.

    Its Python code then lacks two operators, which no network needs; they are declared here.
    """
    try:
        models = pytest.importorskip("torchvision", reason="needs torchvision: uv sync --group parity").models
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
    timm = pytest.importorskip("timm", reason="needs timm: uv sync --group parity")
    return timm.create_model(name, pretrained=False, **settings)


_KEPT_ALIVE: list[Any] = []


def _simple_cnn(_name: str, num_classes: int = 1000) -> Any:
    """The attention-fusion paper's simple CNN, with our module names."""
    nn = torch.nn

    def stage(channels: int, width: int) -> Any:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, width, 3), pool=nn.MaxPool2d(2), relu=nn.ReLU()))

    head = OrderedDict(hidden=nn.Linear(128, 256), relu=nn.ReLU(), output=nn.Linear(256, num_classes))
    stages = OrderedDict(stage1=stage(3, 32), stage2=stage(32, 64), stage3=stage(64, 128))
    pooling = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    return nn.Sequential(OrderedDict(**stages, **pooling, classifier=nn.Sequential(head)))


class _ChannelsLast(torch.nn.Module):
    """Flatten maps in our order: channels change fastest."""

    def forward(self, maps):
        return maps.permute(0, 2, 3, 1).flatten(1)


def _sequential_cnn(name: str, num_classes: int = 1000) -> Any:
    """The six-class study's networks for 64 px without dropout, with our module names."""
    nn, is_version_2 = torch.nn, name == "sequential_cnn_v2"

    def stage(channels: int, width: int) -> Any:
        layers = OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=int(is_version_2)), relu=nn.ReLU())
        return nn.Sequential(layers | ({"norm": nn.BatchNorm2d(width)} if is_version_2 else {"pool": nn.MaxPool2d(2)}))

    def dense(in_features: int, units: int) -> Any:
        layers = OrderedDict(linear=nn.Linear(in_features, units), relu=nn.ReLU())
        return nn.Sequential(layers | ({"norm": nn.BatchNorm1d(units)} if is_version_2 else {}))

    widths = (16, 128, 32) if is_version_2 else (32, 32, 32)
    stages = {f"stage{k}": stage(*pair) for k, pair in enumerate(pairwise((3, *widths)), start=1)}
    features = 32 * (64 * 64 if is_version_2 else 6 * 6)
    units = (features, 128, 128) if is_version_2 else (features, 128)
    layers = nn.Sequential(*(dense(*pair) for pair in pairwise(units)))
    head = nn.Sequential(OrderedDict(output=nn.Linear(128, num_classes)))
    return nn.Sequential(OrderedDict(**stages, flat=_ChannelsLast(), dense=layers, classifier=head))


def _family(
    make: Callable[..., Any], size: tuple[int, int], modules: dict[str, str], *names: str, kinks: bool = True
) -> dict[str, Family]:
    return dict.fromkeys(names, Family(make, size, tuple(modules.items()), kinks))


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

_FUNCTIONAL_RELU_AFTER = ("features.norm5",)  # torchvision calls it in `forward`


def published(name: str) -> Any:
    """The network in float64 with 1000 classes, and seeded random parameters and running statistics.

    Running statistics are near those of images like the compared ones. Independent ones would let the signal vanish or
    explode over a hundred layers, and deep features would depend on biases alone.
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
    return module.float().double()  # values that float32 represents, so that the type changes the arithmetic only


def images(name: str, seed: int = 0) -> np.ndarray:
    """Two smooth images with noise, float64[2, 3, H, W], of values that float32 represents."""
    height, width = FAMILIES[name].size
    rng = np.random.default_rng(seed)
    smooth = np.kron(rng.standard_normal((2, 3, height // 8, width // 8)), np.ones((8, 8)))
    return (smooth + 0.3 * rng.standard_normal(smooth.shape)).astype(np.float32).astype(np.float64)


def run(network: Any, modules: dict[str, str], pixels: np.ndarray, weights: np.ndarray, *, train: bool) -> Results:
    """Run the network in one mode, in the type of `pixels`; the network itself does not change.

    Args:
      network: a PyTorch network.
      modules: its module by our name of each feature map.
      pixels: images, B x C x H x W.
      weights: B x K weights of the logits in the differentiated sum.
      train: whether in training mode.
    """
    network = copy.deepcopy(network).to(torch.from_numpy(pixels).dtype).train(train)
    maps = {}
    for name, path in modules.items():
        _hook(network, path, lambda value, name=name: maps.__setitem__(name, value))
    images = torch.from_numpy(pixels).requires_grad_()
    logits = network(images)
    (logits * torch.from_numpy(weights)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    statistics = {name: buffer for name, buffer in network.named_buffers() if ".running_" in name}

    def as_numpy(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    return Results(
        as_numpy(maps), logits.detach().numpy(), as_numpy({"input": images.grad, **gradients}), as_numpy(statistics)
    )


def find_modules(name: str, features: Iterable[str]) -> dict[str, str]:
    """The published network's module for each of our feature maps."""
    modules = {}
    for feature in features:
        patterns = FAMILIES[name].modules
        matches = [re.sub(ours, theirs, feature) for ours, theirs in patterns if re.fullmatch(ours, feature)]
        assert len(matches) == 1, f"{name}: which module of the published network computes {feature}?"
        modules[feature] = matches[0]
    return modules


def _hook(network: Any, path: str, store: Callable[[Any], None]) -> None:
    """Call `store` with a copy of what the module at `path` returns (later layers may work in place)."""
    path, _, item = path.partition("[")

    def hook(_module, _inputs, result):
        value = (result[int(item.rstrip("]")) - 1] if item else result).detach().clone()
        store(torch.relu(value) if path in _FUNCTIONAL_RELU_AFTER else value)

    network.get_submodule(path).register_forward_hook(hook)


def count_multiply_adds(module: Any, size: int, pattern: str = "") -> int:
    """PyTorch's count of one image's multiply-adds; of modules whose path matches `pattern`, or of all."""
    from torch.utils.flop_counter import FlopCounterMode

    module = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(1, 3, size, size, device="meta", dtype=torch.float64))
    if not pattern:
        return counter.get_total_flops() // 2
    counts = counter.get_flop_counts().items()
    return sum(sum(flops.values()) for name, flops in counts if re.search(pattern, name)) // 2
