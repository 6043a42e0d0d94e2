"""What a run's files say of its network, without its data."""

import json
from pathlib import Path

import jax.numpy as jnp

from cxrjax.config import Config
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.inputs import NAMED
from cxrjax.models.network import Network


def network_of(config: Config, classes: int) -> Network:
    """The network that a config describes, with random initial values."""
    model = config.model
    return Network.of(
        create(
            model.name,
            classes=classes,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
            seed=config.seed,
            inputs=NAMED[model.inputs] if model.inputs else None,
            **model.options.to_dict(),
        )
    )


def findings_of(directory: Path) -> tuple[str, ...]:
    """The names of a run's outputs.

    Raises:
      CxrError: `run.json` is missing or damaged.
    """
    try:
        return tuple(json.loads((directory / "run.json").read_text())["findings"])
    except (OSError, ValueError, KeyError) as error:
        raise CxrError(f"{directory / 'run.json'} cannot be read ({error}): train the run again") from None
