"""Processes that wait for each other before they start."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from cxrjax.errors import CxrError
from cxrjax.parallel.runtime import meet


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def together(processes: int, came: list[int], timeout: int) -> list[BaseException | None]:
    """What each of those that came ends with."""
    port = free_port()
    with ThreadPoolExecutor(len(came)) as pool:
        futures = [pool.submit(meet, "localhost", port, processes, number, timeout) for number in came]
        return [future.exception() for future in futures]


def test_all_come():
    assert together(3, [0, 2, 1], 20) == [None, None, None]


def test_those_that_came_name_the_others():
    ended = together(4, [0, 2], 1)
    assert all(isinstance(error, CxrError) for error in ended)
    assert all("process 1, 3 of 4 did not come to localhost:" in str(error) for error in ended)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other, pytest.raises(CxrError, match="cannot listen at port"):
        meet("localhost", other.getsockname()[1], 2, 0, 1)


def test_a_stranger_does_not_count():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, "localhost", port, 2, 0, 20)
        while True:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\n")
                    break
            except OSError:
                assert not first.done()
        meet("localhost", port, 2, 1, 20)
        assert first.exception() is None
