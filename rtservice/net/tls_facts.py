"""The facts about its TLS that a transport provides to its protocol, with either TLS library."""

from __future__ import annotations

from typing import Any, Protocol


class TLSFacts(Protocol):
    """The facts about the TLS of a connection."""

    @property
    def handle(self) -> Any:
        """The library's connection object."""

    @property
    def peer_certificate(self) -> Any: ...

    @property
    def negotiated_protocol(self) -> bytes | None: ...

    @property
    def version(self) -> str | None: ...

    @property
    def cipher(self) -> str | None: ...


class NoTLSFacts:
    """The TLSFacts of a connection before or after TLS: all None."""

    handle = peer_certificate = negotiated_protocol = version = cipher = None


# Before the end of the handshake; after the end of TLS.
TLS_PENDING, TLS_GONE = NoTLSFacts(), NoTLSFacts()
