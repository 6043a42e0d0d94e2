"""Benchmark the loader against PyTorch's DataLoader with PIL and torchvision; one JSON line per case.

python scripts/bench_loader.py --torch-python ENV/bin/python [--images FOLDER] [--sizes 256 512 1024 2048] [--work DIR]

Enlarges the radiographs in FOLDER (default: phantoms) to 2544x3056 px and adds noise until a JPEG of quality 95 is as
large as MIMIC-CXR-JPG's average. Prepares these originals at every size and writes the prepared images as files for
PyTorch. Then runs each case in a process of its own, with two threads or workers:

  torch originals   decode, resize, flip, rotate (PIL, bilinear), normalise to float32: DataLoader, 2 workers
  torch resized     the same from files of the right size
  ours prepared     training batches from the prepared records, with the same flip and rotation
  ours plain        the same without augmentation
  floor             only decoding the same bytes with libjpeg-turbo, in two threads
  ours on the fly   training batches from the originals (stored size native), with flip and rotation

Memory is the peak of the proportional set size, summed over the process tree, libraries included. `--tables FILE`
prints the lines of an earlier run as the tables of docs/loader.md.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

ORIGINAL = (3056, 2544)
KILOBYTES = 1600
BATCH = 8
ROTATION = 15
GOALS = {
    "ours prepared / torch originals": {256: 40, 512: 15, 1024: 7, 2048: 5},
    "ours prepared / torch resized": {256: 2.5, 512: 2.5, 1024: 3, 2048: 4},
    "ours plain / floor": {256: 0.65, 512: 0.7, 1024: 0.8, 2048: 0.75},
    "ours on the fly / torch originals": {256: 1.9, 512: 2, 1024: 2.3, 2048: 3},
}
CASES = ("torch originals", "torch resized", "ours prepared", "ours plain", "floor", "ours on the fly")


def main() -> None:
    """Run all cases, or one of them in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="Python with torch and torchvision")
    parser.add_argument("--images", type=Path, help="folder of radiographs (default: phantoms)")
    parser.add_argument("--count", type=int, default=32, help="number of originals (default: 32)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--seconds", type=float, default=5, help="minimum time per case (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads or workers (default: 2)")
    parser.add_argument("--work", type=Path, help="folder for images, kept (default: a temporary one)")
    parser.add_argument("--tables", type=Path, help="print the JSON lines of an earlier run as tables")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tables:
        print(tables([json.loads(line) for line in options.tables.read_text().splitlines()]))
        return
    if options.case:
        size, case = int(options.sizes[0]), options.case
        print(json.dumps(measure(batches(case, size, options.work, options.threads), options.seconds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        make(work, options.images, options.count, options.sizes)
        for size in options.sizes:
            results = {}
            for case in options.cases:
                python = options.torch_python if case.startswith("torch") else sys.executable
                results[case] = run(python, case, size, work, options)
                print(json.dumps({"size": size, "case": case} | results[case]), flush=True)
            print(json.dumps({"size": size} | ratios(results, size)), flush=True)


def ratios(results: dict[str, dict[str, Any]], size: int) -> dict[str, Any]:
    """Return the ratios of the measured cases, by images/s and by CPU time, with their goals."""
    ratios = {}
    for name, goals in GOALS.items():
        one, other = name.split(" / ")
        if one in results and other in results:
            by_speed = results[one]["images_per_s"] / results[other]["images_per_s"]
            by_cpu = results[other]["cpu_ms_per_image"] / results[one]["cpu_ms_per_image"]
            ratios[name] = {"ratio": round(by_speed, 2), "by_cpu": round(by_cpu, 2), "goal": goals.get(size)}
    return ratios


def tables(lines: list[dict[str, Any]]) -> str:
    """Return Markdown tables of the cases and of the ratios with their goals."""
    sizes = list(dict.fromkeys(line["size"] for line in lines))
    cases = {(line["case"], line["size"]): line for line in lines if "case" in line}
    compared = {(name, line["size"]): line[name] for line in lines for name in GOALS if name in line}

    def case(name: str, size: int) -> str:
        line = cases.get((name, size))
        return "" if line is None else "{images_per_s:,} / {cpu_ms_per_image:.2f} / {memory_mb:,}".format(**line)

    def comparison(name: str, size: int) -> str:
        line = compared.get((name, size))
        return "" if line is None else "{ratio:.2f} / {by_cpu:.2f} ({goal})".format(**line)

    def table(first: str, names: Iterable[str], cell: Callable[[str, int], str]) -> list[str]:
        rows = [[first, *map(str, sizes)], ["---"] * (1 + len(sizes))]
        rows += [[name, *(cell(name, size) for size in sizes)] for name in names]
        return [f"| {' | '.join(row)} |" for row in rows]

    return "\n".join([*table("images/s / CPU ms / MB", CASES, case), "", *table("ratio", GOALS, comparison)])


# Images


def make(work: Path, images: Path | None, count: int, sizes: list[int]) -> None:
    """Write originals, prepared records and resized files, unless they exist."""
    from concurrent.futures import ThreadPoolExecutor

    from cxrjax.data.records import open_records
    from tfds_builders.prepare import prepare_sizes

    folder = work / "originals"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: original(folder / f"{number}.jpg", images, number), range(count)))
    with (work / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "patient", "Mass"), *((f"{n}.jpg", n, n % 2) for n in range(count))])
    prepare_sizes(
        "table", [None, *sizes], source=folder, data_dir=work / "data", name="bench", table=work / "table.csv",
        image_column="path", label_columns=("Mass",), patient_column="patient",
    )  # fmt: skip
    for size in sizes:
        (work / str(size)).mkdir(exist_ok=True)
        records = open_records(work / "data", "bench", str(size))
        for row, name in enumerate(records.id):
            (work / str(size) / name).write_bytes(records.image_bytes(row))


