"""Settings for every test: 8 simulated CPU devices, no silent promotion, a compilation cache."""

import dataclasses
import gc
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # for other processes as well

import jax
import pytest

from cxrjax import config as configs

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")))
SHARED = ROOT.parent / "shared"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_finish() -> None:
    """What is imported stays: else Python's collector goes through it again and again, 6 % of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and reference results; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared phantom of 60 patients at 32 px: the `--data-dir` that holds it."""
    from tfds_builders.prepare import prepare

    data = tmp_path_factory.mktemp("data")
    prepare("cxr_phantom", data_dir=data, size=32, patients=60)
    return data


TINY = (
    "data.stored_size=32", "data.num_threads=1", "split.name=random", "split.fractions=(0.5, 0.25, 0.25)",
    "model.options.growth_rate=4", "model.options.block_config=(1, 1)", "model.options.stem_channels=4",
    "train.batch_size=4", "train.steps_per_epoch=4", "train.epochs=3", "train.log_every_steps=2", "mesh.data=1",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_overrides(phantom_data):
    """Overrides of `demo:32` that make a run of 12 steps."""
    return [f"data.data_dir={phantom_data}", *TINY]


@pytest.fixture
def tiny(tiny_overrides):
    """`tiny(*overrides) -> config`."""
    return lambda *more: configs.load_config("demo:32", [*tiny_overrides, *more])


@pytest.fixture
def shallow_branches(monkeypatch):
    """FHRNet's small branches without their last stage: they compile in half the time."""
    from cxrjax.models import fhrnet

    small = fhrnet.HRNETS["hrnet_small"]
    shallow = dataclasses.replace(small, options={**small.options, "num_modules": (1, 1)})
    monkeypatch.setitem(fhrnet.HRNETS, "hrnet_small", shallow)


@pytest.fixture(scope="module")
def six_classes(tmp_path_factory):
    """A prepared mixture in which every Covid-19 image, and no other, has a bright edge: the `--data-dir`."""
    import cv2
    import numpy as np

    from cxrjax.findings import SIX_CLASS
    from tfds_builders.prepare import prepare

    source, data = tmp_path_factory.mktemp("six"), tmp_path_factory.mktemp("data")
    rng, number = np.random.default_rng(2), 0
    for split, count in (("train", 4), ("validation", 2), ("test", 6)):
        for name in SIX_CLASS:
            for _ in range(2 * count if name == "Covid-19" else count):
                number += 1
                image = rng.integers(0, 120, (32, 32)).astype(np.uint8)
                covid = name == "Covid-19"
                image[:3] += np.uint8(100 * covid)
                path = source / split / name / (f"covid{number}.png" if covid else f"{number:08}_000.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
    prepare("six_class", source=source, data_dir=data, size=32)
    return data
