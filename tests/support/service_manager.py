"""A fake service manager: a NOTIFY_SOCKET like that of systemd, and its received messages."""

import re
import select
import socket
import threading
import time

from tests.support.deadline import DEADLINE


class ServiceManager:
    """A NOTIFY_SOCKET at a path, or at an abstract name after `@`.

    `messages` has every message in order, and `times` the time of reading each, from time.monotonic(). A thread reads
    them; with `busy`, they are read only when the test calls `received`, so that the queue of the socket can fill.
    """

    def __init__(self, address: str, *, busy: bool = False) -> None:
        self.address = address
        self.messages: list[str] = []
        self.times: list[float] = []
        self._asked = 0  # the number of messages returned to the test
        self._name = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._name)
        self._thread: threading.Thread | None = None
        if not busy:
            self._thread = threading.Thread(target=self._read_all, daemon=True)
            self._thread.start()

    def received(self) -> list[str]:
        """Return the messages since the last call, or since the message that `wait` returned."""
        if self._thread is None:
            while select.select([self._socket], [], [], 0)[0]:
                self._read()
        new = self.messages[self._asked :]
        self._asked += len(new)
        return new

    def wait(self, pattern: str) -> str:
        """Return the next message that matches; skip earlier ones."""
        end = time.monotonic() + DEADLINE
        pause = threading.Event()
        while time.monotonic() < end:
            start = self._asked
            for count, message in enumerate(self.received(), start + 1):
                if re.search(pattern, message):
                    self._asked = count
                    return message
            pause.wait(0.02)
        raise AssertionError(f"no {pattern!r} in {self.messages}")

    def has(self, pattern: str, since: int = 0) -> bool:
        """Return whether a message matches, from index `since` on."""
        return any(re.search(pattern, message) for message in self.messages[since:])

    def close(self) -> None:
        """Close the socket; later senders are refused."""
        if self._thread is not None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"", self._name)
            self._thread.join(DEADLINE)
        self._socket.close()

    def _read_all(self) -> None:
        while self._read():
            pass

    def _read(self) -> bool:
        if message := self._socket.recv(4097):
            self.times.append(time.monotonic())
            self.messages.append(message.decode())
        return bool(message)
