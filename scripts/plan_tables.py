"""Print the tables of docs/memory.md and docs/scaling.md from the output of `cxrjax plan --json FILE`.

uv run cxrjax plan --config resolution:2048 --device h200 --sweep --remats none layer block full --meshes data=1 --json a.json
uv run python scripts/plan_tables.py a.json ... [--figure memory.svg]

GB per image: the memory of a step on one device, gradients included, without parameters, batch statistics, optimizer
state and the program of a TPU, divided by its images.
"""  # noqa: E501 - one command

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cxrjax.report import style

Plans = list[dict[str, Any]]


def activation_gb(plan: dict[str, Any]) -> float:
    """Return the GB at the peak without parameters, batch statistics, optimizer state and a TPU's program."""
    return (plan["peak"] - plan["parameters"] - plan["optimizer"] - plan["program"]) / 1e9


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of rows with equal keys; empty without rows."""
    if not rows:
        return []
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def accessed_gb(plan: dict[str, Any]) -> float:
    """Return the GB read and written in device memory per image."""
    return plan["bytes_accessed"] / plan["microbatch"] / 1e9


def is_single_device(plan: dict[str, Any]) -> bool:
    """Return whether a plan is for one device."""
    return plan["data"] * plan["space"] == 1


def setting(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the first columns of every table."""
    return {"device": plan["accelerator"], "network": plan["network"], "px": plan["size"]}


def source(plan: dict[str, Any]) -> str:
    """Return whether XLA compiled the plan or it is an estimate."""
    return "XLA" if plan["compiled"] else "estimate"


def deduplicate(plans: Plans) -> Plans:
    """Return one plan per setting; compiled plans replace estimates."""
    keys = ("accelerator", "network", "size", "remat", "data", "space", "microbatch")
    unique: dict[tuple[Any, ...], dict[str, Any]] = {}
    for plan in plans:
        key = tuple(plan[name] for name in keys)
        if key not in unique or plan["compiled"]:
            unique[key] = plan
    return list(unique.values())


def memory_table(plans: Plans) -> list[str]:
    """Return the memory on one device, by network, size and rematerialisation."""
    return table([
        setting(plan)
        | {
            "remat": plan["remat"],
            "images": plan["microbatch"],
            "GB at the peak": f"{plan['peak'] / 1e9:.2f}",
            "GB per image": f"{activation_gb(plan) / plan['microbatch']:.3f}",
            "TFLOP per image": f"{plan['flops'] / plan['microbatch'] / 1e12:.2f}",
            "GB accessed per image": f"{accessed_gb(plan):.0f}" if plan["compiled"] else "",
            "source": source(plan),
        }
        for plan in plans
        if is_single_device(plan)
    ])  # fmt: skip


def mesh_table(plans: Plans) -> list[str]:
    """Return memory and collectives on several devices, and the activations as a fraction of those on one device."""
    single = {
        (*setting(plan).values(), plan["remat"], plan["microbatch"]): plan for plan in plans if is_single_device(plan)
    }
    rows = []
    for plan in plans:
        one = single.get((*setting(plan).values(), plan["remat"], plan["microbatch"] // plan["data"]))
        calls = plan["collectives"]
        rows.append(
            setting(plan)
            | {
                "data x space": f"{plan['data']} x {plan['space']}",
                "images": plan["microbatch"],
                "GB at the peak": f"{plan['peak'] / 1e9:.2f}",
                "without state, GB": f"{activation_gb(plan):.3f}",
                "fraction": f"{activation_gb(plan) / activation_gb(one):.3f}" if one else "",
                "ideal": f"{1 / plan['space']:.3f}",
                **{
                    column: calls.get(kind, 0) if plan["compiled"] else ""
                    for column, kind in (
                        ("all-reduce", "all-reduce"),
                        ("permute", "collective-permute"),
                        ("gather", "all-gather"),
                    )
                },
                "GB sent": f"{plan['bytes_sent'] / 1e9:.3f}" if plan["compiled"] else "",
                "floor, ms": f"{1e3 * plan['floor_s']:.1f}" if plan["compiled"] else "",
                "source": source(plan),
            }
        )
    return table(rows)


def peak_table(plans: Plans) -> list[str]:
    """Return the GB of a device at the peak, with a column per mesh; estimates in italics."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    columns = list(dict.fromkeys(f"{plan['data']} x {plan['space']}" for plan in plans))
    for plan in plans:
        value = f"{plan['peak'] / 1e9:.2f}"
        row = rows.setdefault((*setting(plan).values(), plan["remat"]), {})
        row[f"{plan['data']} x {plan['space']}"] = value if plan["compiled"] else f"*{value}*"
    names = ("device", "network", "px", "remat")
    return table(
        [
            dict(zip(names, key, strict=True)) | {column: row.get(column, "") for column in columns}
            for key, row in rows.items()
        ]
    )


def figure(plans: Plans, file: Path) -> None:
    """Plot the GB per image against the image side, with a line per network and rematerialisation."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for plan in plans:
        if is_single_device(plan):
            lines.setdefault((plan["network"], plan["remat"]), {})[plan["size"]] = (
                activation_gb(plan) / plan["microbatch"]
            )
    with style.styled():
        drawing = Figure(figsize=(style.WIDE, 3.2), layout="constrained")
        axes = drawing.add_subplot(xscale="log", yscale="log", xlabel="image side, px", ylabel="GB per image")
        networks = list(dict.fromkeys(network for network, _ in lines))
        shades = dict(zip(networks, style.colours(len(networks)), strict=True))
        dashes = {"none": "^:", "layer": "o-", "block": "s--", "full": "x-."}  # markers show single points
        for (network, remat), points in lines.items():
            axes.plot(
                sorted(points), [points[size] for size in sorted(points)], dashes[remat], color=shades[network],
                markersize=3.5, label=f"{network}, {remat}",
            )  # fmt: skip
        sizes = sorted({size for points in lines.values() for size in points})
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        values = [value for points in lines.values() for value in points.values()]
        axes.set_ylim(min(values) / 1.2, max(values) * 1.2)
        axes.grid(visible=True)
        drawing.legend(loc="outside right upper")
        style.save(drawing, file)


def main() -> None:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="an SVG file")
    options = parser.parse_args()
    plans = deduplicate([plan for file in options.files for plan in json.loads(file.read_text())["plans"]])
    print("\n".join([*memory_table(plans), "", *mesh_table(plans), "", *peak_table(plans)]))
    if options.figure:
        figure(plans, options.figure)


if __name__ == "__main__":
    main()
