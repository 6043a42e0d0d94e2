"""Processes on the network, beside JAX: they meet before it starts, and notice at once when one of them ends.

JAX's own client ends the program where it cannot connect, and a collective may wait for ever for a process that died:
JAX then ends the others after `runtime.HEARTBEAT` seconds, with a stack of its own. Here the system tells: it closes a
process's connections however the process ends. Of a machine that vanishes, or a process that hangs, nothing is heard.
"""

import os
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from cxrjax.console import stderr
from cxrjax.errors import CxrError

GRACE = 10
"""Seconds in which a process may still end with an error of its own, once another one is gone."""

HERE = 5
"""Seconds between two signs of life."""

SILENCE = 30
"""Seconds without one, after which a process is lost."""

_ALL = "all are there"
_OURS = "cxrjax: "
"""What process 0 says begins with it; whatever else may listen at its port does not."""
_LEFT, _HERE = b"left", b"here"


def meet(host: str, port: int, processes: int, process: int, timeout: int) -> None:
    """Wait until all processes are there, or say which are not: JAX, where it waits in vain, ends the program.

    Each tells process 0 its number, and process 0 tells all how it ended. JAX's own service has the port afterwards.

    Raises:
      CxrError: in all that came, with the numbers of those that did not; or process 0 cannot be reached.
    """
    if process:
        with reach(host, port, process, timeout) as connection:
            connection.sendall(f"{process} of {processes}\n".encode())
            connection.settimeout(timeout + 5)
            try:
                said = connection.makefile(errors="replace").readline().strip()
            except OSError as error:
                raise CxrError(f"process 0 at {host}:{port} said nothing to process {process} ({error})") from error
        if not said:
            raise CxrError(f"process 0 at {host}:{port} ended while process {process} waited for the others")
        if not said.startswith(_OURS):
            raise CxrError(f"what listens at {host}:{port} is not process 0: choose another port, or correct the host")
        if (reason := said.removeprefix(_OURS)) != _ALL:
            raise CxrError(reason)
        return
    deadline, came, differing = time.monotonic() + timeout, {}, ""
    with ExitStack() as connections:
        with listening(port) as server:  # until before the others are told: the port must be free for JAX
            while not differing and len(came) < processes - 1 and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                with suppress(OSError, ValueError):  # nobody came, or not one of us
                    connection = connections.enter_context(server.accept()[0])
                    connection.settimeout(5)
                    number, total = map(int, connection.makefile().readline().split(" of "))
                    if total != processes:
                        differing = f"process {number} was told of {total} processes, process 0 of {processes}"
                    if 0 < number < processes or differing:
                        came[number] = connection
        missing = [str(number) for number in range(1, processes) if number not in came]
        if differing:
            said = f"{differing}: give all of them the same number"
        elif missing:
            said = (
                f"process {', '.join(missing)} of {processes} did not come to {host}:{port} within {timeout} s: look "
                "at what it said, or whether it was started"
            )
        else:
            said = _ALL
        for connection in came.values():
            with suppress(OSError):
                connection.sendall(f"{_OURS}{said}\n".encode())
    if said != _ALL:
        raise CxrError(said)


def listening(port: int) -> socket.socket:
    """A server at the port, of either family; 0 takes a free one."""
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise CxrError(f"process 0 cannot listen at port {port} ({error}): choose another port") from error


