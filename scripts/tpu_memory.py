"""Print memory and communication of training steps on a TPU, in about a minute each.

uv sync --extra tpu
uv run python scripts/tpu_memory.py --networks densenet121 hrnet_w32 --sizes 512 2048 --meshes data=1 data=1,space=4

`cxrjax plan` takes up to ten times as long, since it also generates code; it adds memory traffic and the size of the
program. This script runs `cxrjax plan` as a child process and stops it once XLA has assigned the buffers: libtpu logs
the assignment to standard error and dumps the program to a folder. The log format is that of libtpu 0.0.42.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from plan_tables import peak_table, setting, table

from cxrjax.distributed.mesh import parse_mesh
from cxrjax.planning.compiled_memory import COLLECTIVES, Collective, parse_collectives

LOGGING = {
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_VMODULE": "buffer_assignment=1",
    "XDG_CACHE_HOME": os.devnull,  # neither read nor write cached plans
}
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def assigned_bytes(lines: Iterable[str]) -> int:
    """Return the bytes of arguments and temporaries in TPU memory from libtpu's log.

    Raises:
      ValueError: the log ends before the assignment; the message has its last lines.
    """
    arguments, temporary, color, last = 0.0, 0, -1, deque[str](maxlen=5)
    for line in lines:
        last.append(line)
        if match := re.search(r"ombined temp allocation for color (\d+) is: allocation \d+: size (\d+)", line):
            color, size = int(match[1]), int(match[2])
            temporary += size * (color == 0)  # other colors are on-chip memories
        elif match := re.search(r"absorbing temp allocation: allocation \d+: size (\d+)", line):
            temporary += int(match[1]) * (color == 0)
        elif match := re.search(r"parameter allocation: +([\d.]+)([KMG]?i?B)", line):
            arguments = float(match[1]) * UNITS[match[2]]
        elif "Buffer assignment done" in line and color >= 0:
            return round(arguments) + temporary
    raise ValueError("".join(last))


def plan(arguments: list[str]) -> tuple[int, list[Collective]]:
    """Return the peak bytes of `cxrjax plan ARGUMENTS`, without the program, and the collectives of a step."""
    with TemporaryDirectory() as folder:
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=^jit_step$"
        flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dump}"}
        with subprocess.Popen(
            [sys.executable, "-m", "cxrjax.cli.main", "plan", *arguments],
            env=os.environ | LOGGING | flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace",
        ) as child:  # fmt: skip
            assert child.stderr is not None
            try:
                peak = assigned_bytes(child.stderr)
                [program] = Path(folder).glob("*.jit_step.*.after_optimizations_before_buffer_assignment.txt")
                return peak, parse_collectives(program.read_text())
            finally:
                child.kill()


def traffic_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the collectives of a step and the bytes that a device sends, in Markdown."""
    return table([
        setting(row)
        | {"data x space": f"{row['data']} x {row['space']}"}
        | {kind: sum(collective.kind == kind for collective in row["collectives"]) for kind in COLLECTIVES}
        | {"GB sent": f"{sum(collective.bytes_sent for collective in row['collectives']) / 1e9:.3f}"}
        for row in rows
    ])  # fmt: skip


def main() -> None:
    """Print the memory of a device at the peak, and the communication of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["densenet121"], metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048], metavar="PX")
    parser.add_argument("--meshes", nargs="+", default=["data=1"], metavar="data=D,space=S")
    parser.add_argument("--device", default="v5e")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images per data device (default: 1)")
    parser.add_argument("--remat", default="layer")
    parser.add_argument("--jobs", type=int, default=1, help="plans made in parallel (default: 1)")
    options = parser.parse_args()

    def row(case: tuple[str, int, str]) -> dict[str, Any]:
        network, size, mesh = case
        data, space = parse_mesh(mesh)
        arguments = ["--config=resolution:2048", f"--config.model.name={network}", f"--config.data.image_size={size}",
                 f"--config.model.remat={options.remat}", f"--device={options.device}", f"--mesh={mesh}",
                 f"--batch-size={options.images * data}"]  # fmt: skip
        peak, collectives = plan(arguments)
        print(network, size, mesh, f"{peak / 1e9:.3f} GB", file=sys.stderr)
        return {"accelerator": options.device, "network": network, "size": size, "remat": options.remat, "data": data,
                "space": space, "compiled": True, "peak": peak, "collectives": collectives}  # fmt: skip

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(row, product(options.networks, options.sizes, options.meshes)))
    print("\n".join([*peak_table(rows), "", *traffic_table(rows)]))


if __name__ == "__main__":
    main()
