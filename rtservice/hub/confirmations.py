"""Wait until each other worker has handled the frames that were sent to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred

from rtservice.interfaces import HubUnavailable

# Seconds for which a peer that does not confirm delays others: it may be stopped.
CONFIRM_SECONDS = 2.0


class _Round:
    """One SYNC: what waits for it, and the peers that have not confirmed it."""

    def __init__(self) -> None:
        self.waiting: list[Deferred[None]] = []
        self.topics: list[str] = []  # that are subscribed in it
        self.peers: set[int] = set()
        self.timer: Any = None


class Confirmations:
    """Rounds of SYNC and SYNCED with all peers; all that is sent in one turn of the reactor shares a round.

    `sync` is called with a number, sends SYNC to each peer, and returns the peers. `missed` is called with a topic if a
    peer handles its subscription later than after CONFIRM_SECONDS: until then that peer did not send its messages.
    """

    def __init__(self, clock: Any, *, sync: Callable[[int], Iterable[int]], missed: Callable[[str], None]) -> None:
        self._clock = clock
        self._sync = sync
        self._missed = missed
        self._number = 0
        self._next: _Round | None = None  # begins at the end of this turn
        self._beginning: Any = None
        self._rounds: dict[int, _Round] = {}

    def add(self, topic: str | None = None) -> Deferred[None]:
        """Return what fires when all frames up to now are handled; `topic` is subscribed in one of them."""
        if self._next is None:
            self._next = _Round()
            self._beginning = self._clock.callLater(0, self._begin)
        if topic is not None:
            self._next.topics.append(topic)
        done: Deferred[None] = Deferred()
        self._next.waiting.append(done)
        return done

    def _begin(self) -> None:
        begun, self._next = self._next, None
        assert begun is not None
        self._number += 1
        begun.peers.update(self._sync(self._number))
        if not begun.peers:
            self._finish(begun)
            return
        self._rounds[self._number] = begun
        begun.timer = self._clock.callLater(CONFIRM_SECONDS, self._finish, begun)

    def _finish(self, ended: _Round) -> None:
        waiting, ended.waiting = ended.waiting, []
        for done in waiting:
            done.callback(None)

    def confirmed(self, peer: int, number: int) -> None:
        """Handle SYNCED. Unknown numbers are ignored."""
        known = self._rounds.get(number)
        if known is not None and peer in known.peers:
            self._remove(known, number, peer, missed=True)

    def remove_peer(self, peer: int, *, missed: bool) -> None:
        """Do not wait for a peer any more. `missed`: report the topics of the rounds that it did not confirm."""
        for number, known in list(self._rounds.items()):
            if peer in known.peers:
                self._remove(known, number, peer, missed=missed)

    def _remove(self, known: _Round, number: int, peer: int, *, missed: bool) -> None:
        known.peers.discard(peer)
        late = not known.timer.active()
        if not known.peers:
            del self._rounds[number]
            if not late:
                known.timer.cancel()
        if late and missed:
            for topic in known.topics:
                self._missed(topic)
        if not known.peers:
            self._finish(known)

    def stop(self) -> None:
        """Fail everything that waits with HubUnavailable."""
        rounds = list(self._rounds.values())
        self._rounds.clear()
        for known in rounds:
            if known.timer.active():
                known.timer.cancel()
        if self._next is not None:
            self._beginning.cancel()
            rounds.append(self._next)
            self._next = None
        for known in rounds:
            waiting, known.waiting = known.waiting, []
            for done in waiting:
                done.errback(HubUnavailable("the hub has stopped"))