def reach(host: str, port: int, process: int, timeout: int) -> socket.socket:
    """Wait until process 0 listens: JAX's own client ends the program where it cannot connect."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise CxrError(
                    f"process {process} could not reach process 0 at {host}:{port} within {timeout} s ({error}): check "
                    "that it runs there and that the port is open"
                ) from error
        time.sleep(0.2)


class Watch:
    """A thread that knows who is there, for as long as this process lives.

    Every process holds a connection to process 0, which tells the others whose was closed, or says nothing any more.
    Who left is not missed.
    """

    def __init__(self, process: int, processes: int, gone: Callable[[int, bool], None]):
        """`gone` is told, once, the number of a process that ends without having left, and whether it said nothing."""
        self._process, self._processes, self._gone = process, processes, gone
        self._selector = selectors.DefaultSelector()
        self._connections: dict[socket.socket, int] = {}
        self._heard: dict[socket.socket, float] = {}
        self._left: set[int] = set()
        self._told = False

    def host(self, server: socket.socket, key: bytes) -> None:
        """Begin as process 0: the others come to `server` and show the first half of the key."""
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ, partial(self._admit, server, key))
        threading.Thread(target=self._run, daemon=True).start()

    def join(self, connection: socket.socket, key: bytes) -> None:
        """Begin as another process.

        Raises:
          OSError: whoever answers is not process 0, which shows the second half of the key.
        """
        half = len(key) // 2
        connection.settimeout(5)
        connection.sendall(key[:half] + self._process.to_bytes(4))
        if not secrets.compare_digest(_read(connection, len(key) - half), key[half:]):
            raise OSError("what answers there is not process 0")
        self._add(connection, 0)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def present(self) -> dict[socket.socket, int]:
        """Who is there, but for this process: the numbers by their open connections."""
        return dict(self._connections)

    def leave(self) -> None:
        """Tell the others that this process ends, and that nothing is lost by it."""
        self._tell(_LEFT)

    def go(self, patience: float) -> None:
        """Before this process ends at once. Process 0 goes last: when it is gone, JAX ends the others with a stack."""
        if not self._process:
            self._tell((0).to_bytes(4))
            end = time.monotonic() + patience
            while self._connections and time.monotonic() < end:
                time.sleep(0.02)

    def _run(self) -> None:
        looked = spoke = time.monotonic()
        while True:
            for ready, _ in self._selector.select(HERE / 2):
                ready.data()
            now = time.monotonic()
            if now - looked > SILENCE / 2:  # this process was stopped, and perhaps all: each is given new time
                self._heard = dict.fromkeys(self._heard, now)
            if now - spoke >= HERE:
                self._tell(_HERE)
                spoke = now
            for connection, number in self.present.items():
                if now - self._heard[connection] > SILENCE:
                    self._lost(number, silently=True)
            looked = now

    def _admit(self, server: socket.socket, key: bytes) -> None:
        half = len(key) // 2
        with suppress(OSError):
            connection = server.accept()[0]
            connection.settimeout(5)
            said = _read(connection, half + 4)
            number = int.from_bytes(said[half:])
            if secrets.compare_digest(said[:half], key[:half]) and 0 < number < self._processes:
                self._add(connection, number)
                connection.sendall(key[half:])
            else:
                connection.close()
        if len(self._connections) == self._processes - 1:
            self._selector.unregister(server)
            server.close()

    def _add(self, connection: socket.socket, number: int) -> None:
        connection.settimeout(None)
        self._heard[connection] = time.monotonic()
        self._connections[connection] = number
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, connection))

    def _hear(self, connection: socket.socket) -> None:
        """That the process at its other end is there, or leaves, which one is gone, or nothing: then it is that one."""
        number = self._connections[connection]
        self._heard[connection] = time.monotonic()
        try:
            said = _read(connection, 4)
        except OSError:
            said = b""
        if said == _LEFT:
            self._left.add(number)
        elif said == _HERE:
            return
        elif len(said) == 4:
            self._lost(int.from_bytes(said), silently=False)
        else:
            self._selector.unregister(connection)
            del self._connections[connection], self._heard[connection]
            connection.close()
            self._lost(number, silently=True)

    def _lost(self, number: int, *, silently: bool) -> None:
        if not self._told and number not in self._left:
            self._told = True
            if not self._process:
                self._tell(number.to_bytes(4))
            self._gone(number, silently)

    def _tell(self, word: bytes) -> None:
        for connection in self.present:
            with suppress(OSError):
                connection.sendall(word)


def _read(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer where there are no more."""
    said = b""
    while len(said) < size and (more := connection.recv(size - len(said))):
        said += more
    return said


class Ending:
    """A thread that ends this process when another one is lost: what the main thread waits for may never come."""

    def __init__(self, message: Callable[[int], str], last: Callable[[], None] = lambda: None):
        """`message` says what is lost with a process; `last` is called before the end."""
        self._message, self._last = message, last
        self._lost: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._prevented = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()  # now: no thread starts while Python shuts down

    def soon(self, lost: int, silently: bool) -> None:
        """End after `GRACE` seconds, if this process has not ended by itself.

        At once where process 0 ended silently: as soon as JAX misses it, JAX ends the others with a stack.
        """
        self._lost.put((lost, GRACE if lost or not silently else 0))

    def prevent(self) -> None:
        """This process ends by itself."""
        self._prevented.set()

    def _run(self) -> None:
        lost, grace = self._lost.get()
        if not self._prevented.wait(grace):
            try:
                stderr.print(f"cxrjax: {self._message(lost)}", style="red", soft_wrap=True)
                self._last()
            finally:
                os._exit(1)
