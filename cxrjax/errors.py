"""The one kind of error that a user can mend."""

import re


class CxrError(Exception):
    """Bad input: one clear line that names the file, key or row at fault, and the mend.

    The command line prints the message without a traceback and exits with code 1.
    """


def out_of_memory(error: BaseException | None) -> str:
    """What a device said of the memory that it did not have, in a few words; empty for any other error."""
    while error is not None:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text and "No space left on device" not in text:  # which is said of disks
            known = re.search(
                r"allocat\D*?(\d[\d.]*) ?(bytes|[KMGT]i?B)|[Uu]sed (\d[\d.]*)([KMGT]) of [\d.]+[KMGT]", text
            )
            if known is None:
                return text.partition("RESOURCE_EXHAUSTED: ")[2][:100]
            number, unit = (known[1], known[2]) if known[1] else (known[3], known[4])
            return f"{float(number) * _UNITS[unit[0]] / 1e9:.3g} GB"
        error = error.__cause__ or error.__context__
    return ""


_UNITS = {"b": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
