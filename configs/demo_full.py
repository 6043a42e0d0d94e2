"""The demo at five sizes and with three training seeds.

Paper     none; see `demo`
Command   cxrjax demo --full
Argument  the side of the images in px
Hardware  two CPU cores, 4 GB; better a GPU
Time      unmeasured
Memory    unmeasured
Score     unmeasured
"""

from cxrjax.config import load

SIZES = (32, 64, 128, 256, 512)


def get_config(arg: str = ""):
    """The demo's recipe at one size, from images of 512 px."""
    config = load(f"demo:{arg or SIZES[-1]}")
    config.data.stored = "512"
    config.study.sizes = SIZES
    config.study.seeds = (0, 1, 2)
    config.study.control_size = SIZES[-1]
    return config
