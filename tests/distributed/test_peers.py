"""Processes that wait for each other before they start, and notice when one of them ends."""

import queue
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from cxrjax.distributed import peers
from cxrjax.distributed.peers import Watch, listening, meet
from cxrjax.errors import CxrError

KEY = b"0123456789abcdef"
HALF = len(KEY) // 2


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


def test_who_was_told_of_another_number_is_named():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(meet, "localhost", port, 2, 0, 20), pool.submit(meet, "localhost", port, 3, 1, 20)]
        said = [str(future.exception()) for future in futures]
    assert said == ["process 1 was told of 3 processes, process 0 of 2: give all of them the same number"] * 2


@pytest.mark.parametrize(("answer", "said"), [(b"<!DOCTYPE HTML>\xff\n", "is not process 0"), (b"", "ended while"),
                                              (None, "said nothing")])  # fmt: skip
def test_what_answers_at_its_port_may_not_be_process_0(answer, said):
    with socket.create_server(("localhost", 0)) as other, ThreadPoolExecutor(1) as pool:
        port = other.getsockname()[1]
        waiting = pool.submit(meet, "localhost", port, 2, 1, -4)
        connection = other.accept()[0]
        connection.recv(100)
        if answer is not None:
            connection.sendall(answer)
            connection.close()
        assert isinstance(waiting.exception(), CxrError)
        assert f"localhost:{port}" in str(waiting.exception())
        assert said in str(waiting.exception())
        connection.close()


class Watching:
    """Watches of three processes, within this one; `told[k]` is what process k is told."""

    def __init__(self):
        self.told = [queue.SimpleQueue() for _ in range(3)]
        self.watches = [
            Watch(number, 3, lambda gone, silently, told=self.told[number]: told.put((gone, silently)))
            for number in range(3)
        ]
        self.server = listening(0)
        self.port = self.server.getsockname()[1]
        self.watches[0].host(self.server, KEY)

    def join(self, number: int) -> None:
        self.watches[number].join(self.connect(), KEY)

    def connect(self) -> socket.socket:
        return socket.create_connection(("localhost", self.port))

    def end(self, number: int) -> None:
        """What the system does for a process that ends: its connections are closed."""
        for connection in self.watches[number].present:
            with suppress(OSError):  # which the other end has closed
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def three():
    watching = Watching()
    watching.join(1)
    watching.join(2)
    until(lambda: len(watching.watches[0].present) == 2)
    yield watching
    watching.end(1)
    watching.end(2)
    until(lambda: not watching.watches[0].present)


def until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_are_told_which_process_ended(three):
    three.end(2)
    assert three.told[0].get(timeout=20) == (2, True)
    assert three.told[1].get(timeout=20) == (2, False)


def test_who_left_is_not_missed(three):
    three.watches[2].leave()
    three.end(2)
    until(lambda: len(three.watches[0].present) == 1)
    three.end(1)  # the first that anybody is told of
    assert three.told[0].get(timeout=20) == (1, True)


@pytest.fixture
def soon(monkeypatch):
    """Silence is noticed after two seconds."""
    monkeypatch.setattr(peers, "HERE", 0.1)
    monkeypatch.setattr(peers, "SILENCE", 2)


def test_who_hangs_is_missed(soon):
    watching = Watching()
    watching.join(1)
    with watching.connect() as hanging:  # it says who it is, and then nothing
        start = time.monotonic()
        hanging.sendall(KEY[:HALF] + bytes([0, 0, 0, 2]))
        assert watching.told[0].get(timeout=20) == (2, True)
        assert watching.told[1].get(timeout=20) == (2, False)
        assert time.monotonic() - start > 1.9
    watching.end(1)


def test_process_0_is_missed_when_it_hangs(soon):
    told = queue.SimpleQueue()
    with listening(0) as server:
        connection = socket.create_connection(("localhost", server.getsockname()[1]))
        with server.accept()[0] as other:
            other.sendall(KEY[HALF:])
            Watch(1, 2, lambda gone, silently: told.put((gone, silently))).join(connection, KEY)
            assert told.get(timeout=20) == (0, True)


def test_who_says_that_it_is_there_is_not_missed(soon, three):
    time.sleep(4)
    assert all(told.empty() for told in three.told)


def test_time_in_which_this_process_was_stopped_does_not_count(soon, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + clock.ahead, ahead=0)
    monkeypatch.setattr(peers, "time", clock)
    watching = Watching()
    watching.join(1)
    watching.join(2)
    until(lambda: len(watching.watches[0].present) == 2)
    clock.ahead = 3600
    time.sleep(1)
    watching.end(2)  # the first that anybody is told of
    assert watching.told[0].get(timeout=20) == (2, True)
    watching.end(1)


@pytest.mark.parametrize("words", [b"", b"le"])
def test_process_0_is_missed(words):
    told = queue.SimpleQueue()
    with listening(0) as server:
        connection = socket.create_connection(("localhost", server.getsockname()[1]))
        with server.accept()[0] as other:
            other.sendall(KEY[HALF:] + words)
            Watch(1, 2, lambda gone, silently: told.put((gone, silently))).join(connection, KEY)
            assert other.recv(HALF + 4, socket.MSG_WAITALL) == KEY[:HALF] + bytes([0, 0, 0, 1])
    assert told.get(timeout=20) == (0, True)


