"""A protocol that sends its option, a path."""

from pathlib import Path

from twisted.internet.protocol import Protocol


class Shows(Protocol):
    def __init__(self, path: Path):
        self.path = path

    def connectionMade(self):
        self.transport.write(bytes(self.path))
        self.transport.loseConnection()
