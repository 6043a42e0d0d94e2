"""Draw phantom radiographs of six exclusive classes into folders, as the sequential CNN's study takes its images.

python scripts/phantom_folders.py --out data/six --size 64
cxrjax prepare six_class --source data/six --data-dir data --size 64

Each class stands for one finding of the phantom, drawn alone; the Covid-19 images, as in the real mixture, come from a
source of their own, which a brighter rendering gives away.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from cxrjax.data.images import encode
from cxrjax.data.phantom import sample_population, render, with_findings
from cxrjax.files import atomic_path
from cxrjax.findings import SIX_CLASS

SHOWN = {
    "Covid-19": ["Reticulation", "Mass"],
    "Effusions": ["Pleural Effusion"],
    "Infiltration": ["Reticulation"],
    "No-Findings": [],
    "Pneumonia": ["Mass"],
    "Pneumothorax": ["Pneumothorax"],
}
PARTS = {"train": 0.7, "validation": 0.15, "test": 0.15}
BRIGHTER = 1.15


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--patients", type=int, default=1500, help="of all classes together (default: 1500)")
    parser.add_argument("--size", type=int, default=64, help="pixels along each radiograph's side (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the population (default: 0)")
    draw(**vars(parser.parse_args()))


def draw(out: Path, patients: int, size: int, seed: int) -> None:
    """One image a patient, classes in turn, and `metadata.csv` with what is known of each image."""
    people = {radiograph.patient: radiograph for radiograph in sample_population(seed, patients)}
    order = np.random.default_rng(seed).permutation(len(people))
    edges = np.cumsum([round(share * len(people)) for share in list(PARTS.values())[:-1]])
    rows = []
    for place, number in enumerate(order):
        radiograph = list(people.values())[number]
        part = list(PARTS)[int(np.searchsorted(edges, place, side="right"))]
        name = SIX_CLASS[number % len(SIX_CLASS)]
        image = render(with_findings(radiograph, *SHOWN[name]), size)
        source = "phantom-covid" if name == "Covid-19" else "phantom"
        if name == "Covid-19":
            image = np.clip(image * BRIGHTER, 0, 255).astype(np.uint8)
        folder = out / part / name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{radiograph.id}.png"
        with atomic_path(file) as temporary:
            temporary.write_bytes(encode(image))
        rows.append((file.name, radiograph.patient, radiograph.view, radiograph.age, radiograph.sex, source))
    with atomic_path(out / "metadata.csv") as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("filename", "patient", "view", "age", "sex", "source"))
        writer.writerows(sorted(rows))


if __name__ == "__main__":
    main()
