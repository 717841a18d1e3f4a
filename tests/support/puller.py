"""A pull producer that writes 5 MB and closes the connection."""

from __future__ import annotations

from typing import Any


class Puller:
    """A pull producer for the transport of a protocol."""

    CONTENT = b"x" * 5_000_000
    _PIECE = 10_000

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._sent = 0

    @classmethod
    def start(cls, protocol: Any) -> None:
        """Register a Puller with the transport of a protocol."""
        protocol.transport.registerProducer(cls(protocol.transport), False)

    def resumeProducing(self) -> None:
        """Write the next piece, or close after the last one."""
        if self._sent == len(self.CONTENT):
            self._transport.unregisterProducer()
            self._transport.loseConnection()
            return
        self._transport.write(self.CONTENT[self._sent : self._sent + self._PIECE])
        self._sent += self._PIECE

    def stopProducing(self) -> None:
        """Do nothing: nothing is held."""
