"""Compiled programs, kept from one start to the next."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax


def keep_compiled(directory: Path) -> None:
    """Keep what is compiled from here on in `directory`, and take from there what was compiled before.

    Where JAX_COMPILATION_CACHE_DIR names a place, that one is used; JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    Processes may share a directory at the same time.
    """
    settings: Any = jax.config  # a type checker does not know what it has
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # start-up compiles many small ones
    # An entry that a kill cut short, or that a full disk refused, is compiled anew.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
