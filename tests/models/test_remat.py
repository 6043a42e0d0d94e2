"""Rematerialisation changes memory only: every family, every level."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import FAST_COMPILE

from cxrjax.models import create
from cxrjax.models.layers import REMATS
from cxrjax.models.network import Network

# Round every bfloat16 value, stored or not, and do not fuse sums, which would change their order.
ROUNDED = {"xla_allow_excess_precision": False, "xla_disable_hlo_passes": "fusion"}
CASES = {
    "densenet": ("densenet_small", {"growth_rate": 4, "block_config": (2, 1), "stem_channels": 4, "stem_pool": "3x3"}),
    "simple": ("simple_cnn", {}),
    "sequential": (
        "sequential_cnn", {"image_size": 32, "dropout": 0.3, "norm": True, "widths": (4, 6), "units": (8, 5)}
    ),
    "resnet": ("resnet_small", {"layers": (1, 2), "width": 4, "stem_pool": "3x3"}),
    "bottlenecks": ("resnet_small", {"layers": (2, 1), "width": 4, "block": "bottleneck"}),
    "hrnet": ("hrnet_small", {"width": 2, "num_modules": (1, 1), "stem_channels": 4}),
    "efficientnet": (
        "efficientnet_small",
        {"stem_channels": 8, "block_config": ((1, 3, 1, 8, 2), (2, 5, 2, 8, 2)), "stochastic_depth": 0.8},
    ),
    "attention_fusion": ("attention_fusion_small", {}),
    "fhrnet": ("fhrnet_small", {"stage": "joint"}),
}  # fmt: skip


def make_step(case: str, remat: str, dtype: str, **compiler):
    """The jitted gradient of a loss, and the network."""
    name, options = CASES[case]
    network = Network.from_model(create(name, classes=3, dtype=dtype, remat=remat, seed=1, **options))
    images = jnp.asarray(np.random.default_rng(5).integers(0, 256, (3, 32, 32, 1), np.uint8))

    def loss(params):
        key = jax.random.key(0)
        outputs, stats = dataclasses.replace(network, params=params).outputs(images, train=True, key=key)
        return sum(jnp.square(logits).sum() for logits in outputs.values()), (outputs, stats)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE | compiler), network


@pytest.mark.usefixtures("shallow_branches")
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_statistics_are_the_same(case):
    """For all levels with DenseNet; for the other families "full", which includes the others."""
    with jax.enable_x64(True):
        results, regions = {}, {}
        for remat in REMATS if case == "densenet" else ("none", "full"):
            step, network = make_step(case, remat, "float64")
            regions[remat] = str(step.trace(network.params).jaxpr).count("prevent_cse")
            results[remat] = jax.device_get(step(network.params))
        stored = results.pop("none")
        assert stored[0][0].dtype == np.float64
        before, after = jax.tree.leaves(network.stats), jax.tree.leaves(stored[0][1][1])
        assert not any(map(np.array_equal, before, after))  # those of every layer are updated
        for remat in results:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), stored, results[remat])
    assert list(regions.values()) == sorted(set(regions.values()))  # otherwise nothing is compared


def test_bfloat16_results_are_bitwise_equal():
    results = []
    for remat in REMATS:
        step, network = make_step("densenet", remat, "bfloat16", **ROUNDED)
        results.append(jax.device_get(step(network.params)))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], result)


@pytest.mark.parametrize(
    ("remat", "stored"),
    [("layer", [(128, 1), (32, 8), (32, 4), (32, 4), (32, 4), (16, 10), (16, 4), (16, 4), (16, 4)]),
     ("block", [(128, 1), (32, 8), (16, 10)]),
     ("full", [(128, 1)])],
)  # fmt: skip
def test_stored_maps(remat, stored):
    """Images, then maps (side, channels) that the forward pass stores for the backward pass; the head needs none."""
    options = {"growth_rate": 4, "block_config": (3, 3), "stem_channels": 8}
    network = Network.from_model(create("densenet_small", classes=2, remat=remat, **options))

    def backward(network, images):
        def logits(params):
            return dataclasses.replace(network, params=params).apply(images, train=True)[0]

        return jax.vjp(logits, network.params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, network, jax.ShapeDtypeStruct((2, 128, 128, 1), jnp.uint8)))
    assert [leaf.shape[2:] for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] == 2] == stored
