"""What a run's files hold of its network, without its data."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cxrjax.config import Config, read
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import INPUT_SPECS
from cxrjax.models.network import Network
from cxrjax.train.checkpoint import Checkpoints


def network_of(config: Config, classes: int) -> Network:
    """The network that a config describes, with random initial values."""
    model = config.model
    return Network.from_model(
        create(
            model.name,
            classes=classes,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
            seed=config.seed,
            input_spec=INPUT_SPECS[model.inputs] if model.inputs else None,
            **model.options.to_dict(),
        )
    )


def best_network(directory: Path) -> tuple[Config, tuple[str, ...], Network, dict[str, Any]]:
    """A run's config, the names of its outputs, its best network, and what was noted with that (step, val_loss, ...).

    Raises:
      CxrError: not a run, or one without a checkpoint; or converted weights lie there too.
    """
    if (directory / "card.json").exists():
        raise CxrError(f"{directory} holds a run and converted weights: move one of them away")
    config, findings = read(directory / "config.json"), findings_of(directory)
    network = network_of(config, len(findings))
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        best, about = checkpoints.restore_best({"params": network.params, "stats": network.stats})
    return config, findings, Network(best["params"], best["stats"], network.definition), about


def findings_of(directory: Path) -> tuple[str, ...]:
    """The names of a run's outputs.

    Raises:
      CxrError: `run.json` is missing or damaged.
    """
    try:
        return tuple(json.loads((directory / "run.json").read_text())["findings"])
    except (OSError, ValueError, KeyError) as error:
        raise CxrError(f"{directory / 'run.json'} cannot be read ({error}): train the run again") from None
