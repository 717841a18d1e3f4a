"""A service manager: a NOTIFY_SOCKET that records its messages."""

import socket
import threading

from tests.support.deadline import DEADLINE


class Manager:
    """A NOTIFY_SOCKET, and every message that came through it, in order."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        while message := self._socket.recv(4097):
            self.messages.append(message.decode())

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.path)
        self._thread.join(DEADLINE)
        self._socket.close()
