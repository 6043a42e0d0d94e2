"""The one kind of error that a user can mend."""

import re


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
