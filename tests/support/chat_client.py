"""A client of the chat in a real service."""

import socket

from tests.support.deadline import DEADLINE
from tests.support.processes import accepted_by


class ChatClient:
    """A blocking client of the chat."""

    def __init__(self, port: int, greeting: bytes = b"* your nickname?\r\n") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.received = b""
        self.wait_for_text(greeting)

    def worker(self, pids: list[int]) -> int:
        """Return which of these processes serves it."""
        return next(pid for pid in pids if accepted_by(pid, [self.socket]))

    def send(self, *lines: str) -> None:
        self.socket.sendall("".join(f"{line}\n" for line in lines).encode())

    def wait_for(self, *lines: str) -> None:
        """Read until these successive lines are received; they and everything before are removed."""
        self.wait_for_text("".join(f"{line}\r\n" for line in lines).encode())

    def wait_for_text(self, text: bytes) -> None:
        while text not in self.received:
            data = self.socket.recv(1 << 16)
            assert data, f"{text!r} expected, received {self.received!r}"
            self.received += data
        self.received = self.received.partition(text)[2]

    def answer(self, line: str) -> str:
        """Send a command, and return the next line that is received, without the notice of a gap."""
        self.send(line)
        while True:
            while b"\r\n" not in self.received:
                data = self.socket.recv(1 << 16)
                assert data
                self.received += data
            text, _, self.received = self.received.partition(b"\r\n")
            if text != b"* lines may be missing":
                return text.decode()
