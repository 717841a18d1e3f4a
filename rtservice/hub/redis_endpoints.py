"""Connects to the Redis that a URL names: over TCP, TLS or a UNIX socket, or to the master that sentinels name."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint
from twisted.internet.protocol import Factory

from rtservice.hub.connect_errors import ConnectFailed
from rtservice.hub.redis_url import Address, HubURL, shown_address
from rtservice.hub.resp import RedisConnection
from rtservice.hub.sentinel import Sentinels
from rtservice.hub.tls_client import TLSClientEndpoint

# Seconds to connect, TLS handshake included.
CONNECT_SECONDS = 3.0


class RedisEndpoints:
    """Creates connections; `context` is for those with TLS."""

    def __init__(self, url: HubURL, hiredis: Any, context: ssl.SSLContext | None, reactor: Any) -> None:
        self._url = url
        self._hiredis = hiredis
        self._reactor = reactor
        self._context = context
        self._sentinels: Sentinels | None = None
        if url.master:
            self._sentinels = Sentinels(url.addresses, url.sentinel_login, url.master, self._ask, reactor)
        # The server of the last connection.
        self._address: Address | None = None if url.path or url.master else url.addresses[0]

    @property
    def shown(self) -> str:
        """The server, for logs: the URL without secrets, and the master that sentinels named."""
        master = f", master {shown_address(self._address)}" if self._sentinels and self._address else ""
        return f"{self._url.shown}{master}"

    async def connect(self, on_message: Callable[[bytes, bytes], None]) -> RedisConnection:
        """Connect. Raises an exception of which `reason_of` returns the text."""
        if self._sentinels is not None:
            self._address = await self._sentinels.master()
        return await self._open(self._address, on_message)

    async def still_named(self) -> bool:
        """Return whether the sentinels, if any answers, name the server of the last connection."""
        if self._sentinels is None:
            return True
        try:
            return await self._sentinels.master() == self._address
        except ConnectFailed:
            return True

    def close(self) -> None:
        """End the connection to a sentinel."""
        if self._sentinels is not None:
            self._sentinels.close()

    async def _ask(self, address: Address) -> RedisConnection:
        """Connect to a sentinel."""
        return await self._open(address, None)

    async def _open(
        self, address: Address | None, on_message: Callable[[bytes, bytes], None] | None
    ) -> RedisConnection:
        factory = Factory.forProtocol(lambda: RedisConnection(self._hiredis, self._reactor, on_message))
        factory.noisy = False
        endpoint: Any
        if address is None:
            endpoint = UNIXClientEndpoint(self._reactor, self._url.path, CONNECT_SECONDS)
        else:
            endpoint = HostnameEndpoint(self._reactor, *address, CONNECT_SECONDS)
            if self._context is not None:
                endpoint = TLSClientEndpoint(endpoint, self._context, address[0])
        connecting: Deferred[RedisConnection] = endpoint.connect(factory)
        try:
            return await connecting.addTimeout(CONNECT_SECONDS, self._reactor)
        except DeferredTimeout:
            kind = "connection" if self._context is None or address is None else "TLS connection"
            raise ConnectFailed(f"no {kind} within {CONNECT_SECONDS:g} s") from None
