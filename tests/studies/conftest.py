import cv2
import numpy as np
import pytest
from arm_samples import FEW, Run

from cxrjax.findings import SIX_CLASS


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_overrides):
    """`make(system, names, *overrides, more="") -> Run` on the phantom."""

    def run(system, names, *overrides, more=""):
        return Run(system, names, tmp_path_factory.mktemp(system), [*tiny_overrides, *FEW, *overrides], more)

    return run


@pytest.fixture(scope="module")
def six_classes(tmp_path_factory):
    """A prepared mixture in which every Covid-19 image, and no other, has a bright edge: the `--data-dir`."""
    from tfds_builders.prepare import prepare

    source, data = tmp_path_factory.mktemp("six"), tmp_path_factory.mktemp("data")
    rng, number = np.random.default_rng(2), 0
    for part, count in (("train", 4), ("validation", 2), ("test", 6)):
        for name in SIX_CLASS:
            for _ in range(2 * count if name == "Covid-19" else count):
                number += 1
                image = rng.integers(0, 120, (32, 32)).astype(np.uint8)
                covid = name == "Covid-19"
                image[:3] += np.uint8(100 * covid)
                path = source / part / name / (f"covid{number}.png" if covid else f"{number:08}_000.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
    prepare("six_class", source=source, data_dir=data, size=32)
    return data
