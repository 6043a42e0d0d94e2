"""Comparisons with PyTorch's own networks; they skip where it is not installed (`uv sync --group parity`)."""

import pytest

ERRORS: dict[tuple[str, str], dict[str, float]] = {}


@pytest.fixture
def report_errors(name):
    """`report_errors(kind, errors)` adds a row of a network's errors by name to the table after the session."""
    return lambda kind, errors: ERRORS.__setitem__((name, kind), errors)


def pytest_terminal_summary(terminalreporter):
    """Print the errors of our networks, and of PyTorch's float32 against its float64, as one table."""
    if not ERRORS:
        return
    columns = list(next(iter(ERRORS.values())))
    terminalreporter.section("relative errors against PyTorch")
    terminalreporter.write_line(" " * 36 + "".join(f"{column:>17}" for column in columns))
    for (network, kind), errors in ERRORS.items():
        row = "".join(f"{errors[column]:>17.1e}" for column in columns)
        terminalreporter.write_line(f"{network:<18}{kind:<18}{row}")
