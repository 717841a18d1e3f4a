"""Turns: calls in the next iteration of the reactor, each with a bounded amount of the chat's work.

In a turn, members whose lines or answers wait are served in rotation, and rooms send to their members in rotation.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtservice.protocols.chat.member import Member
    from rtservice.protocols.chat.room import Room

# Bounds on one turn. A line counts as one, and one more for every 256 bytes; commands that cost more add to
# `Member.work`. Each takes 5 to 15 µs, so a turn takes 1 to 3 ms.
LINES_PER_TURN = 128

# A write to one member counts as one, and one more for every 4 KiB. Each takes 5 to 15 µs with the system call.
DELIVERIES_PER_TURN = 256

# Deliveries to one room before the next room is served.
DELIVERIES_PER_ROOM = 64

# Cost of a delivery that aborts a member's connection, and members closed in one turn of a graceful shutdown: closing a
# connection takes 50 to 100 µs.
ABORT_COST = 8
CLOSES_PER_TURN = 32


class Place:
    """Members that wait for a turn: those of a room, or in the lobby those whose next line adds nothing to a room."""

    def __init__(self) -> None:
        self.speakers: OrderedDict[Member, None] = OrderedDict()
        self.listening = False  # in the rotation of places with speakers

    @property
    def full(self) -> bool:
        """Whether the members must wait."""
        return False


class ChatTurns:
    """The rotations of all members and rooms of this process. `clock` is an IReactorTime."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self._listening: deque[Place] = deque()  # places with speakers that are not full
        self._sending: deque[Room] = deque()  # rooms with lines to send
        self._closing: deque[Member] = deque()  # members to close in the graceful shutdown
        self._turn: Any = None  # the delayed call of the next turn

    def stop(self) -> None:
        """End all turns."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def queue(self, member: Member, place: Place) -> None:
        """Schedule `member.take_turn`, once the place is not full."""
        member.waits_in = place
        place.speakers[member] = None
        self.listen(place)

    def forget(self, member: Member) -> None:
        """Cancel what `queue` has scheduled."""
        if member.waits_in is not None:
            del member.waits_in.speakers[member]
            member.waits_in = None

    def listen(self, place: Place) -> None:
        """Serve the members that wait in a place, unless it is full. Called when it may no longer be full."""
        if place.speakers and not place.listening and not place.full:
            place.listening = True
            self._listening.append(place)
            self._schedule()

    def schedule_round(self, room: Room) -> None:
        """Schedule a round for the lines of a room, if it has any."""
        if room.sending or room.rest is not None or room.silent:
            return
        wait = room.next_round - self.clock.seconds()
        if wait > 0:
            room.rest = self.clock.callLater(wait, self._rested, room)
        else:
            room.sending = True
            self._sending.append(room)
            self._schedule()

    def schedule_close(self, member: Member) -> None:
        """Schedule the close of a member in the graceful shutdown."""
        self._closing.append(member)
        self._schedule()

    def _rested(self, room: Room) -> None:
        room.rest = None
        self.schedule_round(room)

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self.clock.callLater(0, self._take_turn)

    def _take_turn(self) -> None:
        self._turn = None
        for _ in range(min(CLOSES_PER_TURN, len(self._closing))):
            member = self._closing.popleft()
            if not member.closing:
                member.close("the chat shuts down")
        self._serve_members()
        self._send_rounds()
        if self._listening or self._sending or self._closing:
            self._schedule()

    def _serve_members(self) -> None:
        """Serve waiting members: one of each place in rotation."""
        left = LINES_PER_TURN
        while left > 0 and self._listening:
            place = self._listening.popleft()
            place.listening = False
            if place.speakers and not place.full:
                member, _ = place.speakers.popitem(last=False)
                member.waits_in = None
                left -= member.take_turn()
                self.listen(place)

    def _send_rounds(self) -> None:
        """Send lines: up to DELIVERIES_PER_ROOM deliveries of each room in rotation."""
        left = DELIVERIES_PER_TURN
        while left > 0 and self._sending:
            room = self._sending.popleft()
            left -= room.send(min(left, DELIVERIES_PER_ROOM))
            if not room.end_round(self.clock.seconds()):
                self._sending.append(room)
                continue
            room.sending = False
            self.listen(room)
            self.schedule_round(room)
