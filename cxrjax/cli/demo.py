"""The main job on the embedded data: prepare, train at several sizes, evaluate, explain, report."""

import time
from pathlib import Path
from typing import Any

from cxrjax.config import load
from cxrjax.console import print_text
from cxrjax.studies.resolution.study import resolution
from tfds_builders.prepare import prepare


def demo(directory: Path, *, recipe: str = "demo", patients: int | None = None) -> dict[str, Any]:
    """Make phantom radiographs and run the resolution study on them.

    Args:
      directory: gets `data/` and what `resolution` writes.
      recipe: `demo`, or `demo_full`: also 256 and 512 px, and several seeds.
      patients: how many are drawn; default the data set's own number.

    Returns:
      What `resolution` returns, with the seconds it all took.
    """
    started = time.perf_counter()
    config = load(recipe)
    data = directory / "data"
    options: dict[str, Any] = {} if patients is None else {"patients": patients}
    prepare(config.data.dataset, data_dir=data, size=int(config.data.stored), **options)
    result = resolution(recipe, [f"data.dir={data}"], directory) or {}  # it is alone, and so the first
    seconds = time.perf_counter() - started
    print_text(f"the whole demo took {seconds / 60:.1f} minutes")
    return result | {"seconds": round(seconds, 1)}
