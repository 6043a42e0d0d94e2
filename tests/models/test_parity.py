"""Networks with a parity fixture compute what the published implementation computes."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiling import FAST_COMPILE
from flax import nnx
from load_published import load_published
from parity import Parity, relative_error

from cxrjax.models import create, hrnet, resnet
from cxrjax.models.layers import skip_init
from cxrjax.models.network import Network, parameter_count
from cxrjax.weights.published import published_names

FIXTURES = [
    *("tv-densenet121", "tv-efficientnet_b0", "tv-efficientnet_b3", "tv-resnet50"),
    "timm-hrnet_w18",
    pytest.param("timm-hrnet_w32", marks=pytest.mark.slow),
]

# Some values before a ReLU are so near 0 that rounding decides their sign, and one sign is up to 1 % of a gradient.
# (bias, channel, offset) moves such a value to the side it has in the reference's own float32 pass.
NUDGES = {
    ("tv-densenet121", "inference"): [("denseblock1.denselayer3.norm2.bias", 81, 1e-6)],
    ("tv-resnet50", "inference"): [
        ("layer3.2.bn3.bias", 332, 5e-6),
        ("layer4.0.bn3.bias", 605, -6e-5),
        ("layer4.1.bn2.bias", 15, 3e-5),
        ("layer4.1.bn3.bias", 240, -6e-5),
        ("layer4.2.bn2.bias", 257, 6e-5),
    ],
    ("tv-resnet50", "training"): [
        ("layer2.1.bn3.bias", 439, -4e-6),
        ("layer3.3.bn3.bias", 530, -8e-6),
        ("layer4.0.bn1.bias", 502, -3e-5),
        ("layer4.1.bn3.bias", 1265, -3e-5),
    ],
    ("timm-hrnet_w18", "inference"): [
        ("stage2.0.branches.1.2.bn2.bias", 34, 5e-6),
        ("stage3.2.branches.0.2.bn1.bias", 15, -6e-6),
        ("stage3.3.branches.1.0.bn1.bias", 15, 1e-5),
        ("stage4.0.branches.1.3.bn2.bias", 24, -4e-5),
        ("stage4.1.branches.2.2.bn1.bias", 53, -2e-5),
        ("stage4.2.branches.0.2.bn1.bias", 17, -1e-5),
        ("incre_modules.1.0.bn1.bias", 54, 6e-5),
        ("stage4.2.fuse_layers.3.0.2.1.bias", 1, -2e-5),
        ("downsamp_modules.1.1.bias", 4, -4e-5),
    ],
    ("timm-hrnet_w18", "training"): [
        ("stage3.0.branches.1.1.bn1.bias", 22, 5e-6),
        ("stage3.1.branches.1.3.bn1.bias", 31, 1e-6),
        ("stage3.1.fuse_layers.1.0.0.1.bias", 18, -1e-5),
        ("stage4.2.branches.0.0.bn2.bias", 3, 1e-4),
        ("stage4.2.branches.0.1.bn1.bias", 5, -8e-6),
        ("stage4.2.branches.0.3.bn1.bias", 4, -5e-6),
        ("stage4.2.branches.3.2.bn2.bias", 26, -3e-5),
        ("incre_modules.0.0.bn1.bias", 26, -4e-5),
        ("incre_modules.0.0.bn3.bias", 113, 1e-4),
        ("incre_modules.2.0.bn1.bias", 7, -3e-5),
        ("incre_modules.2.0.bn1.bias", 31, 2e-5),
    ],
    ("timm-hrnet_w32", "inference"): [
        ("layer1.3.bn3.bias", 88, 1e-6),
        ("stage3.0.branches.2.2.bn2.bias", 19, -1e-5),
        ("stage3.1.fuse_layers.0.1.1.bias", 8, 5e-5),
        ("stage4.0.branches.1.3.bn2.bias", 44, 7e-5),
        ("stage4.2.branches.2.0.bn2.bias", 23, 6e-5),
        ("incre_modules.0.0.bn3.bias", 44, 3e-5),
        ("incre_modules.0.0.bn3.bias", 67, -1e-5),
    ],
    ("timm-hrnet_w32", "training"): [
        ("stage3.0.branches.0.3.bn2.bias", 3, -2e-5),
        ("stage3.3.branches.0.1.bn2.bias", 2, -2e-5),
        ("stage4.0.branches.1.0.bn1.bias", 12, -1e-5),
        ("stage4.1.fuse_layers.0.1.1.bias", 20, 1e-5),
        ("stage4.2.branches.1.3.bn2.bias", 59, 6e-5),
    ],
}

# Our own float32 rounding flips such signs too, and moves gradients by 1 to 2 %, as PyTorch's own float32 gradients
# differ from its float64 ones. There gradients are compared in float64 only, and float32 computes forwards only.
FLOAT64_GRADIENTS = {("tv-densenet121", "training")} | {
    (name, mode) for name in ("tv-resnet50", "timm-hrnet_w18", "timm-hrnet_w32") for mode in ("inference", "training")
}


@pytest.fixture(scope="module", params=FIXTURES)
def parity(request, shared) -> Parity:
    return Parity(shared / "parity", request.param)


@pytest.fixture
def compiled(parity, monkeypatch) -> Callable[[Callable], Callable]:
    """The function that compiles a function of a network.

    HRNet's 300 convolutions compile in a fifth of the time layer by layer, since equal layers compile once.
    """
    if "hrnet" not in parity.name:
        return partial(jax.jit, compiler_options=FAST_COMPILE)

    @cache
    def by_layer(method: Callable, _remat: str, level: str = "layer", static: tuple[int, ...] = (2,)) -> Callable:
        return nnx.jit(method, static_argnums=static, graph=False) if level == "layer" else method

    for module in (hrnet, resnet):
        monkeypatch.setattr(module, "maybe_remat", by_layer)
    return lambda run: run


def network_name(parity: Parity) -> str:
    return parity.about["arch"].split(":")[1]


def reference(parity: Parity, dtype: str, mode: str) -> Network:
    """The fixture's network, with the nudges for "inference" or "training"."""
    with skip_init():
        model = create(network_name(parity), classes=1000, dtype=dtype, dropout=0.0)
    load_published(model, parity.state_dict())
    network = Network.from_model(model)
    for path, channel, offset in NUDGES.get((parity.name, mode), ()):
        *modules, bias = path.split(".")
        norm = get_path(network.params, tuple(modules))
        norm[bias] = norm[bias].at[channel].add(offset)
    return network


