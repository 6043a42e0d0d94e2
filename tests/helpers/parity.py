"""Weights and images of the parity fixtures, by the rule that their README states."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np


class Parity:
    """What a published implementation computes for generated weights, in our layout (NHWC, HWIO)."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.about: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.results = dict(np.load(folder / f"{name}.npz"))

    def state_dict(self) -> dict[str, np.ndarray]:
        """PyTorch's names, and arrays in PyTorch's layout."""
        return {key: self._array(key, tuple(shape)) for key, shape in self.about["state"].items()}

    def _array(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
        if key.endswith(("running_mean", "running_var")):
            return self.results[f"running/{key}"]
        if key.endswith("num_batches_tracked"):
            return np.zeros((), np.int64)
        if key.endswith("bias"):
            return (0.1 * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1:
            return rng.uniform(0.6, 1.4, shape).astype(np.float32)
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    def images(self) -> np.ndarray:
        """float32, B x H x W x 3."""
        rng = np.random.Generator(np.random.PCG64(20261121))
        n, channels, height, width = self.about["input"]
        base = rng.standard_normal((n, 1, height // 8, width // 8))
        grey = np.kron(base, np.ones((8, 8))) + 0.3 * rng.standard_normal((n, 1, height, width))
        return np.repeat(grey.astype(np.float32), channels, axis=1).transpose(0, 2, 3, 1)


def relative_error(ours: Any, theirs: Any) -> float:
    """Norm of the difference over the norm of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
