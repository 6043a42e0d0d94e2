"""Measures the loader: images per second and CPU time per image, one JSON line per case.

python scripts/bench_loader.py --data-dir DATA --dataset chestxray14 --config 1024
python scripts/bench_loader.py --synthetic 256 512 1024      # smooth noise as JPEG of quality 95, in memory
"""

import argparse
import json
import time
from typing import Any

import cv2
import numpy as np

from cxrjax.data.images import Augment, decode, encode
from cxrjax.data.pipeline import Examples, training_batches
from cxrjax.data.records import open_records

AUGMENTS = {"none": Augment(), "flip": Augment(flip=0.5), "warp": Augment(flip=0.5, rotation=15)}


class Synthetic:
    """Stands for records: images whose JPEGs are about as large as those of radiographs."""

    def __init__(self, size: int, count: int = 4000):
        rng = np.random.default_rng(0)
        coarse = rng.uniform(40, 200, (16, 16)).astype(np.float32)
        smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(smooth + rng.normal(0, 2.5, (size, size)), 0, 255).astype(np.uint8)
        self.encoded, self.count = encode(noisy, "jpeg"), count

    def __len__(self) -> int:
        return self.count

    def image(self, row: int) -> np.ndarray:
        """The same image for every row."""
        return decode(self.encoded, f"image {row}")


def measure(records: Any, size: int | None, augment: Augment, threads: int, batch_size: int, seconds: float) -> dict:
    """The speed of training batches over about `seconds`, after a few to warm up."""
    n = len(records)
    size = int(size or records.image(0).shape[0])
    examples = Examples(records, np.arange(n, dtype=np.int32), np.zeros((n, 1), np.float32), np.ones((n, 1), bool))
    batches = training_batches(examples, size=size, batch_size=batch_size, augment=augment, seed=0, threads=threads)
    for _ in range(threads + 2):
        next(batches)
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + seconds:
        next(batches)
        count += batch_size
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    return {"size": size, "images_per_s": round(count / wall, 1), "cpu_ms_per_image": round(1e3 * cpu / count, 3)}


def main() -> None:
    """Prints one line per stored size, augmentation and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of prepared data sets")
    parser.add_argument("--dataset", default="chestxray14")
    parser.add_argument("--config", default="1024", help="stored size")
    parser.add_argument("--size", type=int, help="of the batches; default the stored size")
    parser.add_argument("--synthetic", type=int, nargs="*", default=[], metavar="SIZE")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each case runs")
    options = parser.parse_args()

    sources: dict[str, Any] = {f"synthetic-{size}": Synthetic(size) for size in options.synthetic}
    if options.data_dir:
        sources[options.config] = open_records(options.data_dir, options.dataset, options.config)
    for name, records in sources.items():
        for kind, augment in AUGMENTS.items():
            for threads in options.threads:
                case = {"data": name, "augment": kind, "threads": threads, "batch_size": options.batch_size}
                speed = measure(records, options.size, augment, threads, options.batch_size, options.seconds)
                print(json.dumps(case | speed), flush=True)


if __name__ == "__main__":
    main()
