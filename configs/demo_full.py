"""The demo at five sizes and with three training seeds.

Paper     none; see `demo`
Command   cxrjax demo --full
Argument  the image size in px
Hardware  two CPU cores, 4 GB; better a GPU
Time      unmeasured
Memory    unmeasured
Score     unmeasured
"""

from cxrjax.config import load_config

SIZES = (32, 64, 128, 256, 512)


def get_config(arg: str = ""):
    """Return the demo's recipe at one size, from images stored at 512 px."""
    config = load_config(f"demo:{arg or SIZES[-1]}")
    config.data.stored_size = "512"
    config.study.sizes = SIZES
    config.study.seeds = (0, 1, 2)
    config.study.control_size = SIZES[-1]
    return config
