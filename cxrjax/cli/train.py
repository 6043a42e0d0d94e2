"""Train a network from a config; rerun the command to resume."""

import argparse
import re
from typing import Any

from cxrjax.cli.arguments import add_config, add_processes, add_workdir, join_processes, use_compilation_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    add_config(parser)
    add_workdir(parser)
    parser.add_argument(
        "--profile", type=_profile_steps, metavar="steps=A:B",
        help="trace steps A to B of the first process into WORKDIR/profile, for TensorBoard or Perfetto",
    )  # fmt: skip
    add_processes(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train; returns the progress in the first process and None in the others."""
    from cxrjax.config import load_config
    from cxrjax.console import print_text
    from cxrjax.distributed.runtime import is_main_process
    from cxrjax.train.stages import train_stages

    config = load_config(arguments.config, arguments.overrides)
    join_processes(arguments, stops_together=True)
    use_compilation_cache(arguments.workdir)
    progress = train_stages(config, arguments.workdir, profile=arguments.profile)
    details = [f"trained {progress.step} steps"]
    if progress.stopped_early:
        details.append("stopped early")
    if progress.best is not None:
        details.append(f"best {config.train.monitor} {abs(progress.best):.4f} at step {progress.best_step}")
    if progress.data_wait_fraction is not None:
        details.append(f"{progress.data_wait_fraction:.1%} of the time waiting for data")
    print_text(f"{', '.join(details)}: {arguments.workdir}")
    result = {"directory": str(arguments.workdir), **vars(progress), "data_wait_fraction": progress.data_wait_fraction}
    return result if is_main_process() else None


def _profile_steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"steps=([0-9]+):([0-9]+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not steps=A:B with two numbers, such as steps=10:15")
    first, last = map(int, match.groups())
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r}: steps count from 1, and A must not be above B")
    return first, last
