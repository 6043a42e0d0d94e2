"""The main job on the embedded data: prepare, train at several sizes, evaluate, explain, report."""

import time
from pathlib import Path
from typing import Any

from cxrjax.config import load
from cxrjax.console import stdout
from cxrjax.data.prepare import prepare
from cxrjax.studies.resolution import resolution


def demo(directory: Path, *, full: bool = False) -> dict[str, Any]:
    """Make phantom radiographs and run the resolution study on them.

    Args:
      directory: gets `data/` and what `resolution` writes.
      full: the recipe `demo_full`: also 256 and 512 px, and several seeds.

    Returns:
      What `resolution` returns, with the seconds it all took.
    """
    started = time.perf_counter()
    recipe = "demo_full" if full else "demo"
    config = load(recipe)
    data = directory / "data"
    prepare(config.data.dataset, data_dir=data, size=int(config.data.stored))
    result = resolution(recipe, [f"data.dir={data}"], directory)
    seconds = time.perf_counter() - started
    stdout.print(f"the whole demo took {seconds / 60:.1f} minutes")
    return result | {"seconds": round(seconds, 1)}
