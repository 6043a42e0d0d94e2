"""Image sizes that a network does not accept are refused before any image is read, with the nearest working ones."""

import pytest

from cxrjax.cli.main import main
from cxrjax.data.records import Records
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network, check_size

SMALL = {
    "densenet_small": {"block_config": (1, 1, 1), "growth_rate": 4},
    "resnet_small": {},
    "efficientnet_small": {},
    "hrnet_small": {},
    "fhrnet_small": {},
    "attention_fusion_small": {},
    "sequential_cnn": {"image_size": 64},
    "simple_cnn": {},
}


def network(name):
    return Network.from_model(create(name, classes=2, **SMALL[name]))


@pytest.mark.parametrize(
    ("name", "size", "advice"),
    [
        ("densenet_small", 8, "data.image_size = 32"),
        ("hrnet_small", 8, "data.image_size = 32"),
        ("hrnet_small", 45, "data.image_size = 32 or 64"),
        ("fhrnet_small", 100, "data.image_size = 96 or 128"),
        ("attention_fusion_small", 8, "data.image_size = 32"),
        ("sequential_cnn", 50, "data.image_size = 64"),
        ("simple_cnn", 16, "data.image_size = 32"),
    ],
)
def test_suggested_sizes_work(name, size, advice):
    model = network(name)
    with pytest.raises(
        CxrError, match=rf"data\.image_size = {size} does not suit the network: choose {advice}\. Its reason"
    ) as error:
        check_size(model, size, batch_size=2)
    assert str(error.value).count("data.image_size") == 2
    for working in advice.removeprefix("data.image_size = ").split(" or "):
        check_size(model, int(working), batch_size=2)


@pytest.mark.parametrize("name", ["resnet_small", "efficientnet_small"])
@pytest.mark.parametrize("size", [8, 30, 31])
def test_some_families_accept_any_size(name, size):
    check_size(network(name), size, batch_size=2)


def test_batch_norm_on_one_value_is_refused():
    with pytest.raises(CxrError, match=r"image_size = 32\. Its reason: batch norm cannot train on one value"):
        check_size(network("resnet_small"), 8, batch_size=1)
    check_size(network("resnet_small"), 8, batch_size=1, backbone_in_training=False)


def test_a_bad_size_is_refused_before_reading_images(tiny_overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Records, "image", lambda *_: pytest.fail("an image was read"))
    arguments = ["train", "--config", "demo:32", "--workdir", str(tmp_path), *(f"--config.{w}" for w in tiny_overrides)]
    arguments = [word for word in arguments if ".options." not in word]
    assert main([*arguments, "--config.model.name=hrnet_small", "--config.data.image_size=20"]) == 1
    assert (
        "config key data.image_size = 20 does not suit the network: choose data.image_size = 32."
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
