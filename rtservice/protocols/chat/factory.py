"""The factory of the chat: the members and rooms of this process."""

from __future__ import annotations

from typing import Any

from twisted.internet.protocol import Factory
from zope.interface import implementer

from rtservice.interfaces import IHub, IHubUser, IMetrics
from rtservice.protocols.chat.limits import ChatLimits
from rtservice.protocols.chat.member import Member
from rtservice.protocols.chat.room import Room
from rtservice.protocols.chat.turns import ChatTurns, Place
from rtservice.protocols.names import TakenNames


@implementer(IHubUser, IMetrics)
class ChatFactory(Factory[Member]):
    """Chat rooms: members send lines of text under nicknames.

    Members of all processes of the service share rooms and nicknames, through the hub. `startFactory` and `use` are
    called before the first connection.

    Bounds, each 1 or more: `max_line` bytes of a line (at most 1,000,000), `max_members` and `max_rooms` of this
    process, `max_name` characters of a name (at most 200), `max_rate` bytes per second in one room, above which lines
    wait. The connection of a member with more than `max_unsent` bytes unsent is aborted; this never happens to a client
    that reads at `max_rate`.

    Raises ValueError for a bound out of its range.
    """

    protocol = Member
    noisy = False
    clock: Any = None  # an IReactorTime; the reactor if it is None

    def __init__(
        self,
        max_line: int = 1024,
        max_members: int = 1000,
        max_rooms: int = 100,
        max_name: int = 20,
        max_unsent: int = 256 * 1024,
        max_rate: int = 128 * 1024,
    ) -> None:
        self.limits = ChatLimits(max_line, max_members, max_rooms, max_name, max_unsent, max_rate)
        self.members: set[Member] = set()
        self.nicks = TakenNames(max_name)  # of this process
        self.rooms: dict[str, Room] = {}
        self.room_names = TakenNames(max_name)
        self.lobby = Place()
        self.messages = self.too_slow = 0
        self.turns: Any = None  # set by startFactory
        self.hub: Any = None  # set by `use`
        self._skipped = 0  # lines skipped in rooms that no longer exist

    def startFactory(self) -> None:
        from twisted.internet import reactor

        self.turns = ChatTurns(self.clock or reactor)

    def use(self, hub: IHub) -> None:
        self.hub = hub

    def stopFactory(self) -> None:
        self.turns.stop()
        for room in self.rooms.values():
            room.stop()

    def add_room(self, name: str) -> Room:
        """Create a room with this name, which must be free."""
        self.room_names.add(name)
        room = self.rooms[name] = Room(name, self.hub, self.turns, self.limits)
        return room

    def close_unused(self, room: Room) -> None:
        """Remove a room that no member is in or waits for."""
        if room.unused and self.rooms.get(room.name) is room:
            del self.rooms[room.name]
            self.room_names.discard(room.name)
            self._skipped += room.skipped
            room.close()

    def forget(self, member: Member) -> None:
        """Remove a member whose connection has ended."""
        self.members.discard(member)
        self.nicks.discard(member.nick)
        self.turns.forget(member)

    def metrics(self) -> dict[str, int | float]:
        return {
            "members": len(self.members),
            "rooms": len(self.rooms),
            "messages_total": self.messages,
            "too_slow_total": self.too_slow,
            "skipped_total": self._skipped + sum(room.skipped for room in self.rooms.values()),
        }