def test_process_0_goes_last(three):
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(three.watches[0].go, 60)
        assert [three.told[number].get(timeout=20) for number in (1, 2)] == [(0, False)] * 2
        three.end(1)
        until(lambda: len(three.watches[0].present) == 1)
        assert not going.done()
        three.end(2)
        going.result(timeout=20)


def test_process_0_does_not_wait_for_ever(three):
    three.watches[0].go(0.1)
    assert len(three.watches[0].present) == 2


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1", bytes(HALF) + bytes([0, 0, 0, 2]), KEY[:HALF] + bytes([9] * 4)]
)
def test_a_stranger_is_not_listened_to(said):
    watching = Watching()
    watching.join(1)
    with watching.connect() as stranger:
        stranger.sendall(said)
        with suppress(OSError):  # closed with what was not read
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    assert list(watching.watches[0].present.values()) == [1]
    watching.join(2)
    watching.end(2)
    assert watching.told[0].get(timeout=20) == (2, True)
    watching.end(1)


def test_who_answers_without_the_key_is_not_process_0():
    with listening(0) as server:
        connection = socket.create_connection(("localhost", server.getsockname()[1]))
        with connection, server.accept()[0] as other:
            other.sendall(b"HTTP/1.1 400 Bad Request")
            with pytest.raises(OSError, match="is not process 0"):
                Watch(1, 2, lambda gone, silently: None).join(connection, KEY)


ENDING = """
import sys, time
from cxrjax.parallel import peers

peers.GRACE = 3
ending = peers.Ending("process {{}} of 2 ended".format)
ending.soon(1, silently=True)
{then}
time.sleep({seconds})
print("by itself")
"""


@pytest.mark.parametrize(
    ("then", "seconds", "code", "said"),
    [
        ("", 600, 1, "cxrjax: process 1 of 2 ended"),
        ("sys.stderr.close()", 600, 1, ""),
        ("ending.prevent()", 4, 0, ""),
    ],
)
def test_a_process_that_waits_in_vain_ends_with_a_message(then, seconds, code, said):
    program = [sys.executable, "-c", ENDING.format(then=then, seconds=seconds)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code
    assert ended.stderr.strip() == said
    assert ended.stdout.strip() == ("" if code else "by itself")


TOGETHER = """
import os, signal, sys, time
from cxrjax.errors import CxrError
from cxrjax import cli
from cxrjax.parallel import peers, runtime

peers.GRACE = runtime.GRACE = {grace}
coordinator, number = "localhost:" + sys.argv[1], int(sys.argv[2])

def work(_):
    runtime.start(coordinator, 2, number, asks={asks})
    {work}

cli.RUN["train"] = work
sys.argv[1:] = ["train", "--config", "demo", "--workdir", "."]
cli.entry()
"""


def end_together(work: str, grace: float, *, asks: bool = True) -> list[tuple[int, str]]:
    """How two processes of the command line end, whose work is a line of Python."""
    program, port = TOGETHER.format(work=work, grace=grace, asks=asks), str(free_port())
    started = [
        subprocess.Popen([sys.executable, "-c", program, port, str(number)], stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    ended = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, said) for process, said in zip(started, ended, strict=True)]


def test_who_waits_outside_collectives_ends_too():
    (code, said), (other, _) = end_together("time.sleep(600) if number == 0 else os._exit(7)", grace=1)
    assert (code, other) == (1, 7), said
    assert "another process stopped or cannot be reached (process 1 of 2 ended or hangs)" in said


def test_a_signal_ends_work_that_does_not_ask_for_it():
    work = "os.kill(os.getpid(), signal.SIGTERM) if number else None; time.sleep(600)"
    (code, said), (other, _) = end_together(work, grace=1, asks=False)
    assert (code, other) == (1, -signal.SIGTERM), said
    assert "process 1 of 2 ended or hangs" in said


@pytest.mark.parametrize("late", [0, 1])
def test_all_may_end_by_themselves_at_different_times(late):
    wait = f"time.sleep(2 * (number == {late}))"
    ended = end_together(wait, grace=0)
    assert [code for code, _ in ended] == [0, 0], ended
    ended = end_together(f"{wait}; raise CxrError('of all')", grace=20)
    assert [(code, "cxrjax: of all" in said) for code, said in ended] == [(1, True)] * 2, ended


STEPS = """
    from cxrjax.errors import InterruptedRunError
    with runtime.interrupted_together() as received:
        for step in range(3000):
            received += runtime.told_to_stop()
            if received:
                raise InterruptedRunError(f"at step {step}", received[0])
            if step == 20 and number:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
"""


def test_ctrl_c_in_one_stops_all_at_one_step_each_with_its_own_number():
    ended = end_together(STEPS, grace=20)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM, 128 + signal.SIGINT], ended
    assert len({re.search("at step ([0-9]+)", said)[1] for _, said in ended}) == 1
