"""Runs small enough for tests: a tiny network on a tiny phantom."""

import pytest

from cxrjax import config as configs

TINY = (
    "data.stored=32", "data.threads=1", "split.name=random", "split.fractions=(0.5, 0.25, 0.25)",
    "model.options.growth=4", "model.options.blocks=(1, 1)", "model.options.stem_channels=4", "train.batch=4",
    "train.steps_per_epoch=4", "train.epochs=3", "train.log_every=2", "mesh.data=1",
)  # fmt: skip


@pytest.fixture
def tiny_overrides(phantom_data):
    """Overrides of `demo:32` that make a run of 12 steps."""
    return [f"data.dir={phantom_data}", *TINY]


@pytest.fixture
def tiny(tiny_overrides):
    """`tiny(*overrides) -> config`."""
    return lambda *more: configs.load("demo:32", [*tiny_overrides, *more])
