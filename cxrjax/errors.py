"""The one kind of error that a user can mend."""

import inspect
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class CxrError(Exception):
    """Bad input: one clear line that names the file, key or row at fault, and the mend.

    The command line prints the message without a traceback and exits with code 1.
    """


class InterruptedRunError(CxrError):
    """The work was told to stop, saved its state, and goes on when started again. `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def out_of_memory(error: BaseException | None) -> str:
    """What a device said of the memory that it did not have, in a few words; empty for any other error."""
    asked = asked_bytes(error)
    return f"{asked / 1e9:.3g} GB" if asked else _refusal(error).partition("RESOURCE_EXHAUSTED: ")[2][:100]


def asked_bytes(error: BaseException | None) -> int:
    """How much memory was asked for where a device or a compiler had too little; 0 for any other error."""
    known = _ASKED.search(_refusal(error))
    if known is None:
        return 0
    number, unit = (each for each in known.groups() if each)
    return round(float(number) * _UNITS[unit[0]])


def _refusal(error: BaseException | None) -> str:
    while error is not None:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text and "No space left on device" not in text:  # which is said of disks
            return text
        error = error.__cause__ or error.__context__
    return ""


_ASKED = re.compile(
    r"allocat\D*?(\d[\d.]*) ?(bytes|[KMGT]i?B)|[Uu]sed (\d[\d.]*)([KMGT]) of [\d.]+[KMGT]"
    r"|memory required for [^(]*\((\d[\d.]*)([KMGT])\)"
)
_UNITS = {"b": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


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
