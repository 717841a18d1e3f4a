"""Members and claims of this process in Redis: see `redis_scripts.py` for the keys.

Changes of one turn of the reactor are sent together, in their order. While there is no connection they are kept:
`memberships` and `claims` of the hub are what Redis must have, and `_undone` is what it may have and must not. After a
reconnect, and whenever the lease of this process had ended or Redis refused a change, `renew` makes Redis equal.

What claims guarantee, with a lease of 20 s that each heartbeat (2 s) renews:

- As long as the lease of a process is renewed, no other process gets its claims.
- A process that is cut off from Redis, or is stopped, for longer than the lease still believes in its claims, while
  another process can get them. It learns that when it is back: the claims that others hold are lost, the others are
  claimed again. Meanwhile it can neither publish nor claim.
- Redis replicates asynchronously. When a replica becomes master, a claim that was granted within the last moments may
  be missing there, and another process may get the key before the first one has reconnected and claimed it again. Then
  the first one loses it. The same applies to a restart of Redis without persistence.
- While a network is split, two masters may each grant a key. `min-replicas-to-write 1` of Redis limits that to
  `min-replicas-max-lag`.
- Leases use Redis's clock. A jump of it forward by 20 s ends all leases at once; each process claims again at its next
  heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet.defer import Deferred

from rtservice.hub.carrier import MOST_MEMBERS, Claim, Local, Membership
from rtservice.hub.redis_scripts import BATCH, CHANGE, LEASE_MS, MEMBERS, REAP, RENEW
from rtservice.hub.resp import RedisConnection, Refused
from rtservice.interfaces import HubUnavailable, Members

# A change as the script expects it: kind, number, topic or key, member or holder.
_Change = tuple[str, int, str, bytes]


class RedisPresence:
    """Members and claims. `refused` is called with the text of an error reply."""

    def __init__(self, prefix: str, incarnation: str, refused: Callable[[str], None]) -> None:
        self._prefix = prefix
        self._incarnation = incarnation
        self._refused = refused
        self._reactor: Any = None  # set by `start`
        self._local: Any = None
        self._connection: RedisConnection | None = None
        self._queue: list[_Change] = []  # changes of this turn
        self._open = False  # whether the hub is up
        self._joined: list[Deferred[None]] = []  # those that fire when it is
        self._joining: dict[int, Deferred[None]] = {}
        self._claiming: dict[int, Deferred[bool]] = {}
        self._unsent: set[int] = set()  # memberships that Redis was not told about
        self._undone: dict[tuple[str, int], _Change] = {}
        self._removed: set[int] = set()  # numbers that were left or released during `_restore`
        self._restoring = False
        self._differs = False  # Redis may not have what the hub has
        self.lost = 0  # claims

    def start(self, reactor: Any, local: Local) -> None:
        """Keep the hub, whose memberships and claims Redis must have."""
        self._reactor = reactor
        self._local = local

    # --- for the hub ---

    def join(self, membership: Membership) -> Deferred[None]:
        """Add a member; waits while there is no connection."""
        deferred = self._joining[membership.number] = Deferred()
        if self._connection is None:
            self._unsent.add(membership.number)
        self._add(("J", *membership))
        return deferred

    def leave(self, membership: Membership) -> None:
        """Remove a member."""
        self._joining.pop(membership.number, None)
        if membership.number in self._unsent:
            # There is nothing to remove, however many join and leave while Redis is unavailable.
            self._unsent.remove(membership.number)
            return
        self._remove(("L", membership.number, membership.topic, b""))

    def claim(self, claim: Claim) -> Deferred[bool]:
        """Claim a key. Called only while the hub is up."""
        deferred = self._claiming[claim.number] = Deferred()
        self._add(("C", *claim))
        return deferred

    def release(self, claim: Claim) -> None:
        """End a claim."""
        self._remove(("R", claim.number, claim.key, b""))

    def members(self, topic: str) -> Deferred[Members]:
        """Return the members of a topic. Called only while the hub is up."""
        assert self._connection is not None
        self._flush()
        deferred: Deferred[Members] = Deferred()
        self._connection.send((b"EVAL", MEMBERS, 0, self._prefix, topic, MOST_MEMBERS), (self._members_found, deferred))
        return deferred

    def _members_found(self, deferred: Deferred[Members], reply: Any) -> None:
        if isinstance(reply, Exception):
            deferred.errback(self._unavailable(reply))
        else:
            total, members = reply
            deferred.callback(Members(tuple(members), max(total, len(members))))

    # --- changes ---

    def _add(self, change: _Change) -> None:
        if self._connection is None:  # `renew` reads it from the hub
            return
        if not self._queue:
            self._reactor.callLater(0, self._flush)
        self._queue.append(change)

    def _remove(self, change: _Change) -> None:
        if self._restoring:
            self._removed.add(change[1])
        if self._connection is None:
            self._undone[change[0], change[1]] = change
        else:
            self._add(change)

    def _flush(self) -> None:
        queue, self._queue = self._queue, []
        if self._connection is None:
            self._ended(queue)
            return
        for begin in range(0, len(queue), BATCH):
            self._send(self._connection, queue[begin : begin + BATCH])

    def _send(self, connection: RedisConnection, changes: list[_Change]) -> None:
        command: list[bytes | str | int] = [b"EVAL", CHANGE, 0, self._prefix, self._incarnation]
        for change in changes:
            command += change
        connection.send(tuple(command), (self._changed, changes))

    def _changed(self, changes: list[_Change], reply: Any) -> None:
        if not isinstance(reply, list):
            if isinstance(reply, Refused):
                self._refused(reply.shown)
            self._differs = True
            self._ended(changes, reply)
            return
        for (kind, number, *_), result in zip(changes, reply, strict=True):
            if kind == "J":
                joining = self._joining.pop(number, None)
                if joining is not None:
                    self._joined.append(joining)
                    if self._open:
                        self.open()
            elif kind == "C":
                claiming = self._claiming.pop(number, None)
                if claiming is not None:
                    claiming.callback(bool(result))
                elif not result and number not in self._removed:
                    self.lost += 1
                    self._local.lose(number)

    def _ended(self, changes: list[_Change], reply: Any = None) -> None:
        """Keep what `renew` must do instead of changes that Redis did not make, or may not have made."""
        for kind, number, name, _ in changes:
            if kind in "LR":
                self._undone[kind, number] = (kind, number, name, b"")
            elif kind == "C":
                claiming = self._claiming.pop(number, None)
                if claiming is not None:
                    self._undone["R", number] = ("R", number, name, b"")
                    claiming.errback(self._unavailable(reply))

    def _unavailable(self, reply: Any) -> HubUnavailable:
        if isinstance(reply, Refused):
            return HubUnavailable(f"Redis refused: {reply.shown}")
        if reply == 0:
            return HubUnavailable("this process had no connection to Redis for too long; the next heartbeat renews it")
        return HubUnavailable("the hub has no connection to Redis")

    # --- the lease ---

    def begin(self, connection: RedisConnection) -> None:
        """Use a new connection. The next `renew` restores everything."""
        self._connection = connection
        self._unsent.clear()
        self._differs = True

    def open(self) -> None:
        """Fire the Deferreds of accepted memberships: the hub is up, so the callers can publish, too."""
        self._open = True
        joined, self._joined = self._joined, []
        for deferred in joined:
            deferred.callback(None)

    async def renew(self) -> None:
        """Renew the lease; make Redis equal to the hub if that may be needed; remove what ended processes left.

        Raises Refused and ConnectionEnded.
        """
        connection = self._connection
        if connection is None:
            return
        kept, ended = await connection.request(b"EVAL", RENEW, 0, self._prefix, self._incarnation, LEASE_MS)
        if (self._differs or not kept) and not self._restoring:
            await self._restore(connection)
        for incarnation in ended:
            await self._reap(connection, incarnation)

    async def _restore(self, connection: RedisConnection) -> None:
        """Remove and add in Redis what the hub has removed, and has, in batches."""
        self._differs = False
        self._restoring = True
        try:
            undone, self._undone = list(self._undone.values()), {}
            for begin in range(0, len(undone), BATCH):
                self._send(connection, undone[begin : begin + BATCH])
            for changes in self._wanted():
                self._send(connection, changes)
                await connection.request(b"PING")  # replied to after the changes
        finally:
            self._restoring = False
            self._removed.clear()

    def _wanted(self) -> Iterator[list[_Change]]:
        """Yield what the hub has, in batches, each as of the time when it is taken."""
        wanted: list[_Change] = [("J", *membership) for membership in self._local.memberships()]
        wanted += [("C", *claim) for claim in self._local.claims()]
        for begin in range(0, len(wanted), BATCH):
            if changes := [change for change in wanted[begin : begin + BATCH] if change[1] not in self._removed]:
                yield changes

    async def _reap(self, connection: RedisConnection, incarnation: bytes | str, force: str = "") -> None:
        while await connection.request(b"EVAL", REAP, 0, self._prefix, incarnation, BATCH, force):
            pass

    # --- ends ---

    def end(self) -> None:
        """Keep what must be done on the next connection. The connection has called its callbacks."""
        self._connection = None
        self._open = False
        queue, self._queue = self._queue, []
        self._ended(queue)

    async def remove_own(self, connection: RedisConnection) -> None:
        """Remove everything of this process. Raises Refused and ConnectionEnded."""
        self._flush()
        self._connection = None
        await self._reap(connection, self._incarnation, "force")

    def fail_waiting(self) -> None:
        """Fail the Deferreds of `join` and `claim`."""
        waiting: list[Deferred[Any]] = [*self._joined, *self._joining.values(), *self._claiming.values()]
        self._joined.clear()
        self._joining.clear()
        self._claiming.clear()
        for deferred in waiting:
            deferred.errback(HubUnavailable("the hub has stopped"))
