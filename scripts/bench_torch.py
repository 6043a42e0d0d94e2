"""Benchmark training and inference of torchvision's and timm's networks in PyTorch; one JSON line per case.

python scripts/bench_torch.py densenet121:1024:8 hrnet_w18:512:16 --variants amp ckpt compile   # uv sync --group parity

The counterpart of `cxrjax bench`, with the same column names: 14 findings, Adam, a batch of grey bytes on the device.
All variants use channels-last, PyTorch's faster layout:

  float32  full precision
  amp      bfloat16 autocast, fused Adam
  ckpt     amp, and torchvision's memory_efficient=True (DenseNet only)
  compile  amp, and torch.compile
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

FINDINGS = 14
VARIANTS = ("float32", "amp", "ckpt", "compile")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(name: str, variant: str) -> Any:
    """Return a randomly initialised network."""
    if name.startswith("hrnet"):
        import timm  # pyright: ignore[reportMissingImports]

        return timm.create_model(name, pretrained=False, num_classes=FINDINGS)
    import torchvision  # pyright: ignore[reportMissingImports]

    memory_options = {"memory_efficient": True} if variant == "ckpt" and name.startswith("densenet") else {}
    return getattr(torchvision.models, name)(weights=None, num_classes=FINDINGS, **memory_options)


def measure(
    name: str, size: int, batch: int, variant: str, steps: int, before_timing: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Measure a case on the first GPU, or on the CPU; `before_timing` is called when everything is compiled."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    model = network(name, variant).to(device, memory_format=torch.channels_last).train()
    called = torch.compile(model) if variant == "compile" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=device == "cuda")
    grey = torch.randint(0, 256, (batch, 1, size, size), dtype=torch.uint8, device=device)
    label = (torch.rand(batch, FINDINGS, device=device) < 0.1).float()
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def logits() -> Any:
        images = ((grey.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=variant != "float32"):
            return called(images)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.binary_cross_entropy_with_logits(logits().float(), label).backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad():
            logits()

    def timed(mode: str, call: Callable[[], None]) -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps + 3):
            start = time.perf_counter(), time.process_time()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        seconds, cpu = map(statistics.median, zip(*times[3:], strict=True))
        start = time.perf_counter()
        for _ in range(steps):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        steady = (time.perf_counter() - start) / steps
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        values = {"s": seconds, "cpu_s": cpu, "images_per_s": batch / seconds, "peak_bytes": peak}
        values["steady_images_per_s"] = batch / steady
        return {f"{mode}_{key}": value for key, value in values.items()}

    device_name = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    if variant == "compile":
        step()
        model.eval()
        infer()
        model.train()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    before_timing()
    training = timed("train", step)
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    model.eval()
    return device_name | training | timed("infer", infer)


def main() -> None:
    """Print one line per case and variant, with an `error` if it cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="ARCH:SIZE:BATCH")
    parser.add_argument("--variants", nargs="+", default=["amp"], choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--wait", action="store_true", help="print 'ready' once compiled, and wait for a line before timing"
    )
    options = parser.parse_args()
    import torch  # pyright: ignore[reportMissingImports]

    def wait() -> None:
        if options.wait:
            print("ready", flush=True)
            sys.stdin.readline()

    for case in options.cases:
        name, size, batch = case.split(":")
        for variant in options.variants:
            row: dict[str, Any] = {"framework": f"torch {torch.__version__}", "arch": name, "resolution": int(size)}
            row |= {"batch": int(batch), "variant": variant}
            try:
                row |= measure(name, int(size), int(batch), variant, options.steps, wait)
            except torch.cuda.OutOfMemoryError:
                row["error"] = "out of memory"
            except RuntimeError as error:  # a compiler error, or a network without the variant
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
