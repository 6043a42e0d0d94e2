"""Every network computes what its PyTorch original computes: maps, logits, gradients and running statistics.

In float64, where the bound is tight, and in float32; one function per network and type computes both modes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE
from published_networks import FAMILIES, Results, arithmetic, images, places_of, published, run

from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.planning.model_summary import entry
from cxrjax.weights.published import load_published, published_names


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(name) -> Any:
    yield published(name)
    jax.clear_caches()


def logit_weights() -> np.ndarray:
    """Of the sum whose gradients are compared; values that float32 holds."""
    return np.random.default_rng(2).standard_normal((2, 1000)).astype(np.float32).astype(np.float64)


def test_parameters_and_arithmetic_are_as_much(name, original):
    found = entry(name, classes=1000, size=64)
    assert found.parameters == sum(parameter.numel() for parameter in original.parameters())
    counted = arithmetic(original, size=64)
    if name.startswith("densenet"):  # ours pools before the 1x1 convolutions of its transitions
        counted -= arithmetic(original, size=64, only=r"transition\d\.conv$") * 3 // 4
    assert found.multiply_adds == counted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_results_agree(name, original, dtype, report_errors):
    """Float32 is held to 1e-4, gradients to 1e-3, or to thrice what PyTorch's own rounding costs where that is more.

    Gradients of networks with ReLUs are held to 5e-2: of a million values before a ReLU some are so near 0 that
    rounding decides their sign, and each sign is up to 1 % of an array's gradient. In float64 nothing of that is left,
    for the same weights and images, which float32 holds exactly.
    """
    pixels, weights = images(name).astype(dtype), logit_weights().astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        ours = both_modes(name, original.state_dict(), pixels, weights)
    places = places_of(name, ours[0].features)
    theirs = [run(original, places, pixels, weights, train=train) for train in (False, True)]
    difference = theirs[0].logits[0] - theirs[0].logits[1]
    assert np.linalg.norm(difference) > 0.05 * np.linalg.norm(theirs[0].logits)  # the logits depend on the image

    errors = errors_of(ours, theirs)
    report_errors(dtype, errors)
    if dtype == "float64":
        bounds = dict.fromkeys(errors, 1e-8)
    else:
        exact = [run(original, places, images(name), logit_weights(), train=train) for train in (False, True)]
        own = errors_of(theirs, exact)
        report_errors("PyTorch's float32", own)
        gradients = 5e-2 if FAMILIES[name].kinks else 1e-3
        bounds = {what: max(gradients if "gradients" in what else 1e-4, 3 * own[what]) for what in errors}
    assert {what: error for what, error in errors.items() if not error < bounds[what]} == {}


def both_modes(name: str, state_dict: dict[str, Any], pixels: np.ndarray, weights: np.ndarray) -> list[Results]:
    """What our network computes, in evaluation and in training, with published weights."""
    model = create(name, classes=weights.shape[1], dtype=pixels.dtype, dropout=0.0)
    load_published(model, {key: tensor.numpy() for key, tensor in state_dict.items()})
    names, network = published_names(model), Network.from_model(model)

    def mode(network: Network, pixels: jax.Array, train: bool) -> Any:
        def weighted(params: Any, pixels: jax.Array) -> Any:
            model = dataclasses.replace(network, params=params).model()
            features = model.features(pixels, train=train)
            logits = model.head(features, train=train)
            return jnp.sum(logits * weights), (features, logits, Network.from_model(model).stats)

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(network.params, pixels)

    def modes(network: Network, pixels: jax.Array) -> list[Any]:
        return [mode(network, pixels, train) for train in (False, True)]

    def by_name(tree: Any) -> dict[str, np.ndarray]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {names[tuple(str(key.key) for key in path)]: published_layout(array) for path, array in leaves}

    results = []
    computed = jax.jit(modes, compiler_options=FAST_COMPILE)(network, jnp.asarray(pixels.transpose(0, 2, 3, 1)))
    for (gradients, by_pixels), (features, logits, stats) in jax.device_get(computed):
        maps = {feature: value.transpose(0, 3, 1, 2) for feature, value in features.items()}
        all_gradients = {"input": by_pixels.transpose(0, 3, 1, 2), **by_name(gradients)}
        results.append(Results(maps, logits, all_gradients, by_name(stats)))
    return results


def published_layout(array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW; (in, out) -> (out, in); the rest as it is."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def errors_of(ours: list[Results], theirs: list[Results]) -> dict[str, float]:
    """Relative errors in both modes: of logits and the input's gradient, and the worst of the other kinds' arrays.

    A gradient that is nothing but rounding (of a bias before a norm) is measured by the whole gradient, not by itself.
    """
    errors = {}
    for mode, our, their in zip(("eval", "train"), ours, theirs, strict=True):
        errors[f"{mode} maps"] = worst(our.features, their.features)
        errors[f"{mode} logits"] = relative_error(our.logits, their.logits)
        errors[f"{mode} gradients"] = worst(our.gradients, their.gradients, 1e-4)
    errors["statistics"] = worst(ours[1].statistics, theirs[1].statistics)
    return errors


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], floor: float = 0.0) -> float:
    """The largest relative error of arrays of the same names; norms below `floor` of all arrays' count as that."""
    assert ours.keys() == theirs.keys()
    whole = np.linalg.norm([np.linalg.norm(array) for array in theirs.values()])
    return max((relative_error(ours[name], theirs[name], floor * whole) for name in theirs), default=0.0)


def relative_error(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the reference, or over `floor` where that is larger."""
    assert ours.shape == theirs.shape
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(theirs.astype(np.float64)), floor))
