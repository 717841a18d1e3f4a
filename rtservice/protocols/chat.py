"""Rooms in which people talk by lines: an example of a protocol whose connections know each other."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineOnlyReceiver
from zope.interface import implementer

from rtservice.interfaces import IDrainable, IMetrics, IOneProcess

# What names people and rooms can have: nothing that a terminal acts on, and no blanks, which separate words.
_NAME = re.compile(r"[\w.-]+")

_HELP = "/join ROOM, /leave, /rooms, /who, /nick NAME, /quit; anything else is said in your room"


@implementer(IDrainable)
class Member(LineOnlyReceiver):
    """One client: first it gives its nickname, then it joins a room and talks."""

    factory: ChatFactory
    transport: Any  # Twisted's interfaces split in five what every stream transport has
    delimiter = b"\n"

    def connectionMade(self) -> None:
        self.MAX_LENGTH = self.factory.max_line
        self.nick = ""
        self.room = ""
        self._lines: deque[bytes] = deque()  # that wait for another turn
        # A member that does not read is not read from either: see echo. What others say to it is bounded by `tell`.
        self.transport.registerProducer(self.transport, True)
        if len(self.factory.members) >= self.factory.max_members:
            self.close("the chat is full")
            return
        self.factory.members.add(self)
        self.tell("your nickname?")

    def connectionLost(self, reason: Any = None) -> None:
        self._lines.clear()
        self._leave()
        self.factory.forget(self)

    def lineReceived(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) == 1:  # or it waits for its turn
            self.go_on()

    def go_on(self) -> None:
        """Take what this member has said, for as long as there is room for it in this turn."""
        while self._lines and not self.transport.disconnecting:
            if self.factory.enough_said:
                self.transport.pauseProducing()
                self.factory.wait_for_turn(self)
                return
            self._hear(self._lines.popleft())

    def turn(self) -> None:
        """There is room again."""
        self.go_on()
        # Unless its transport has paused it, since it does not read.
        if not self._lines and not getattr(self.transport, "producer_paused", False):
            self.transport.resumeProducing()

    def _hear(self, line: bytes) -> None:
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            self.close("only UTF-8 is spoken here")
            return
        # Others' terminals are to show it, and not to obey it.
        text = "".join(char for char in text if char.isprintable()).strip()
        if not self.nick:
            self._call_me(text)
        elif text.startswith("/"):
            self._command(*text[1:].partition(" ")[::2])
        elif not self.room:
            self.tell("you are in no room: /join ROOM")
        elif text:
            self.factory.messages += 1
            self._say(f"{self.nick}: {text}")

    def lineLengthExceeded(self, line: bytes) -> None:
        self.close(f"a line may have {self.factory.max_line} bytes")

    def _command(self, word: str, rest: str) -> None:
        name = rest.strip()
        match word:
            case "join":
                self._join(name)
            case "leave":
                self._leave()
            case "nick":
                self._call_me(name)
            case "rooms":
                self.tell(" ".join(sorted(self.factory.rooms)) or "there is no room yet")
            case "who":
                members = self.factory.rooms.get(self.room, set())
                self.tell(" ".join(sorted(member.nick for member in members)) or "you are in no room")
            case "quit":
                self.close("goodbye")
            case _:
                self.tell(_HELP)

    def _call_me(self, nick: str) -> None:
        problem = self.factory.problem_of(nick, self.factory.nicks)
        if problem:
            self.tell(problem)
            return
        before, self.nick = self.nick, nick
        self.factory.nicks.discard(before)
        self.factory.nicks.add(nick)
        if self.room:
            self._say(f"* {before} is now {nick}")
        elif not before:
            self.tell(f"hello {nick}; {_HELP}")

    def _join(self, room: str) -> None:
        rooms = self.factory.rooms
        problem = self.factory.problem_of(room, ())
        if not problem and room not in rooms and len(rooms) >= self.factory.max_rooms:
            problem = f"there are {len(rooms)} rooms already"
        if problem:
            self.tell(problem)
            return
        self._leave()
        rooms.setdefault(room, set()).add(self)
        self.room = room
        self._say(f"* {self.nick} has joined {room}")

    def _leave(self) -> None:
        if self.room:
            self._say(f"* {self.nick} has left {self.room}")
            members = self.factory.rooms[self.room]
            members.discard(self)
            if not members:
                del self.factory.rooms[self.room]
            self.room = ""

    def _say(self, text: str) -> None:
        """To everybody in the room, also to whoever says it: so it is known to have arrived."""
        line = text.encode() + b"\r\n"
        self.factory.said(len(line))
        for member in list(self.factory.rooms[self.room]):
            member.send(line)

    def tell(self, text: str) -> None:
        """To this member alone."""
        self.send(f"* {text}\r\n".encode())

    def send(self, line: bytes) -> None:
        """Send a line, unless too much is unsent already: whoever is that slow has to go, or memory would."""
        if self.transport.disconnecting:
            return
        # So much is not said in one turn: it was tried to be sent before. A transport of Twisted's own does not say how
        # much is unsent; there the idle timeout has to do.
        if getattr(self.transport, "unsent", 0) + len(line) > self.factory.max_unsent:
            self.factory.too_slow += 1
            self.transport.abortConnection()
        else:
            self.transport.write(line)

    def close(self, why: str) -> None:
        """Say why, and close when that is sent."""
        self.tell(why)
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def drain(self) -> None:
        self.close("this chat is about to end; come again")


@implementer(IOneProcess, IMetrics)
class ChatFactory(Factory[Member]):
    """Rooms in which people talk, line by line, under nicknames.

    Everything has a bound: lines of `max_line` bytes, `max_members` in all, `max_rooms` of them, names of `max_name`
    characters. A member to which more than `max_unsent` bytes are unsent is cut off, so that who reads slowly costs
    the others nothing; who says very much at once has to wait in between.

    Raises ValueError for a bound below 1.
    """

    protocol = Member
    noisy = False

    def __init__(
        self,
        max_line: int = 1024,
        max_members: int = 1000,
        max_rooms: int = 100,
        max_name: int = 20,
        max_unsent: int = 256 * 1024,
    ) -> None:
        for name, value in list(locals().items()):
            if name.startswith("max_") and value < 1:
                raise ValueError(f"{name.replace('_', '-')} is {value}, and has to be 1 or more")
        self.max_line = max_line
        self.max_members = max_members
        self.max_rooms = max_rooms
        self.max_name = max_name
        self.max_unsent = max_unsent
        self.members: set[Member] = set()
        self.nicks: set[str] = set()
        self.rooms: dict[str, set[Member]] = {}
        self.messages = self.too_slow = 0
        self.clock: Any = None  # an IReactorTime, from startFactory on
        self._said = 0  # bytes, in this turn of the reactor
        self._waiting: dict[Member, None] = {}
        self._turn: Any = None  # the delayed call that is the next

    def startFactory(self) -> None:
        from twisted.internet import reactor

        self.clock = self.clock or reactor

    def stopFactory(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def problem_of(self, name: str, taken: Any) -> str:
        """What is wrong with a name; empty if nothing is."""
        if len(name) > self.max_name or not _NAME.fullmatch(name):
            return f"a name has up to {self.max_name} letters, digits and . _ -"
        return f"{name} is taken" if name in taken else ""

    @property
    def enough_said(self) -> bool:
        """Whether members have to wait for the next turn of the reactor, in which what is said in this one is sent."""
        return self._said >= self.max_unsent // 4

    def said(self, size: int) -> None:
        """So many bytes were said to everybody in a room."""
        self._said += size
        if self._turn is None:
            self._turn = self.clock.callLater(0, self._next_turn)

    def wait_for_turn(self, member: Member) -> None:
        """Give this member its turn when it comes."""
        self._waiting[member] = None

    def _next_turn(self) -> None:
        self._turn = None
        self._said = 0
        for member in list(self._waiting):
            if self.enough_said:
                break
            del self._waiting[member]  # it goes to the end of the line if that is not enough for it
            member.turn()
        if self._waiting and self._turn is None:
            self._turn = self.clock.callLater(0, self._next_turn)

    def forget(self, member: Member) -> None:
        """It has gone."""
        self._waiting.pop(member, None)
        self.members.discard(member)
        self.nicks.discard(member.nick)

    def metrics(self) -> dict[str, int | float]:
        return {
            "members": len(self.members),
            "rooms": len(self.rooms),
            "messages_total": self.messages,
            "too_slow_total": self.too_slow,
        }
