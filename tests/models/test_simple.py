import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network, parameter_count


def test_it_has_as_many_parameters_as_published():
    assert parameter_count(create("simple_cnn", classes=14)) == 129_870


def test_its_maps_have_the_sizes_of_valid_convolutions():
    network = Network.from_model(create("simple_cnn", classes=14))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    assert {name: maps.shape for name, maps in features.items()} == {
        "stage1": (2, 111, 111, 32), "stage2": (2, 54, 54, 64), "final": (2, 26, 26, 128),
    }  # fmt: skip


def test_pooling_and_relu_may_change_places():
    model = create("simple_cnn", classes=2, seed=3)
    images = jnp.asarray(np.random.default_rng(0).random((1, 24, 22, 3)), jnp.float32)
    swapped = jax.nn.relu(model.stage1.conv(images)).reshape(1, 11, 2, 10, 2, 32).max((2, 4))
    np.testing.assert_array_equal(model.features(images)["stage1"], swapped)


def test_too_small_images_are_refused():
    network = Network.from_model(create("simple_cnn", classes=2))
    for size in (8, 18):
        with pytest.raises(CxrError, match="too small"):
            jax.eval_shape(lambda n, i: n.apply(i)[0], network, jax.ShapeDtypeStruct((1, size, size, 1), jnp.uint8))
