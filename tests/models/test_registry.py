import jax
import numpy as np
import pytest

from cxrjax.errors import CxrError
from cxrjax.models import abstract, create
from cxrjax.models.layers import skip_init
from cxrjax.models.network import Network, parameter_count


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("densenet12", {}, "unknown network 'densenet12': did you mean 'densenet121'"),
        ("densenet_small", {"grwth": 8}, "unknown option of densenet_small 'grwth': did you mean 'growth_rate'"),
        ("simple_cnn", {"growth_rate": 8}, "unknown option of simple_cnn 'growth_rate'"),
        ("densenet_small", {"pooling": "avg"}, "unknown pooling 'avg': did you mean 'average'"),
        ("densenet_small", {"stem_pool": "3"}, "unknown stem_pool '3'"),
        ("densenet_small", {"dtype": "float16"}, "unknown dtype 'float16': did you mean 'bfloat16'"),
        ("densenet_small", {"dtype": int}, "unknown dtype 'int"),
        ("densenet_small", {"dtype": "float64"}, "JAX_ENABLE_X64"),
        ("densenet_small", {"remat": "layers"}, "unknown remat 'layers': did you mean 'layer'"),
        ("densenet_small", {"classes": 0}, "classes must be a whole number above 0"),
        ("densenet_small", {"growth_rate": 2.5}, "growth_rate must be"),
        ("densenet_small", {"growth_rate": True}, "growth_rate must be"),
        ("densenet_small", {"block_config": (2, 0)}, "layers of a block must be"),
        ("densenet_small", {"block_config": ()}, "at least one block"),
        ("densenet_small", {"block_config": 2}, "block_config must be a sequence"),
        ("densenet_small", {"stem_kernel": 4}, "odd stem_kernel"),
        ("densenet_small", {"dropout": 1.0}, "dropout must be"),
        ("simple_cnn", {"hidden": -1}, "hidden must be"),
        ("simple_cnn", {"seed": -1}, "seed must be"),
        (
            "attention_fusion_small",
            {"dense": {"grwth": 8}},
            "unknown option of dense 'grwth': did you mean 'growth_rate'",
        ),
        ("attention_fusion_small", {"efficient": 8}, "efficient must hold options of that trunk"),
    ],
)
def test_errors_are_named(name, options, message):
    with pytest.raises(CxrError, match=message):
        create(name, **{"classes": 3, **options})


@pytest.mark.parametrize(
    ("name", "options"),  # widths that no other test uses: what is compiled already is not compiled again
    [
        ("densenet_small", {"growth_rate": 13, "stem_channels": 11}),
        ("resnet_small", {"width": 11, "block": "bottleneck"}),
        ("hrnet_small", {"width": 7, "stem_channels": 9, "num_modules": (1, 1)}),
        ("efficientnet_small", {"stem_channels": 11, "block_config": ((4, 3, 2, 13, 1),)}),
        ("attention_fusion_small", {"channels": 13, "attention": "cross"}),
        ("sequential_cnn", {"image_size": 32, "norm": True, "widths": (5, 7), "units": (11, 13)}),
    ],
)
def test_building_a_network_compiles_nothing(name, options):
    compiled = []

    def record(event: str, _seconds: float, **_about: object) -> None:
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        create(name, classes=17, **options)
        with skip_init():
            create(name, classes=17, **options)
        built, compiled = compiled, []
        jax.jit(lambda x: x + 1)(np.float32(1))
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert "/jax/core/compile/backend_compile_duration" in compiled  # it would be recorded
    assert built == []


def test_dtype_is_a_name_or_a_type():
    by_name, by_type = (create("simple_cnn", classes=2, dtype=dtype) for dtype in ("float32", np.float32))
    assert by_name.dtype == by_type.dtype == np.dtype("float32")


def test_the_small_densenet_has_the_parameters_of_its_options():
    """Counted by hand: growth rate 8, bn_size 2, blocks (2, 2, 2), 5x5 stem of 16 channels, both poolings."""
    stem = 5 * 5 * 16 + 2 * 16
    layer = lambda channels: 2 * channels + channels * 16 + 2 * 16 + 3 * 3 * 16 * 8  # noqa: E731
    block = layer(16) + layer(24)
    transition = 2 * 32 + 32 * 16
    head = 2 * 32 + (2 * 32 * 7 + 7)
    assert parameter_count(create("densenet_small", classes=7)) == stem + 3 * block + 2 * transition + head


def test_a_dict_option_updates_single_entries():
    wider, same = (
        create("attention_fusion_small", classes=2, dense={"growth_rate": growth_rate}, efficient={})
        for growth_rate in (8, 4)
    )
    assert same.dense.channels == create("attention_fusion_small", classes=2).dense.channels
    assert wider.dense.channels > same.dense.channels
    assert (
        wider.dense.channels
        == create(
            "densenet_small", classes=1, growth_rate=8, block_config=(1, 1, 1), bn_size=2, stem_channels=8
        ).channels
    )
    small = {"growth_rate": 4, "block_config": (1, 1), "stem_channels": 4}
    assert create("attention_fusion", classes=2, dense=small).dense.norm5 is None


def test_an_abstract_network_has_the_shapes_of_the_real_one():
    shapes = abstract("densenet_small", classes=3, dtype="bfloat16", growth_rate=4)
    network = Network.from_model(create("densenet_small", classes=3, dtype="bfloat16", growth_rate=4))
    assert shapes.definition == network.definition
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), network
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert parameter_count(shapes) == parameter_count(network)
    assert np.any(network.params["conv0"]["kernel"])  # later networks have initial values again
