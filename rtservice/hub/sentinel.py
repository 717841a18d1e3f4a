"""Asks the sentinels of Redis for the address of the master.

https://redis.io/docs/latest/develop/reference/sentinel-clients/: ask them in turn until one knows the master; check its
ROLE after connecting; ask again after each loss. The connection to the sentinel that answered is kept, for the checks
that each heartbeat makes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from rtservice.escaping import escaped
from rtservice.hub.connect_errors import ConnectFailed, reason_of
from rtservice.hub.redis_url import Address, Login, shown_address
from rtservice.hub.resp import RedisConnection, Refused

# Seconds for an answer of a sentinel, connection included.
SENTINEL_SECONDS = 1.5


class Sentinels:
    """The sentinels of one master. `connect` opens a connection to an address."""

    def __init__(
        self,
        addresses: Sequence[Address],
        login: Login | None,
        name: str,
        connect: Callable[[Address], Awaitable[RedisConnection]],
        reactor: Any,
    ) -> None:
        self._addresses = list(addresses)  # the one that answered last is the first
        self._login = login
        self._name = name
        self._connect = connect
        self._reactor = reactor
        self._kept: RedisConnection | None = None

    async def master(self) -> Address:
        """Return the address of the master. Raises ConnectFailed if no sentinel knows it."""
        problem = ""
        for address in list(self._addresses):
            asking = Deferred.fromCoroutine(self._ask(address))
            try:
                master = await asking.addTimeout(SENTINEL_SECONDS, self._reactor)
            except CancelledError:
                self.close()
                raise
            except Exception as error:
                self.close()
                if isinstance(error, Refused):
                    # Other texts may repeat the password.
                    reason = f"refused the request ({error.code})" if error.code.isalpha() else "refused the request"
                else:
                    reason = reason_of(error)
                problem = problem or f"sentinel {shown_address(address)}: {reason}"
                continue
            self._addresses.remove(address)
            self._addresses.insert(0, address)
            return master
        raise ConnectFailed(problem)

    async def _ask(self, address: Address) -> Address:
        connection = self._kept
        if connection is None or address != self._addresses[0] or connection.ended.called:
            self.close()
            connection = self._kept = await self._connect(address)
            if self._login is not None:
                user = (self._login.user,) if self._login.user else ()
                await connection.request(b"AUTH", *user, self._login.password.reveal())
        reply = await connection.request(b"SENTINEL", b"get-master-addr-by-name", self._name)
        if not isinstance(reply, list):
            raise ConnectFailed(f"does not know the master {escaped(self._name)}")
        host, port = reply
        return host.decode("ascii", "replace"), int(port)

    def close(self) -> None:
        """End the connection that is kept."""
        kept, self._kept = self._kept, None
        if kept is not None and not kept.ended.called:
            kept.abort("closed")
