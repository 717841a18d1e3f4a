"""Attributes and methods that a TLS transport has for its protocol, with either TLS library."""

from __future__ import annotations

from typing import Any, Protocol


class TLSFacts(Protocol):
    """The facts about the TLS of a connection."""

    @property
    def handle(self) -> Any:
        """The library's object."""

    @property
    def peer_certificate(self) -> Any: ...

    @property
    def negotiated_protocol(self) -> bytes | None: ...

    @property
    def version(self) -> str | None: ...

    @property
    def cipher(self) -> str | None: ...


class NoTLSFacts:
    """The TLSFacts of a connection in TLS that has none: they are all None."""

    handle = peer_certificate = negotiated_protocol = version = cipher = None


# The handshake is not done; the TLS that there was is gone.
TLS_PENDING, TLS_GONE = NoTLSFacts(), NoTLSFacts()
