"""Recipes: one file a system; each has `get_config(arg)` and opens with what it is, costs and reaches.

An argument that begins with "phantom" means the same recipe with small networks on the phantom, for a laptop.
"""

from typing import Any


def side(text: Any) -> int:
    """The side of the images in px that an argument says."""
    if not str(text).isdecimal():
        raise ValueError(f"the argument is the side of the images in px, such as 256, not {text}")
    return int(text)


def on_phantom(config: Any, *, size: int = 64) -> Any:
    """The recipe on drawn radiographs (`cxrjax prepare cxr_phantom --size 64`), short enough for two CPU cores."""
    config.title = f"{config.title}: phantom"
    config.data.dataset = "cxr_phantom"
    config.data.stored = str(size)
    config.data.size = size
    config.split.name = "official"
    config.split.share = 1.0
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.init_from = ""
    config.train.batch = 16
    config.train.steps_per_epoch = 0
    config.train.epochs = 3
    config.evaluate.batch = 100
    config.mesh.data = 1
    return config
