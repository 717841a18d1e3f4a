"""A room in one process: its members, its subscription, and the lines that are not sent to all members yet."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.counted import counted
from rtservice.interfaces import IHub, IReceiver, ISubscription
from rtservice.protocols.chat.limits import ChatLimits
from rtservice.protocols.chat.presence import DIRECTORY, NamePresence, hub_name
from rtservice.protocols.chat.turns import ABORT_COST, ChatTurns, Place

if TYPE_CHECKING:
    from rtservice.protocols.chat.member import Member

# Seconds after which a published line that has not come back counts as lost, if none has come back meanwhile. It is
# lost if the hub loses its connection to the engine: then it reports a gap only after the next connection.
RETURN_SECONDS = 5.0


@implementer(IReceiver)
class Room(Place):
    """A room with members in this process. It exists while a member is in it, or waits to join it.

    Positions count bytes. `heard`, of a member, and `_start` count those of the log since the room was created;
    `_published` and `_returned` those of the lines that this object publishes.

    Each member has a seat: the function that sends it a piece. Usually it is the `write` of its transport, so that a
    delivery costs little more than that. A member that must not get the whole piece has a slower one for a while.
    """

    def __init__(self, name: str, hub: IHub, turns: ChatTurns, limits: ChatLimits) -> None:
        super().__init__()
        self.name = name
        self.topic = hub_name("room", name)
        self.members: dict[Member, int] = {}  # with their seats
        self.joining = 0  # members that wait for this room
        self.sending = False  # in the rotation of rooms with a round
        self.rest: Any = None  # the delayed call that begins the next round
        self.skipped = 0  # lines of other processes since the room was created
        self._hub = hub
        self._turns = turns
        self._limits = limits
        self._next_round = 0.0  # time of the next round at the maximum rate, without bursts
        # The log.
        self._log = bytearray()
        self._start = 0  # position of its first byte
        self._skipped = 0  # lines skipped after its last byte
        self._ends_in_gap = False  # its last line is the notice of a gap
        self._piece = b""  # the beginning of the log, which this round sends
        self._seats: list[Callable[[bytes], object]] = []
        self._round = 0  # seats at the beginning of the round
        self._sent = 0  # seats of the round to which the piece is sent
        self._aborted = 0  # members aborted in this turn
        # Own lines on the hub.
        self._origin = secrets.token_hex(8).encode()  # marks them
        self._published = self._returned = 0
        self._returning: deque[tuple[int, Deferred[None]]] = deque()  # fire when this position has returned
        self._return_check: Any = None  # a delayed call
        self._entering: dict[Member, int] = {}  # members, by the position of the line that announces them
        # The subscription.
        self._subscription: ISubscription | None = None
        self._presence: NamePresence | None = None
        self._opening: list[Deferred[None]] = []  # fire when it is active
        self._subscribing = hub.subscribe(self.topic, self)
        self._subscribing.addCallbacks(self._subscribed, self._not_subscribed)

    # --- the subscription ---

    def opened(self) -> Deferred[None]:
        """Return a Deferred that fires when lines of the room are received. It can be cancelled."""
        if self._subscription is not None:
            return succeed(None)
        opening: Deferred[None] = Deferred(self._opening.remove)
        self._opening.append(opening)
        return opening

    def _subscribed(self, subscription: ISubscription) -> None:
        self._subscription = subscription
        self._presence = NamePresence(self._hub, DIRECTORY, self.name)
        opening, self._opening = self._opening, []
        for waiting in opening:
            waiting.callback(None)

    def _not_subscribed(self, failure: Failure) -> None:
        opening, self._opening = self._opening, []
        for waiting in opening:
            waiting.errback(failure)

    @property
    def unused(self) -> bool:
        """Whether no member is in the room or waits for it."""
        return not (self.members or self._entering or self.joining)

    def close(self) -> None:
        """End the subscription of a room without members."""
        if self._subscription is not None:
            self._subscription.cancel()
        else:
            self._subscribing.cancel()
        if self._presence is not None:
            self._presence.leave()
        self.stop()
        self._returned = self._published
        self._turns.listen(self)  # a member that waited for space creates a new room

    def stop(self) -> None:
        """Cancel the delayed calls."""
        for call in (self.rest, self._return_check):
            if call is not None:
                call.cancel()
        self.rest = self._return_check = None

    # --- lines that members of this process publish ---

    @property
    def full(self) -> bool:
        """Whether the lines of members must wait."""
        return len(self._log) - len(self._piece) + self._published - self._returned >= self._limits.chunk

    def say(self, text: str) -> Deferred[None]:
        """Publish a line. Fails with HubUnavailable or HubFull."""
        line = text.encode() + b"\r\n"
        self._published += len(line)
        if self._return_check is None:
            self._check_later()
        said = self._hub.publish(self.topic, b"%b %d %b" % (self._origin, self._published, line))
        return said.addErrback(self._not_said, self._published)

    def _not_said(self, failure: Failure, position: int) -> Failure:
        self._advance(position)
        return failure

    def enter(self, member: Member) -> None:
        """Add a member when the line that `say` has published last comes back: the first line that it gets."""
        self._entering[member] = self._published

    def returned(self) -> Deferred[None]:
        """Return a Deferred that fires when the lines published so far have come back, or are lost."""
        if self._returned >= self._published:
            return succeed(None)
        returned: Deferred[None] = Deferred()
        self._returning.append((self._published, returned))
        return returned

    def _advance(self, position: int) -> None:
        """Note that own lines up to this position have come back, or are lost."""
        self._returned = max(self._returned, position)
        while self._returning and self._returning[0][0] <= self._returned:
            _, returned = self._returning.popleft()
            if not returned.called:  # it was not cancelled
                returned.callback(None)
        self._turns.listen(self)

    def _check_later(self) -> None:
        self._return_check = self._turns.clock.callLater(RETURN_SECONDS, self._check_return, self._returned)

    def _check_return(self, before: int) -> None:
        self._return_check = None
        if self._returned == before:
            self._advance(self._published)
        if self._returned < self._published:
            self._check_later()

    # --- lines that the hub delivers ---

    def received(self, topic: str, message: bytes) -> None:
        origin, position, line = message.split(b" ", 2)
        if origin == self._origin:
            # Never skipped: `full` limits them, and a member sees its own lines.
            self._end_skip()
            while self._entering and next(iter(self._entering.values())) <= int(position):
                self.add(next(iter(self._entering)))
            self._append(line)
            self._advance(int(position))
        elif len(self._log) > self._limits.log // (2 if self._skipped else 1):
            self._skipped += 1
            self.skipped += 1
        else:
            self._end_skip()
            self._append(line)

    def gap(self, topic: str) -> None:
        self._end_skip()
        for member in list(self._entering):  # the line that announces it may be lost
            self.add(member)
        if not self._ends_in_gap:
            self._append(b"* lines may be missing\r\n")
            self._ends_in_gap = True
        self._advance(self._published)

    def _append(self, line: bytes) -> None:
        self._ends_in_gap = False
        if self.members:
            self._log += line
            self._turns.schedule_round(self)

    def _end_skip(self) -> None:
        """Append the notice of skipped lines, if there are any."""
        if self._skipped:
            skipped, self._skipped = self._skipped, 0
            verb = "was" if skipped == 1 else "were"
            self._append(f"* {counted(skipped, 'line')} {verb} skipped\r\n".encode())

    # --- members ---

    def add(self, member: Member) -> None:
        """Add a member. It gets the lines that are received from now on."""
        self._entering.pop(member, None)
        self.members[member] = len(self._seats)
        self._seats.append(_empty)
        member.heard = self._start + len(self._log)
        self.watch(member)

    def remove(self, member: Member) -> None:
        """Remove a member, and send it the lines so far."""
        self._entering.pop(member, None)
        if member not in self.members:
            return
        if not member.closing:
            self.catch_up(member)
        self._seats[self.members.pop(member)] = _empty
        if not self.members:
            self._start += len(self._log)
            self._log.clear()
            self._seats.clear()
            self._skipped = self._round = self._sent = 0
            self._piece = b""

    def catch_up(self, member: Member) -> None:
        """Send a member all lines so far, before a line that only this member gets."""
        seat = self.members.get(member)
        if seat is None:
            return
        heard = max(member.heard - self._start, len(self._piece) if seat < self._sent else 0)
        missed = bytes(memoryview(self._log)[heard:])
        member.heard = self._start + len(self._log)
        self.watch(member)
        member.work += len(missed) // 4096
        if missed:
            member.deliver(missed)

    def watch(self, member: Member) -> None:
        """Consider the state of a member before it gets a piece. Called when its state has changed."""
        seat = self.members.get(member)
        if seat is not None:
            self._seats[seat] = partial(self._send_to, member)

    def _send_to(self, member: Member, piece: bytes) -> None:
        """Send a member the part of a piece that it has not got, if it may get it."""
        got = max(0, member.heard - self._start)
        if got < len(piece):
            if not member.deliver(piece[got:]):
                self._aborted += 1
            if not member.watched:
                self._seats[self.members[member]] = member.transport.write

    # --- rounds ---

    @property
    def silent(self) -> bool:
        """Whether the log is empty: all lines are sent."""
        return not self._log

    @property
    def next_round(self) -> float:
        """The time at which the next round may begin. A burst of one piece is not delayed."""
        return self._next_round - self._limits.chunk / self._limits.max_rate

    def send(self, work: int) -> int:
        """Continue the round, or begin one. Return the deliveries counted, which may slightly exceed `work`."""
        if not self._piece and self._log:
            self._begin_round()
        piece = self._piece
        cost = 1 + len(piece) // 4096
        first, self._sent = self._sent, min(self._sent + max(1, work // cost), self._round)
        self._aborted = 0
        for write in self._seats[first : self._sent]:
            write(piece)
        return (self._sent - first) * cost + self._aborted * ABORT_COST

    def _begin_round(self) -> None:
        # Complete lines, and at least one.
        chunk = self._limits.chunk
        end = self._log.rfind(b"\n", 0, chunk) + 1 or self._log.find(b"\n") + 1
        self._piece = bytes(memoryview(self._log)[:end])
        if len(self._seats) > len(self.members):  # members have left
            self._seats = [self._seats[seat] for seat in self.members.values()]
            self.members = {member: seat for seat, member in enumerate(self.members)}
        self._round, self._sent = len(self._seats), 0

    def end_round(self, now: float) -> bool:
        """Return whether the piece is sent to all members; if so, remove it from the log."""
        if self._sent < self._round:
            return False
        size = len(self._piece)
        self._start += size
        del self._log[:size]
        self._piece = b""
        self._round = self._sent = 0
        self._next_round = max(self._next_round, now) + size / self._limits.max_rate
        if len(self._log) <= self._limits.log // 2:
            self._end_skip()
        return True


def _empty(piece: bytes) -> None:
    """Stand in for a member that has left."""
