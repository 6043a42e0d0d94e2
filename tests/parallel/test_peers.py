"""Processes that wait for each other before they start, and notice when one of them ends."""

import queue
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cxrjax.errors import CxrError
from cxrjax.parallel.peers import Watch, listening, meet

KEY = b"0123456789abcdef"


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


class Watching:
    """Watches of three processes, within this one; `told[k]` is what process k is told."""

    def __init__(self):
        self.told = [queue.SimpleQueue() for _ in range(3)]
        self.watches = [Watch(number, self.told[number].put) for number in range(3)]
        self.server = listening(0)
        self.watches[0].host(self.server, KEY)
        self.connections = [self.connect() for _ in range(2)]
        for watch, connection in zip(self.watches[1:], self.connections, strict=True):
            watch.join(connection, KEY)
        while len(self.watches[0].present) < 2:
            time.sleep(0.01)

    def connect(self) -> socket.socket:
        return socket.create_connection(("localhost", self.server.getsockname()[1]))

    def end(self, number: int) -> None:
        """What the system does for a process that ends: its connections are closed."""
        self.connections[number - 1].shutdown(socket.SHUT_RDWR)


def test_all_are_told_which_process_ended():
    three = Watching()
    three.end(2)
    assert [told.get(timeout=20) for told in three.told[:2]] == [2, 2]


def test_who_left_is_not_missed():
    three = Watching()
    three.watches[2].leave()
    three.end(2)
    three.end(1)  # what all are told of is the second
    assert three.told[0].get(timeout=20) == 1
    assert three.told[0].empty()


@pytest.mark.parametrize("words", [b"", b"le"])
def test_process_0_is_missed(words):
    told = queue.SimpleQueue()
    with listening(0) as server:
        Watch(1, told.put).join(socket.create_connection(("localhost", server.getsockname()[1])), KEY)
        with server.accept()[0] as connection:
            assert connection.recv(len(KEY) + 4, socket.MSG_WAITALL) == KEY + bytes([0, 0, 0, 1])
            connection.sendall(words)
    assert told.get(timeout=20) == 0


def test_who_has_not_the_key_is_not_listened_to():
    three = Watching()
    for said in (b"", b"GET / HTTP/1.1", bytes(len(KEY)) + bytes([0, 0, 0, 1])):
        with three.connect() as stranger:
            stranger.sendall(said)
    three.end(1)  # heard after them
    assert [three.told[number].get(timeout=20) for number in (0, 2)] == [1, 1]


ENDING = """
import threading, time
from cxrjax.parallel import peers

peers.GRACE, unless = 0.2, threading.Event()
peers.end_soon("process 1 of 2 ended", unless)
{then}
time.sleep({seconds})
print("by itself")
"""


@pytest.mark.parametrize(("then", "seconds", "code"), [("", 600, 1), ("unless.set()", 1, 0)])
def test_a_process_that_waits_in_vain_ends_with_a_message(then, seconds, code):
    program = [sys.executable, "-c", ENDING.format(then=then, seconds=seconds)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code
    assert ended.stderr.strip() == ("cxrjax: process 1 of 2 ended" if code else "")
    assert ended.stdout.strip() == ("" if code else "by itself")