def original(path: Path, images: Path | None, number: int) -> None:
    """Write an enlarged radiograph with noise that brings its JPEG to `KILOBYTES`."""
    import cv2
    import numpy as np

    from cxrjax.data.phantom import render, sample_population

    if path.exists():
        return
    if images:
        files = sorted(file for file in images.iterdir() if file.suffix in (".png", ".jpg"))
        image = cv2.imread(str(files[number % len(files)]), cv2.IMREAD_GRAYSCALE)
    else:
        image = render(sample_population(seed=0, patients=number + 1)[number], 1024)
    assert image is not None
    large = cv2.resize(image, ORIGINAL[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
    noise = np.random.default_rng(number).standard_normal(ORIGINAL, np.float32)
    low, high, data = 0.0, 8.0, b""
    for _ in range(6):
        middle = (low + high) / 2
        noisy = np.clip(large + middle * noise, 0, 255).astype(np.uint8)
        data = cv2.imencode(".jpg", noisy, (cv2.IMWRITE_JPEG_QUALITY, 95))[1].tobytes()
        low, high = (middle, high) if len(data) < KILOBYTES * 1000 else (low, middle)
    path.write_bytes(data)


# Cases: endless generators of the number of images in each batch


def batches(case: str, size: int, work: Path, threads: int) -> Generator[int, None, None]:
    """Return the batches of a case."""
    if case == "floor":
        return floor(work / str(size), threads)
    if case.startswith("torch"):
        resized = case == "torch resized"
        return torch_batches(work / str(size) if resized else work / "originals", 0 if resized else size, threads)
    return ours(
        work / "data", "native" if case == "ours on the fly" else str(size), size, case != "ours plain", threads
    )


def ours(data: Path, stored: str, size: int, augmented: bool, threads: int) -> Generator[int, None, None]:
    """Yield training batches."""
    import numpy as np

    from cxrjax.data.images import Augment
    from cxrjax.data.pipeline import make_examples, training_batches
    from cxrjax.data.records import open_records
    from cxrjax.findings import LabelPolicy

    records = open_records(data, "bench", stored)
    augment = Augment(flip=0.5, rotation=ROTATION) if augmented else Augment()
    examples = make_examples(records, np.tile(np.arange(len(records)), 4096), records.findings, LabelPolicy())
    for batch in training_batches(examples, size=size, batch_size=BATCH, augment=augment, seed=0, threads=threads):
        yield len(batch.image)


def torch_batches(folder: Path, size: int, workers: int) -> Generator[int, None, None]:
    """Yield batches of a usual PyTorch loader; `size` 0 does not resize."""
    import torch  # pyright: ignore[reportMissingImports]

    try:
        from torchvision import transforms  # pyright: ignore[reportMissingImports]
    except RuntimeError:  # built without compiled operators, which transforms do not need
        from torch import library as operators  # pyright: ignore[reportMissingImports]

        missing = operators.Library("torchvision", "DEF")
        missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        from torchvision import transforms  # pyright: ignore[reportMissingImports]
    from PIL import Image

    steps = [transforms.Resize((size, size))] if size else []
    transform = transforms.Compose([
        *steps,
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomRotation(ROTATION, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.25]),
    ])  # fmt: skip
    files = sorted(folder.glob("*.jpg"))

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files) * 4096

        def __getitem__(self, index: int):
            with Image.open(files[index % len(files)]) as image:
                return transform(image.convert("L"))

    loader = torch.utils.data.DataLoader(Images(), BATCH, shuffle=True, num_workers=workers, drop_last=True)
    for batch in loader:
        yield len(batch)


