"""Measures PyTorch's training step of the networks that torchvision and timm have, one JSON line per case.

python scripts/bench_torch.py --cases densenet121:224:4 hrnet_w18:64:2     # uv sync --group peers

The counterpart of `bench_models.py`: float32, 14 findings, Adam, a grey batch that already lies on the device. Maps
are channels-last, which is PyTorch's faster layout.
"""

import argparse
import json
import statistics
import time
from typing import Any

FINDINGS = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(name: str, size: int, batch: int, steps: int) -> dict[str, Any]:
    """One case, on the first GPU or else on the CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if name.startswith("hrnet"):
        import timm  # pyright: ignore[reportMissingImports]

        model = timm.create_model(name, pretrained=False, num_classes=FINDINGS)
    else:
        import torchvision  # pyright: ignore[reportMissingImports]

        model = getattr(torchvision.models, name)(weights=None, num_classes=FINDINGS)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=device == "cuda")
    grey = torch.randint(0, 256, (batch, 1, size, size), dtype=torch.uint8, device=device)
    label = (torch.rand(batch, FINDINGS, device=device) < 0.1).float()
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        images = ((grey.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        torch.nn.functional.binary_cross_entropy_with_logits(model(images), label).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(steps + 3):
        start = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    step_s, step_cpu_s = map(statistics.median, zip(*times[3:], strict=True))
    return {
        "step_s": round(step_s, 4),
        "images_per_s": round(batch / step_s, 2),
        "step_cpu_s": round(step_cpu_s, 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", required=True, metavar="NAME:SIZE:BATCH")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    for case in options.cases:
        name, size, batch = case.split(":")
        row = {"network": name, "size": int(size), "batch": int(batch), "dtype": "float32"}
        print(json.dumps(row | measure(name, int(size), int(batch), options.steps)), flush=True)


if __name__ == "__main__":
    main()
