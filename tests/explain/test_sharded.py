"""Explanations of row-sharded images match those of one device, and no device gathers whole maps."""

import jax
import numpy as np
import pytest

from cxrjax.distributed.mesh import make_mesh
from cxrjax.explain import erf, saliency
from cxrjax.explain.inputs import put_images, use_mesh
from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.planning.compiled_memory import parse_collectives


@pytest.fixture(scope="module")
def network():
    with jax.enable_x64(True):
        options = {"block_config": (1, 1), "growth_rate": 4, "stem_channels": 4, "pooling": "average"}
        return Network.from_model(create("densenet_small", classes=2, seed=1, dtype="float64", **options))


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_sharded_maps_match_one_device(network, shape):
    mesh = make_mesh(*shape)
    with jax.enable_x64(True):
        for method in ("gradcam", "integrated"):
            one, shared = (
                saliency.saliency(network, IMAGES, [1, 0], method=method, steps=2, signed=True, mesh=m)
                for m in (None, mesh)
            )
            np.testing.assert_allclose(shared, one, rtol=1e-6, atol=1e-6 * np.abs(one).max())  # they are float32
        one, shared = (saliency.logits(network, IMAGES, mesh=m) for m in (None, mesh))
        np.testing.assert_allclose(shared, one, rtol=1e-10)
        one, shared = (erf.measure(network, IMAGES, probes=3, parallel=2, mesh=m).map for m in (None, mesh))
    np.testing.assert_allclose(shared, one, rtol=1e-10, atol=1e-10 * one.max())


def sent(function, mesh, *arguments, **static):
    """What the devices send each other in a compiled explanation."""
    with use_mesh(mesh):
        compiled = function.lower(*arguments, **static).compile()
    return parse_collectives(compiled.as_text() or "")


def test_no_device_sees_whole_maps(network):
    mesh = make_mesh(1, 4)
    images = put_images(mesh, np.zeros((1, 64, 32, 1), np.uint8))
    assert {shard.data.shape for shard in images.addressable_shards} == {(1, 16, 32, 1)}
    with jax.enable_x64(True):
        calls = sent(saliency._activation, mesh, network, images, np.array([0]), layer="final", method="gradcam")
        numbers = np.zeros(1, np.int32)
        calls += sent(
            erf._squared_gradients, mesh, network, images, numbers, numbers, jax.random.key(0),
            layer="final", estimator="probe",
        )  # fmt: skip
    kinds = {call.kind for call in calls}
    assert "collective-permute" in kinds  # the rows that neighbours need
    assert kinds <= {"all-reduce", "collective-permute"}, calls
    stem = 8 * 32 * 16 * 4  # bytes of the stem's maps
    assert max(call.bytes for call in calls) < stem / 4
