"""Progress bars show progress and the time left."""

import io

import pytest
from rich.console import Console

from cxrjax import console


@pytest.fixture
def terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=file, force_terminal=True, width=120))
    return file


def test_bar_shows_progress_and_time_left(terminal):
    with console.progress_bar("making", 3, start=1) as advance:
        advance()
    assert "making" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()
    assert "ETA" in terminal.getvalue()


def test_empty_task_has_no_bar(terminal):
    with console.progress_bar("checking", 0):
        pass
    assert "checking" not in terminal.getvalue()
