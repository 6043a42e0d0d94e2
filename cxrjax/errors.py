"""`CxrError`, the error that a user can fix, and checks of arguments that raise it."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches


class CxrError(Exception):
    """Invalid input. The message is one line that names the file, key or row and says how to fix it.

    The command line prints it without a traceback and exits with code 1.
    """


class InterruptedRunError(CxrError):
    """A signal (`number`) stopped the run after it saved its state; rerunning the command resumes it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def out_of_memory(error: BaseException | None) -> str:
    """Return the size of the allocation that failed, or a short message; empty if the error is not out-of-memory."""
    requested = requested_bytes(error)
    return f"{requested / 1e9:.3g} GB" if requested else _oom_text(error).partition("RESOURCE_EXHAUSTED: ")[2][:100]


def requested_bytes(error: BaseException | None) -> int:
    """Return the bytes that a failed allocation or compilation requested; 0 for any other error."""
    match = _REQUESTED.search(_oom_text(error))
    if match is None:
        return 0
    number, unit = filter(None, match.groups())
    return round(float(number) * _UNITS[unit[0]])


def _oom_text(error: BaseException | None) -> str:
    while error is not None:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text and "No space left on device" not in text:  # a full disk
            return text
        error = error.__cause__ or error.__context__
    return ""


_REQUESTED = re.compile(
    r"allocat\D*?(\d[\d.]*) ?(bytes|[KMGT]i?B)|[Uu]sed (\d[\d.]*)([KMGT]) of [\d.]+[KMGT]"
    r"|memory required for [^(]*\((\d[\d.]*)([KMGT])\)"
)
_UNITS = {"b": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def check_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, else raise a `CxrError` that suggests the nearest one.

    Args:
      what: what is chosen, for the message ("network", "option of densenet_small").
      value: the choice.
      choices: all valid values.
    """
    choices = sorted(choices)
    if value in choices:
        return value
    nearest = get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise CxrError(f"unknown {what} {value!r}: {hint}choose from {', '.join(choices) or 'none'}")


def check_options(what: str, options: Iterable[str], family: Callable) -> None:
    """Raise a `CxrError` for an option that the constructor of a network family lacks; `what` has the options."""
    parameters = set(inspect.signature(family.__init__).parameters) - {"self", "common"}
    for option in options:
        check_choice(f"option of {what}", option, parameters)


def check_positive(what: str, value: int) -> int:
    """Return `value` if it is an integer above 0, else raise a `CxrError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CxrError(f"{what} must be a whole number above 0, not {value!r}")
    return value


def check_fraction(what: str, value: float) -> float:
    """Return `value` as a float if it is at least 0 and below 1, else raise a `CxrError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise CxrError(f"{what} must be at least 0 and below 1, not {value!r}")
    return float(value)


def list_some(names: Sequence[str], limit: int = 5) -> str:
    """Join the first names, and say how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")
