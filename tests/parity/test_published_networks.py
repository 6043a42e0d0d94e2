"""Maps, logits, gradients and running statistics of all networks against their PyTorch originals.

In float64, where the bound is tight, and in float32; one compiled function per network and type computes both modes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from load_published import load_published
from published_networks import FAMILIES, Results, count_multiply_adds, find_modules, images, published, run

from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.planning.model_summary import summarize_model
from cxrjax.weights.published import published_names


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(name) -> Any:
    yield published(name)
    jax.clear_caches()


def logit_weights() -> np.ndarray:
    """Weights of the sum whose gradients are compared; float32 represents them exactly."""
    return np.random.default_rng(2).standard_normal((2, 1000)).astype(np.float32).astype(np.float64)


def test_parameters_and_multiply_adds_agree(name, original):
    summary = summarize_model(name, classes=1000, size=64)
    assert summary.parameters == sum(parameter.numel() for parameter in original.parameters())
    expected = count_multiply_adds(original, size=64)
    if name.startswith("densenet"):  # ours pools before the 1x1 convolutions of its transitions
        expected -= count_multiply_adds(original, size=64, pattern=r"transition\d\.conv$") * 3 // 4
    assert summary.multiply_adds == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_results_agree(name, original, dtype, report_errors):
    """The bound in float32 is 1e-4, for gradients 1e-3, or three times the error of PyTorch's own float32 if larger.

    Gradients of networks with ReLUs have the bound 5e-2: of a million values before a ReLU some are so near 0 that
    rounding decides their sign, and each sign is up to 1 % of an array's gradient. Float64 is free of this, with the
    same weights and images, which float32 represents exactly.
    """
    pixels, weights = images(name).astype(dtype), logit_weights().astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        ours = both_modes(name, original.state_dict(), pixels, weights)
    modules = find_modules(name, ours[0].features)
    theirs = [run(original, modules, pixels, weights, train=train) for train in (False, True)]
    difference = theirs[0].logits[0] - theirs[0].logits[1]
    assert np.linalg.norm(difference) > 0.05 * np.linalg.norm(theirs[0].logits)  # the logits depend on the image

    errors = errors_of(ours, theirs)
    report_errors(dtype, errors)
    if dtype == "float64":
        bounds = dict.fromkeys(errors, 1e-8)
    else:
        exact = [run(original, modules, images(name), logit_weights(), train=train) for train in (False, True)]
        torch_errors = errors_of(theirs, exact)
        report_errors("PyTorch's float32", torch_errors)
        gradients = 5e-2 if FAMILIES[name].kinks else 1e-3
        bounds = {kind: max(gradients if "gradients" in kind else 1e-4, 3 * torch_errors[kind]) for kind in errors}
    assert {kind: error for kind, error in errors.items() if not error < bounds[kind]} == {}


def both_modes(name: str, state_dict: dict[str, Any], pixels: np.ndarray, weights: np.ndarray) -> list[Results]:
    """Results of our network with the published weights, in inference and in training."""
    model = create(name, classes=weights.shape[1], dtype=pixels.dtype, dropout=0.0)
    load_published(model, {key: tensor.numpy() for key, tensor in state_dict.items()})
    names, network = published_names(model), Network.from_model(model)

    def run_mode(network: Network, pixels: jax.Array, train: bool) -> Any:
        def weighted(params: Any, pixels: jax.Array) -> Any:
            model = dataclasses.replace(network, params=params).model()
            features = model.features(pixels, train=train)
            logits = model.head(features, train=train)
            return jnp.sum(logits * weights), (features, logits, Network.from_model(model).stats)

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(network.params, pixels)

    def run_modes(network: Network, pixels: jax.Array) -> list[Any]:
        return [run_mode(network, pixels, train) for train in (False, True)]

    def by_name(tree: Any) -> dict[str, np.ndarray]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {names[tuple(str(key.key) for key in path)]: published_layout(array) for path, array in leaves}

    results = []
    computed = jax.jit(run_modes, compiler_options=FAST_COMPILE)(network, jnp.asarray(pixels.transpose(0, 2, 3, 1)))
    for (gradients, input_gradient), (features, logits, stats) in jax.device_get(computed):
        maps = {feature: value.transpose(0, 3, 1, 2) for feature, value in features.items()}
        all_gradients = {"input": input_gradient.transpose(0, 3, 1, 2), **by_name(gradients)}
        results.append(Results(maps, logits, all_gradients, by_name(stats)))
    return results


def published_layout(array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW; (in, out) -> (out, in); vectors stay."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def errors_of(ours: list[Results], theirs: list[Results]) -> dict[str, float]:
    """Relative errors in both modes: of the logits, and the largest of the arrays of each other kind.

    The error of a gradient that is only rounding (of a bias before a norm) is relative to the whole gradient's norm.
    """
    errors = {}
    for mode, our, their in zip(("eval", "train"), ours, theirs, strict=True):
        errors[f"{mode} maps"] = largest_error(our.features, their.features)
        errors[f"{mode} logits"] = relative_error(our.logits, their.logits)
        errors[f"{mode} gradients"] = largest_error(our.gradients, their.gradients, 1e-4)
    errors["statistics"] = largest_error(ours[1].statistics, theirs[1].statistics)
    return errors


def largest_error(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], floor: float = 0.0) -> float:
    """The largest relative error of arrays of the same names; norms are at least `floor` times that of all arrays."""
    assert ours.keys() == theirs.keys()
    total = np.linalg.norm([np.linalg.norm(array) for array in theirs.values()])
    return max((relative_error(ours[name], theirs[name], floor * total) for name in theirs), default=0.0)


def relative_error(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the reference, or over `floor` if that is larger."""
    assert ours.shape == theirs.shape
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(theirs.astype(np.float64)), floor))
