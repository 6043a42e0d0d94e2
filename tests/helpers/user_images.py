"""Making and preparing a user's own radiographs."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from cxrjax.data.records import open_records
from tfds_builders.prepare import prepare


def picture(seed=0, format="PNG", mode="L") -> bytes:
    noise = np.random.default_rng(seed).normal(128, 60, (40, 40)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0)).convert(mode).save(stream, format)
    return stream.getvalue()


def fill(folder: Path, *names: str) -> Path:
    """Write a different image under each name; the same in the same test."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(name.encode()) + 1000 * len(list(folder.rglob("*")))
        path.write_bytes(picture(seed, "JPEG" if name.endswith(("jpg", "jpeg")) else "PNG"))
    return folder


def run(dataset, tmp_path, called=None, size=32, **options):
    prepared = prepare(dataset, data_dir=tmp_path / "D", size=size, **options)
    return prepared, open_records(tmp_path / "D", called or dataset, str(size or "native"))


def said(prepared, text):
    return any(text in note for note in prepared.notes)
