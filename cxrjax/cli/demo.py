"""Run the full pipeline on built-in synthetic data, from rendering to the report."""

import argparse
import time
from pathlib import Path
from typing import Any

from cxrjax.cli.arguments import use_compilation_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.add_argument("--workdir", type=Path, help="output directory (default: runs/demo or runs/demo-full)")
    parser.add_argument("--full", action="store_true", help="also train at 256 and 512 px, with several seeds")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo."""
    recipe = "demo_full" if arguments.full else "demo"
    directory = arguments.workdir or Path("runs") / recipe.replace("_", "-")
    use_compilation_cache(directory)
    return run_demo(directory, recipe=recipe)


def run_demo(directory: Path, *, recipe: str = "demo", patients: int | None = None) -> dict[str, Any]:
    """Prepare phantom radiographs and run the resolution study on them.

    Args:
      directory: gets `data/` and the output of the study.
      recipe: `demo`, or `demo_full`, which adds 256 and 512 px and several seeds.
      patients: number of patients to draw; default: that of the data set.

    Returns:
      The result of the study and the `seconds` that everything took.
    """
    from cxrjax.config import load_config
    from cxrjax.console import print_text
    from cxrjax.studies.resolution import run_resolution_study
    from tfds_builders.prepare import prepare

    start = time.perf_counter()
    config = load_config(recipe)
    data = directory / "data"
    options: dict[str, Any] = {} if patients is None else {"patients": patients}
    prepare(config.data.dataset, data_dir=data, size=int(config.data.stored_size), **options)
    result = run_resolution_study(recipe, [f"data.data_dir={data}"], directory) or {}
    seconds = time.perf_counter() - start
    print_text(f"the demo took {seconds / 60:.1f} minutes")
    return result | {"seconds": round(seconds, 1)}
