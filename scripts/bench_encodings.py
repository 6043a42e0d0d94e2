"""What an encoding costs: bytes, decoding time and error of stored radiographs, one JSON line per size and encoding.

    python scripts/bench_encodings.py NIH/images --sizes 512 1024

Images are resized as `cxrjax prepare` does; times are CPU milliseconds of one thread, the median over all images of the
best of three; the error is the mean absolute difference from the lossless image in grey levels.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from cxrjax.data.images import decode, encode, resize

ENCODINGS = {"png": ("png", 0), "jpeg 95": ("jpeg", 95), "jpeg 90": ("jpeg", 90)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of radiographs, PNG or JPEG")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--images", type=int, default=60, help="how many at most (default: 60)")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.folder.iterdir() if path.suffix in (".png", ".jpg"))[: arguments.images]
    originals = [decode(path.read_bytes(), str(path)) for path in files]
    for size in arguments.sizes:
        images = [resize(image, size) for image in originals]
        for name, (format, quality) in ENCODINGS.items():
            stored = [encode(image, format, quality) for image in images]
            error = [
                np.abs(decode(data, "") - image.astype(int)).mean() for data, image in zip(stored, images, strict=True)
            ]
            print(
                json.dumps(
                    {
                        "size": size,
                        "encoding": name,
                        "images": len(images),
                        "kB": round(float(np.mean([len(data) for data in stored])) / 1e3, 1),
                        "decode_ms": round(1e3 * float(np.median([_seconds(data) for data in stored])), 2),
                        "error": round(float(np.mean(error)), 3),
                    }
                )
            )


def _seconds(data: bytes) -> float:
    """CPU time to decode once."""
    times = []
    for _ in range(3):
        start = time.process_time()
        decode(data, "")
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
