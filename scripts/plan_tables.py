"""Tables and a figure of what `cxrjax plan --json FILE` wrote: those of docs/memory.md and docs/scaling.md.

uv run cxrjax plan --config resolution:2048 --device h200 --sweep --remats none layer block full --meshes data=1 --json a.json
uv run python scripts/plan_tables.py a.json ... [--figure memory.svg]

Bytes an image: all that a step on one device holds beside parameters, statistics and optimiser (and the program, on a
TPU), by its images; the gradients are among them.
"""  # noqa: E501 - one command

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cxrjax.report import style

Plans = list[dict[str, Any]]


def beside_state(plan: dict[str, Any]) -> float:
    """GB that a device holds at the peak beside parameters, statistics, optimiser and a TPU's program."""
    return (plan["peak"] - plan["parameters"] - plan["optimizer"] - plan["program"]) / 1e9


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of equal keys in Markdown; nothing of none."""
    if not rows:
        return []
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def alone(plan: dict[str, Any]) -> bool:
    """Whether it is of one device."""
    return plan["data"] * plan["space"] == 1


def about(plan: dict[str, Any]) -> dict[str, Any]:
    """What every table begins with."""
    return {"device": plan["target"], "network": plan["network"], "px": plan["size"]}


def by(plan: dict[str, Any]) -> str:
    """Who says so."""
    return "XLA" if plan["compiled"] else "estimate"


def of_each_once(plans: Plans) -> Plans:
    """What was compiled stands for what was estimated as well."""
    keys = ("target", "network", "size", "remat", "data", "space", "batch")
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for plan in plans:
        key = tuple(plan[name] for name in keys)
        if key not in kept or plan["compiled"]:
            kept[key] = plan
    return list(kept.values())


def memory(plans: Plans) -> list[str]:
    """One device: every network, size and way of recomputing."""
    return table([
        about(each)
        | {
            "remat": each["remat"],
            "images": each["batch"],
            "GB at the peak": f"{each['peak'] / 1e9:.2f}",
            "GB an image": f"{beside_state(each) / each['batch']:.3f}",
            "TFLOP an image": f"{each['flops'] / each['batch'] / 1e12:.2f}",
            "GB moved an image": f"{each['moved'] / each['batch'] / 1e9:.0f}" if each["compiled"] else "",
            "by": by(each),
        }
        for each in plans
        if alone(each)
    ])  # fmt: skip


def meshes(plans: Plans) -> list[str]:
    """Several devices: what each holds beside the state, and the share of what one device holds for as many images."""
    ones = {(*about(each).values(), each["remat"], each["batch"]): each for each in plans if alone(each)}
    rows = []
    for each in plans:
        one = ones.get((*about(each).values(), each["remat"], each["batch"] // each["data"]))
        calls = each["collectives"]
        rows.append(
            about(each)
            | {
                "data x space": f"{each['data']} x {each['space']}",
                "images": each["batch"],
                "GB at the peak": f"{each['peak'] / 1e9:.2f}",
                "beside the state": f"{beside_state(each):.3f}",
                "share": f"{beside_state(each) / beside_state(one):.3f}" if one else "",
                "ideal": f"{1 / each['space']:.3f}",
                **{
                    word: calls.get(kind, 0) if each["compiled"] else ""
                    for word, kind in (
                        ("all-reduce", "all-reduce"),
                        ("permute", "collective-permute"),
                        ("gather", "all-gather"),
                    )
                },
                "GB sent": f"{each['sent'] / 1e9:.3f}" if each["compiled"] else "",
                "floor, ms": f"{1e3 * each['floor_s']:.1f}" if each["compiled"] else "",
                "by": by(each),
            }
        )
    return table(rows)


def peaks(plans: Plans) -> list[str]:
    """GB that a device holds at the peak, one column for each mesh; estimates in italics."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    columns = list(dict.fromkeys(f"{each['data']} x {each['space']}" for each in plans))
    for each in plans:
        value = f"{each['peak'] / 1e9:.2f}"
        row = found.setdefault((*about(each).values(), each["remat"]), {})
        row[f"{each['data']} x {each['space']}"] = value if each["compiled"] else f"*{value}*"
    names = ("device", "network", "px", "remat")
    return table(
        [
            dict(zip(names, key, strict=True)) | {column: row.get(column, "") for column in columns}
            for key, row in found.items()
        ]
    )


def figure(plans: Plans, file: Path) -> None:
    """Bytes an image against the resolution, a line for each network and way of recomputing."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for each in plans:
        if alone(each):
            found.setdefault((each["network"], each["remat"]), {})[each["size"]] = beside_state(each) / each["batch"]
    with style.styled():
        drawn = Figure(figsize=(style.WIDE, 3.2), layout="constrained")
        axes = drawn.add_subplot(xscale="log", yscale="log", xlabel="side of the images, px", ylabel="GB an image")
        networks = list(dict.fromkeys(network for network, _ in found))
        shades = dict(zip(networks, style.colours(len(networks)), strict=True))
        dashes = {"none": "^:", "layer": "o-", "block": "s--", "full": "x-."}  # markers, too, for single points
        for (network, remat), points in found.items():
            axes.plot(
                sorted(points), [points[size] for size in sorted(points)], dashes[remat], color=shades[network],
                markersize=3.5, label=f"{network}, {remat}",
            )  # fmt: skip
        sizes = sorted({size for points in found.values() for size in points})
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        values = [value for points in found.values() for value in points.values()]
        axes.set_ylim(min(values) / 1.2, max(values) * 1.2)
        axes.grid(visible=True)
        drawn.legend(loc="outside right upper")
        style.save(drawn, file)


def main() -> None:
    """Prints both tables; writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="an SVG file")
    options = parser.parse_args()
    plans = of_each_once([each for file in options.files for each in json.loads(file.read_text())["plans"]])
    print("\n".join([*memory(plans), "", *meshes(plans), "", *peaks(plans)]))
    if options.figure:
        figure(plans, options.figure)


if __name__ == "__main__":
    main()
