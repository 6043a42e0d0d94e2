"""Comparisons with PyTorch's own networks; they skip where it is not installed (`uv sync --group peers`)."""

import pytest

ERRORS: dict[str, dict[str, float]] = {}


@pytest.fixture
def report_errors(request):
    """`report_errors(errors)` puts a test's errors, by name, into the table at the end of the session."""
    return lambda errors: ERRORS.__setitem__(request.node.callspec.id, errors)


def pytest_terminal_summary(terminalreporter):
    """How far apart the two are, as one table."""
    if not ERRORS:
        return
    columns = list(next(iter(ERRORS.values())))
    terminalreporter.section("relative errors against PyTorch")
    terminalreporter.write_line(" " * 24 + "".join(f"{column:>16}" for column in columns))
    for case, errors in ERRORS.items():
        terminalreporter.write_line(f"{case:<24}" + "".join(f"{errors[column]:>16.1e}" for column in columns))
