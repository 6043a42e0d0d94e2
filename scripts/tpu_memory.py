"""What training steps hold and send on a TPU, each in about a minute: XLA is stopped once it has assigned the buffers.

uv sync --extra tpu
uv run python scripts/tpu_memory.py --networks densenet121 hrnet_w32 --sizes 512 2048 --meshes data=1 data=1,space=4

`cxrjax plan` takes up to ten times as long for a TPU, for the code, and knows more: bytes moved and the program's own
size. Here the child that plans is watched: libtpu, asked to, writes what it assigned on standard error, and the program
that it assigned it for into a folder. How it does so is its own affair, and as expected here in version 0.0.42.
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

from plan_tables import about, peaks, table

from cxrjax.distributed.mesh import parse_mesh
from cxrjax.planning.compiled_memory import KINDS, Collective, parse_collectives

LOGGING = {
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_VMODULE": "buffer_assignment=1",
    "XDG_CACHE_HOME": os.devnull,  # what was planned before is not written again
}
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def assigned(lines: Iterable[str]) -> int:
    """Bytes of a TPU's memory, arguments and all else, from what libtpu logs.

    Raises:
      ValueError: it ended before, with the last lines.
    """
    arguments, temporary, color, last = 0.0, 0, -1, deque[str](maxlen=5)
    for line in lines:
        last.append(line)
        if found := re.search(r"ombined temp allocation for color (\d+) is: allocation \d+: size (\d+)", line):
            color, size = int(found[1]), int(found[2])
            temporary += size * (color == 0)  # the others are memories on the chip
        elif found := re.search(r"absorbing temp allocation: allocation \d+: size (\d+)", line):
            temporary += int(found[1]) * (color == 0)
        elif found := re.search(r"parameter allocation: +([\d.]+)([KMG]?i?B)", line):
            arguments = float(found[1]) * UNITS[found[2]]
        elif "Buffer assignment done" in line and color >= 0:
            return round(arguments) + temporary
    raise ValueError("".join(last))


def planned(words: list[str]) -> tuple[int, list[Collective]]:
    """The bytes that `cxrjax plan` with these words would come to, without the program, and what a step sends."""
    with TemporaryDirectory() as folder:
        dumped = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=^jit_step$"
        flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dumped}"}
        with subprocess.Popen(
            [sys.executable, "-m", "cxrjax.cli.main", "plan", *words],
            env=os.environ | LOGGING | flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace",
        ) as child:  # fmt: skip
            assert child.stderr is not None
            try:
                held = assigned(child.stderr)
                [program] = Path(folder).glob("*.jit_step.*.after_optimizations_before_buffer_assignment.txt")
                return held, parse_collectives(program.read_text())
            finally:
                child.kill()


def sent(rows: list[dict[str, Any]]) -> list[str]:
    """What a device sends in a step, in Markdown."""
    return table([
        about(row)
        | {"data x space": f"{row['data']} x {row['space']}"}
        | {kind: sum(call.kind == kind for call in row["calls"]) for kind in KINDS}
        | {"GB sent": f"{sum(call.sent for call in row['calls']) / 1e9:.3f}"}
        for row in rows
    ])  # fmt: skip


def main() -> None:
    """Prints two tables: what a device holds at the peak, and what it sends in a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["densenet121"], metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048], metavar="PX")
    parser.add_argument("--meshes", nargs="+", default=["data=1"], metavar="data=D,space=S")
    parser.add_argument("--device", default="v5e")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="for each part of data (default 1)")
    parser.add_argument("--remat", default="layer")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    options = parser.parse_args()

    def row(case: tuple[str, int, str]) -> dict[str, Any]:
        network, size, mesh = case
        data, space = parse_mesh(mesh)
        words = ["--config=resolution:2048", f"--config.model.name={network}", f"--config.data.size={size}",
                 f"--config.model.remat={options.remat}", f"--device={options.device}", f"--mesh={mesh}",
                 f"--batch={options.images * data}"]  # fmt: skip
        held, calls = planned(words)
        print(network, size, mesh, f"{held / 1e9:.3f} GB", file=sys.stderr)
        return {"target": options.device, "network": network, "size": size, "remat": options.remat, "data": data,
                "space": space, "compiled": True, "peak": held, "calls": calls}  # fmt: skip

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(row, product(options.networks, options.sizes, options.meshes)))
    print("\n".join([*peaks(rows), "", *sent(rows)]))


if __name__ == "__main__":
    main()
