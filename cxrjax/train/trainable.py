"""Which parameters learn, and how fast each does: freezing, and rates layer by layer."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cxrjax.errors import CxrError
from cxrjax.models.network import Network

if TYPE_CHECKING:  # a step can be measured where configs cannot be read
    from cxrjax.config import Config

Path = tuple[Any, ...]
HEAD = "classifier"
BACKBONE = "backbone"  # stands for every module but the head


@dataclass(frozen=True)
class TrainableParams:
    """What of a network learns.

    Attributes:
      factors: for each parameter that learns, by its path in the nested dicts: what its rate is multiplied by.
      backbone_in_training: whether features are computed as in training (statistics of the batch, stochastic depth);
        False leaves running statistics as they are, and computes features as at inference.
    """

    factors: Mapping[Path, float]
    backbone_in_training: bool = True

    @classmethod
    def from_config(cls, network: Network, config: "Config") -> "TrainableParams":
        """What a config says of a network.

        Args:
          network: whose parameters are meant.
          config: the whole config; `train.freeze`, `train.statistics` and `optimizer.rates` are read.

        Raises:
          CxrError: a module that the network does not have, nothing left to learn, or a rate below 0.
        """
        frozen = _listed(config.train.freeze)
        rates = _rates(config.optimizer.rates)
        paths: Any = list(flatten_dict(network.params))
        for key, names in (("train.freeze", frozen), ("optimizer.rates", rates)):
            _known(key, names, paths)
        factors = {
            path: _most_specific(path, rates) for path in paths if not any(_within(path, name) for name in frozen)
        }
        if not factors:
            raise CxrError(f"config key train.freeze = {config.train.freeze!r} leaves nothing to learn")
        follows = BACKBONE not in frozen
        return cls(factors, {"auto": follows, "batch": True, "frozen": False}[config.train.statistics])

    def frozen_modules(self, params: Any) -> list[str]:
        """The top-level modules of which nothing learns."""
        return [str(name) for name in params if not any(path[0] == name for path in self.factors)]

    def split(self, params: Any) -> tuple[Any, Any]:
        """Nested dicts of the parameters that learn, and of the others."""
        flat: Any = flatten_dict(params)
        learning = {path: array for path, array in flat.items() if path in self.factors}
        frozen = {path: array for path, array in flat.items() if path not in self.factors}
        return unflatten_dict(learning), unflatten_dict(frozen)

    def join(self, learning: Any, frozen: Any) -> Any:
        """The inverse of `split`."""
        return unflatten_dict(flatten_dict(learning) | flatten_dict(frozen))

    def scale(self, direction: Any) -> Any:
        """An update of the learning parameters, each times its factor."""
        flat: Any = flatten_dict(direction)
        return unflatten_dict(
            {path: d if self.factors[path] == 1 else d * jnp.asarray(self.factors[path], d.dtype)
             for path, d in flat.items()}
        )  # fmt: skip


def all_trainable(network: Network) -> TrainableParams:
    """All parameters learn at the same rate."""
    return TrainableParams(dict.fromkeys(flatten_dict(network.params), 1.0))


def _within(path: Path, name: str) -> bool:
    """Whether a parameter lies in a module, named by its dotted path."""
    if name == BACKBONE:
        return path[0] != HEAD
    parts = name.split(".")
    return list(map(str, path[: len(parts)])) == parts


def _most_specific(path: Path, rates: Mapping[str, float]) -> float:
    """The factor of the longest name that holds the parameter; "backbone" is the shortest."""
    named = [name for name in rates if _within(path, name)]
    return float(rates[max(named, key=lambda name: 0 if name == BACKBONE else name.count(".") + 1)]) if named else 1.0


def _known(key: str, names: Iterable[str], paths: list[Path]) -> None:
    for name in names:
        if not any(_within(path, name) for path in paths):
            modules = [BACKBONE, *dict.fromkeys(str(path[0]) for path in paths)]
            near = get_close_matches(name, modules, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise CxrError(
                f"config key {key} names {name}, which this network does not have: {hint}"
                f"Its modules are {', '.join(modules)}, and those inside them by dotted names"
            )


def _listed(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def _rates(text: str) -> dict[str, float]:
    rates: dict[str, float] = {}
    for entry in _listed(text):
        name, _, number = (part.strip() for part in entry.partition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf:
            raise CxrError(
                f"config key optimizer.rates: {entry!r} must read MODULE=FACTOR, with a factor above 0; "
                "train.freeze stops a module from learning"
            )
        if name in rates:
            raise CxrError(f"config key optimizer.rates names {name} twice: keep one")
        rates[name] = factor
    return rates