def floor(folder: Path, threads: int) -> Generator[int, None, None]:
    """Decode in threads and discard the images, with the faster of simplejpeg and OpenCV."""
    import cv2
    import numpy as np

    cv2.setNumThreads(0)
    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    arrays = [np.frombuffer(data, np.uint8) for data in files]
    decoders: dict[str, Callable[[int], Any]] = {"cv2": lambda n: cv2.imdecode(arrays[n], cv2.IMREAD_GRAYSCALE)}
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]

        decoders["simplejpeg"] = lambda n: simplejpeg.decode_jpeg(files[n], "GRAY")
    except ImportError:
        pass

    def seconds(decode: Callable[[int], Any]) -> float:
        start = time.process_time()
        for n in range(len(files)):
            decode(n)
        return time.process_time() - start

    times = {name: min(seconds(decode) for _ in range(3)) for name, decode in decoders.items()}
    decode = decoders[min(times, key=lambda name: times[name])]
    done, count = threading.Event(), [0] * threads

    def work(thread: int) -> None:
        for n in itertools.cycle(range(len(files))):
            if done.is_set():
                return
            decode(n)
            count[thread] += 1

    started = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for thread in started:
        thread.start()
    before = 0
    try:
        while True:
            time.sleep(0.2)
            now = sum(count)
            yield now - before
            before = now
    finally:
        done.set()
        for thread in started:
            thread.join()


# Measuring


def measure(stream: Generator[int, None, None], seconds: float) -> dict[str, Any]:
    """Measure images/s, CPU time and memory of the process tree in the steady state."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], tree_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    for _ in range(6):
        next(stream)
    count, wall, cpu = 0, time.perf_counter(), tree_seconds()
    taken = 0
    while taken < 6 or time.perf_counter() < wall + seconds:
        count += next(stream)
        taken += 1
    wall, cpu = time.perf_counter() - wall, tree_seconds() - cpu
    watcher.start()  # after timing, since it costs CPU time
    until = time.perf_counter() + 1.5
    while time.perf_counter() < until:
        next(stream)
    ended.set()
    watcher.join()
    stream.close()
    return {
        "images_per_s": round(count / wall, 1),
        "cpu_ms_per_image": round(1e3 * cpu / count, 3),
        "memory_mb": round(peak[0] / 1e6),
    }


def run(python: str, case: str, size: int, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in a process of its own."""
    command = [python, __file__, "--case", case, "--sizes", size, "--work", work, "--seconds", options.seconds]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [str(argument) for argument in (*command, "--threads", options.threads)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{case} at {size} px failed with exit code {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def process_tree() -> list[int]:
    """Return the ids of this process and of its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    processes = [os.getpid()]
    for process in processes:
        processes += [child for child, parent in parents.items() if parent == process]
    return processes


def tree_seconds() -> float:
    """Return the CPU time of the process tree in seconds."""
    ticks = 0
    for process in process_tree():
        try:
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_memory() -> int:
    """Return the memory of the process tree in bytes; shared memory counts once."""
    total = 0
    for process in process_tree():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total


if __name__ == "__main__":
    main()