def compares_gradients(parity: Parity, dtype: str, mode: str) -> bool:
    """Whether gradients are compared in this type; skips float64 where float32 has the same bounds."""
    in_float64 = (parity.name, mode) in FLOAT64_GRADIENTS
    if dtype == "float64" and not in_float64:
        pytest.skip("float32 is held to the same bounds")
    return dtype == "float64" or not in_float64


def get_path(tree: Any, path: tuple[str, ...]) -> Any:
    """A leaf of nested dicts; list indices are integers in the dicts."""
    return reduce(lambda node, name: node[name] if name in node else node[int(name)], path, tree)


@cache
def paths(name: str) -> dict[str, tuple[str, ...]]:
    """Our paths of a network's arrays by the published names."""
    with skip_init():
        return {published: path for path, published in published_names(create(name, classes=1000)).items()}


def path_of(parity: Parity, key: str) -> tuple[str, ...]:
    """Our path of an array that the fixture names."""
    return paths(network_name(parity))[parity.about[key]]


def grad_and_aux(function: Callable[[Any], Any], argument: Any, gradients: bool) -> tuple[Any, Any]:
    """The gradient of a function and its auxiliary output; without gradients, the argument in the gradient's place."""
    if gradients:
        return jax.grad(function, has_aux=True)(argument)
    return argument, function(argument)[1]


def test_parameter_counts_are_as_published(parity):
    assert parameter_count(create(network_name(parity), classes=1000)) == parity.about["parameters"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inference_agrees(parity, compiled, dtype):
    gradients = compares_gradients(parity, dtype, "inference")

    def run(network: Network, images: jax.Array) -> Any:
        def class_sum(images):
            model = network.model()
            features = model.features(images)
            logits = model.head(features)
            return logits[:, 3].sum(), (features["final"], logits)

        gradient, (maps, logits) = grad_and_aux(class_sum, images, gradients)
        return maps, logits, gradient

    with jax.enable_x64(dtype == "float64"):
        images = jnp.asarray(parity.images(), dtype)
        run = compiled(run)
        maps, logits, gradient = jax.device_get(run(reference(parity, dtype, "inference"), images))
    assert logits.dtype == dtype
    assert relative_error(logits, parity.results["eval_logits"]) < 1e-4
    assert relative_error(maps, parity.results["eval_features"].transpose(0, 2, 3, 1)) < 1e-4
    if gradients:
        assert relative_error(gradient, parity.results["eval_input_gradient"].transpose(0, 2, 3, 1)) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_agrees(parity, compiled, dtype):
    gradients = compares_gradients(parity, dtype, "training")
    path_by_key = {key: path_of(parity, key) for key in ("first_conv", "classifier", "first_bn", "last_bn")}

    def run(network: Network, images: jax.Array) -> Any:
        def loss(params):
            model = dataclasses.replace(network, params=params).model()
            logits = model(images, train=True)
            return logits[0, 3] - 0.5 * logits[1, 3], (logits, Network.from_model(model).stats)

        gradient, (logits, stats) = grad_and_aux(loss, network.params, gradients)
        first, row = get_path(gradient, path_by_key["first_conv"]), get_path(gradient, path_by_key["classifier"])[:, 3]
        return logits, first, row, get_path(stats, path_by_key["first_bn"]), get_path(stats, path_by_key["last_bn"])

    with jax.enable_x64(dtype == "float64"):
        images = jnp.asarray(parity.images(), dtype)
        run = compiled(run)
        logits, first, row, first_mean, last_mean = jax.device_get(run(reference(parity, dtype, "training"), images))
    assert relative_error(logits, parity.results["train_logits"]) < 1e-3
    if gradients:
        assert relative_error(first, parity.results["train_grad_first_conv"].transpose(2, 3, 1, 0)) < 1e-3
        assert relative_error(row, parity.results["train_grad_classifier_row3"]) < 1e-3
    assert relative_error(first_mean, parity.results["train_first_bn_mean"]) < 1e-3
    assert relative_error(last_mean, parity.results["train_last_bn_mean"]) < 1e-3
