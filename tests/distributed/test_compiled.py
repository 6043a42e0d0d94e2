"""What is compiled is kept where the run is, unless the user says otherwise."""

import os
import subprocess
import sys

import jax
import pytest

from cxrjax.distributed.runtime import enable_compilation_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")


@pytest.fixture
def unset():
    """No cache is named, as in a shell that says nothing of it."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("unset")
@pytest.mark.filterwarnings("default")
def test_what_the_user_says_holds(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    enable_compilation_cache(tmp_path / "off")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    enable_compilation_cache(tmp_path / "on")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "on")
    enable_compilation_cache(tmp_path / "another")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "on")


def test_a_second_start_compiles_nothing_anew(tiny_overrides, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    more = ("optimizer.schedule=constant", "optimizer.warmup=0", "train.steps_per_epoch=1")

    def start(epochs):
        words = [f"--config.{word}" for word in (*tiny_overrides, *more, f"train.epochs={epochs}")]
        command = [sys.executable, "-m", "cxrjax.cli.main", "train", "--config", "demo:32", "--workdir", str(tmp_path)]
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {file.name for file in (tmp_path / "cache").glob("*-cache")}

    first = start(1)
    assert {"jit_step", "jit_predict"} <= {name.partition("-")[0] for name in first}
    assert start(2) == first
