"""Draw a contact sheet of phantom radiographs, one finding per column, or time the rendering.

python scripts/phantom_sheet.py --out docs/phantom.png
python scripts/phantom_sheet.py --time
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np

from cxrjax.data.phantom import Radiograph, render, render_masks, sample_population, with_findings
from cxrjax.findings import PHANTOM

GAP, CAPTION = 6, 26


def main() -> None:
    """Parse the arguments; draw or time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="PNG file to write")
    parser.add_argument("--size", type=int, default=256, help="image side in px (default: 256)")
    parser.add_argument("--seed", type=int, default=7, help="random seed (default: 7)")
    parser.add_argument("--rows", type=int, default=3, help="number of patients (default: 3)")
    parser.add_argument("--masks", action="store_true", help="outline the masks of the findings")
    parser.add_argument("--time", action="store_true", help="print the images per second of one core")
    args = parser.parse_args()
    if args.time:
        for size in (64, 128, 256, 512, 1024, 2048):
            print(f"{size:5d} px {speed(size):7.1f} images/s")
    elif args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(args.out), sheet(args.seed, args.rows, args.size, args.masks), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    else:
        parser.error("give --out FILE or --time")


def sheet(seed: int, rows: int, size: int, outlined: bool) -> np.ndarray:
    """Return a grid of radiographs: a row per patient, a column without findings and one for each finding."""
    views = ("PA", "AP", "PA")
    people = {view: [r for r in sample_population(seed, 40) if r.view == view] for view in views}
    chosen = [people[views[row % 3]][3 * row] for row in range(rows)]
    columns = ("No finding", *PHANTOM)
    step = size + GAP
    page = np.zeros((CAPTION + rows * step, len(columns) * step - GAP), np.uint8)
    for column, name in enumerate(columns):
        cv2.putText(page, name, (column * step + 4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 1, cv2.LINE_AA)
        for row, radiograph in enumerate(chosen):
            shown = with_findings(radiograph, *([name] if column else []))
            tile = _outlined(shown, size) if outlined else render(shown, size)
            cv2.putText(tile, shown.view, (4, size - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1, cv2.LINE_AA)
            top, left = CAPTION + row * step, column * step
            page[top : top + size, left : left + size] = tile
    return page


def _outlined(radiograph: Radiograph, size: int) -> np.ndarray:
    image = render(radiograph, size)
    for mask in render_masks(radiograph, size).values():
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, 255, 1)
    return image


def speed(size: int, seconds: float = 2.0) -> float:
    """Return the images rendered per second of CPU time, on one thread."""
    cv2.setNumThreads(1)
    people = sample_population(0, 400)
    for radiograph in people[:20]:
        render(radiograph, size)
    start, drawn = time.process_time(), 0
    while time.process_time() - start < seconds:
        render(people[drawn % len(people)], size)
        drawn += 1
    return drawn / (time.process_time() - start)


if __name__ == "__main__":
    main()
