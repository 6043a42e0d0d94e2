"""Write and prepare a user's own radiographs."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from cxrjax.data.records import open_records
from tfds_builders.prepare import prepare


def image_bytes(seed=0, format="PNG", mode="L") -> bytes:
    noise = np.random.default_rng(seed).normal(128, 60, (40, 40)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0)).convert(mode).save(stream, format)
    return stream.getvalue()


def write_images(folder: Path, *names: str) -> Path:
    """Write a different image under each name; deterministic."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(name.encode()) + 1000 * len(list(folder.rglob("*")))
        path.write_bytes(image_bytes(seed, "JPEG" if name.endswith(("jpg", "jpeg")) else "PNG"))
    return folder


def prepare_and_open(dataset, tmp_path, *, size=32, **options):
    prepared = prepare(dataset, data_dir=tmp_path / "D", size=size, **options)
    return prepared, open_records(tmp_path / "D", options.get("name", dataset), str(size or "native"))


def has_note(prepared, text):
    return any(text in note for note in prepared.notes)
