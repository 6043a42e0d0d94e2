"""What a config may say about a network: one choice of several, a positive whole number, a share, or options."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from cxrjax.errors import CxrError


def one_of(what: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is one of `known`; else a `CxrError` that names the nearest known one.

    Args:
      what: what is being chosen, for the message ("network", "option of densenet_small").
      value: the choice.
      known: all right choices.
    """
    known = sorted(known)
    if value in known:
        return value
    nearest = get_close_matches(str(value), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise CxrError(f"unknown {what} {value!r}: {hint}known are {', '.join(known) or 'none'}")


_COMMON = {"self", "classes", "inputs", "dtype", "remat", "seed"}


def check_options(of: str, options: Iterable[str], family: Callable) -> None:
    """Refuse options that a family of networks does not have; `of` is what they are options of, for the message."""
    known = set(inspect.signature(family.__init__).parameters) - _COMMON
    for option in options:
        one_of(f"option of {of}", option, known)


def positive(what: str, value: int) -> int:
    """`value`, if it is a whole number above 0; else a `CxrError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CxrError(f"{what} must be a whole number above 0, not {value!r}")
    return value


def share(what: str, value: float) -> float:
    """`value` as a float, if it is a number at least 0 and below 1; else a `CxrError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise CxrError(f"{what} must be at least 0 and below 1, not {value!r}")
    return float(value)
