import jax
import jax.numpy as jnp

from cxrjax.models import create
from cxrjax.models.network import Network, parameter_count


def test_parameter_counts():
    assert parameter_count(create("hrnet_w48", classes=1000)) == 77_469_864  # timm's


def test_maps_of_each_branch():
    network = Network.of(create("hrnet_small", classes=3))
    images = jax.ShapeDtypeStruct((2, 93, 64, 1), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    assert {name: maps.shape[1:] for name, maps in features.items()} == {
        "stem": (24, 16, 8), "layer1": (24, 16, 32),
        "stage2_branch1": (24, 16, 8), "stage2_branch2": (12, 8, 16),
        "stage3_branch1": (24, 16, 8), "stage3_branch2": (12, 8, 16), "stage3_branch3": (6, 4, 32),
        "stage4_branch1": (24, 16, 8), "stage4_branch2": (12, 8, 16), "stage4_branch3": (6, 4, 32),
        "stage4_branch4": (3, 2, 64), "final": (3, 2, 256),
    }  # fmt: skip
    assert list(features)[-2:] == ["stage4_branch4", "final"]
