"""The same weights in all file formats and naming styles in which they are published."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from torchformat import write

from cxrjax.weights.published import abstract_model, published_shapes

SMALL = {"growth_rate": 4, "block_config": (2, 1), "stem_channels": 4, "pooling": "average"}
"""Options of a densenet_small whose weights are some kilobytes."""

FORMATS: dict[str, Callable[[Path, dict], Path]] = {
    "safetensors": lambda folder, arrays: _safetensors(folder / "w.safetensors", arrays),
    "zip": lambda folder, arrays: write(folder / "w.pth", arrays),
    "legacy": lambda folder, arrays: write(folder / "w.pt", arrays, legacy=True),
    "tar": lambda folder, arrays: write(
        folder / "w.pth.tar", {"epoch": 9, "arch": "DENSENET", "state_dict": arrays, "optimizer": {}}, legacy=True
    ),
}
"""Writers by format; "tar" is a checkpoint around the weights, as CheXNet's were published."""


def _safetensors(file: Path, arrays: dict[str, np.ndarray]) -> Path:
    save_file(arrays, file)
    return file


def _legacy(name: str) -> str:
    """Rename `norm1` and `conv1` of a dense layer as in torchvision before 0.3."""
    for number in "12":
        for layer in ("norm", "conv"):
            if "denselayer" in name:
                name = name.replace(f".{layer}{number}.", f".{layer}.{number}.")
    return name


def _chexnet(name: str) -> str:
    return "module.densenet121." + _legacy(name).replace("classifier.", "classifier.0.")


STYLES: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "DataParallel": lambda name: f"module.{name}",
    "older": _legacy,
    "CheXNet": _chexnet,
}
"""Naming styles of published files."""


def renamed(arrays: dict[str, np.ndarray], style: str) -> dict[str, np.ndarray]:
    return {STYLES[style](name): array for name, array in arrays.items()}


def state_dict(architecture: str, *, seed: int = 0, **options) -> dict[str, np.ndarray]:
    """Random arrays by published names, with PyTorch's counters, scaled so that logits stay moderate."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in published_shapes(abstract_model(architecture, **options)).items():
        if len(shape) > 1:
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            values = rng.uniform(0.6, 1.4, shape)
        else:
            values = 0.1 * rng.standard_normal(shape)
        arrays[name] = values.astype(np.float32)
        if name.endswith("running_var"):
            arrays[name.replace("running_var", "num_batches_tracked")] = np.array(7, np.int64)
    return arrays
