"""Measures opening a large table of records, and reading many small images end to end: a JSON line each.

python scripts/bench_records.py --rows 377110            # a synthetic table as large as MIMIC-CXR-JPG's
python scripts/bench_records.py --images 20000 --side 64  # drawn radiographs, prepared, then read once in order
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cxrjax.data.pipeline import evaluation_batches, make_examples
from cxrjax.data.records import Record, open_records, write_table
from cxrjax.findings import CHEXPERT14, LabelPolicy
from tfds_builders.prepare import prepare

OPEN = """
import json, sys, time
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
from cxrjax.data.records import open_records
before, start, cpu = resident(), time.perf_counter(), time.process_time()
records = open_records(sys.argv[1], "mimic_cxr_jpg", "native")
rows, findings = records.labels.shape
patients, views = len(set(records.patient.tolist())), len(set(records.view.tolist()))
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({
    "records": rows, "findings": findings, "patients": patients, "views": views, "seconds": round(seconds, 2),
    "cpu_seconds": round(cpu, 2), "memory_mb": round((resident() - before) / 1e6),
}))
"""


def table(data_dir: Path, rows: int) -> int:
    """Writes a table of made-up records with MIMIC-CXR-JPG's columns; returns its size in bytes."""
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([1, 0, -1, -2], np.int8), (rows, len(CHEXPERT14)), p=(0.1, 0.1, 0.05, 0.75))
    patient = np.sort(rng.integers(10_000_000, 10_000_000 + rows // 6, rows))
    study = rng.integers(50_000_000, 60_000_000, rows)
    view = rng.choice(["PA", "AP", "LATERAL", "LL", ""], rows)
    digests = (hashlib.sha256(str(row).encode()).hexdigest() for row in range(rows))
    records = [
        Record(
            id="-".join(digest[k : k + 8] for k in range(0, 40, 8)), patient=f"p{patient[row]}",
            study=f"s{study[row]}", view=str(view[row]), age=float("nan"), sex="", source="MIMIC-CXR-JPG",
            labels=tuple(labels[row].tolist()), official="train", sha256=digest, width=2544, height=3056,
        )
        for row, digest in enumerate(digests)
    ]  # fmt: skip
    directory = data_dir / "mimic_cxr_jpg" / "native" / "1.0.0"
    directory.mkdir(parents=True)
    write_table(directory, records, CHEXPERT14, dataset="mimic_cxr_jpg", config="native")
    return sum(path.stat().st_size for path in directory.iterdir())


def end_to_end(data_dir: Path, images: int, side: int, threads: int) -> dict[str, float]:
    """Draws and prepares at least so many images, then reads every one of them once."""
    start = time.perf_counter()
    prepare("cxr_phantom", data_dir=data_dir, size=side, patients=round(images / 1.55))
    prepared = time.perf_counter() - start
    records = open_records(data_dir, "cxr_phantom", str(side))
    some = make_examples(records, range(len(records)), records.findings, LabelPolicy())
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    for batch in evaluation_batches(some, size=side, batch_size=64, threads=threads):
        count += int(batch.example_mask.sum())
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert count == len(records) >= images, (count, len(records), images)
    return {
        "images": count, "side": side, "prepare_seconds": round(prepared, 1), "seconds": round(wall, 2),
        "images_per_s": round(count / wall), "cpu_ms_per_image": round(1e3 * cpu / count, 3),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }  # fmt: skip


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=0, help="of a synthetic table")
    parser.add_argument("--images", type=int, default=0, help="at least, to prepare and read")
    parser.add_argument("--side", type=int, default=64, help="of these images in px")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            size = table(Path(folder), options.rows)
            words = [sys.executable, "-c", OPEN, folder]
            opened = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(json.dumps({"table_mb": round(size / 1e6, 1)} | opened), flush=True)
        if options.images:
            print(json.dumps(end_to_end(Path(folder), options.images, options.side, options.threads)), flush=True)


if __name__ == "__main__":
    main()
