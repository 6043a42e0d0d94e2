"""Write phantom radiographs of six exclusive classes into folders, the input of the sequential CNN's study.

python scripts/phantom_folders.py --out data/six --size 64
cxrjax prepare six_class --source data/six --data-dir data --size 64

Each class shows findings of the phantom. As in the published data set, the Covid-19 images come from a source of their
own; here they are brighter.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from cxrjax.data.images import encode
from cxrjax.data.phantom import render, sample_population, with_findings
from cxrjax.files import atomic_path
from cxrjax.findings import SIX_CLASS

FINDINGS = {
    "Covid-19": ["Reticulation", "Mass"],
    "Effusions": ["Pleural Effusion"],
    "Infiltration": ["Reticulation"],
    "No-Findings": [],
    "Pneumonia": ["Mass"],
    "Pneumothorax": ["Pneumothorax"],
}
SPLITS = {"train": 0.7, "validation": 0.15, "test": 0.15}
COVID_BRIGHTNESS = 1.15


def main() -> None:
    """Parse the arguments and write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--patients", type=int, default=1500, help="number of patients in all classes (default: 1500)")
    parser.add_argument("--size", type=int, default=64, help="image side in px (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    write_folders(**vars(parser.parse_args()))


def write_folders(out: Path, patients: int, size: int, seed: int) -> None:
    """Write one image per patient, with classes in turn, and `metadata.csv` with a row per image."""
    radiographs = {radiograph.patient: radiograph for radiograph in sample_population(seed, patients)}
    order = np.random.default_rng(seed).permutation(len(radiographs))
    edges = np.cumsum([round(fraction * len(radiographs)) for fraction in list(SPLITS.values())[:-1]])
    rows = []
    for position, index in enumerate(order):
        radiograph = list(radiographs.values())[index]
        split = list(SPLITS)[int(np.searchsorted(edges, position, side="right"))]
        name = SIX_CLASS[index % len(SIX_CLASS)]
        image = render(with_findings(radiograph, *FINDINGS[name]), size)
        source = "phantom-covid" if name == "Covid-19" else "phantom"
        if name == "Covid-19":
            image = np.clip(image * COVID_BRIGHTNESS, 0, 255).astype(np.uint8)
        folder = out / split / name
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
