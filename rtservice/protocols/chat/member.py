"""The connection of a member: its input, its commands and its output."""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.counted import counted
from rtservice.interfaces import HubFull, HubUnavailable, IDrainable, Members
from rtservice.protocols.chat.nickname import Nickname
from rtservice.protocols.chat.presence import DIRECTORY, NamePresence
from rtservice.protocols.chat.room import Room
from rtservice.protocols.chat.turns import Place
from rtservice.protocols.names import TakenNames, similarity_keys

if TYPE_CHECKING:
    from rtservice.protocols.chat.factory import ChatFactory

_T = TypeVar("_T")

# Reading from a member pauses while a line and more than this many bytes after it wait.
INPUT_LIMIT = 16 * 1024

# Seconds that a member waits for an answer of the hub.
ANSWER_SECONDS = 5.0

# A transport pauses its producer while more than this many bytes are unsent: abstract.FileDescriptor.bufferSize.
_PAUSED_ABOVE = 64 * 1024

_HELP = "/join ROOM, /leave, /rooms, /who, /nick NAME, /quit; other lines are sent to your room"

_NOT_SENT = "your line was not sent"


def _reason(error: Exception) -> str:
    return "the chat is overloaded" if isinstance(error, HubFull) else "the chat is not available"


def _no_answer(result: object, seconds: float) -> Failure:
    return Failure(HubUnavailable(f"no answer within {seconds:.0f} seconds"))


@implementer(IDrainable, IPushProducer)
class Member(Protocol):
    """One client: sends its nickname first, then joins a room and sends lines.

    A line is handled by a coroutine, in a turn of the factory. While it waits for the hub, later lines wait.
    """

    factory: ChatFactory
    transport: Any  # Twisted divides the methods of a stream transport among five interfaces

    def connectionMade(self) -> None:
        self.nick = ""
        self.room: Room | None = None
        self.heard = 0  # position in its room up to which lines are sent to it, or before those that are
        self.line: str | None = None  # the next line to handle
        self.waits_in: Place | None = None  # the place whose `speakers` contain it
        self.work = 0  # cost of the current line, in lines
        self._nickname = Nickname(self.factory.hub)
        self._presence: NamePresence | None = None  # in its room
        self._announced = False  # the room has a line that it has joined, and none that it has left
        self._handling: Deferred[None] | None = None  # a line, while it waits for the hub
        self._answered: Deferred[None] | None = None  # fires in the turn in which the line continues
        self._lost = False  # the nickname was lost, and not claimed again since
        self._input = bytearray()  # input after `line`
        self._searched = 0  # bytes of it that contain no line feed
        self._size = 0  # bytes of the next line as received
        self._reading = True
        self._full = False  # the transport has paused this producer
        self._overflow = 0  # bytes written while paused
        # A member that is not paused has at most _PAUSED_ABOVE bytes unsent.
        self._may_exceed = self.factory.limits.max_unsent < _PAUSED_ABOVE + self.factory.limits.chunk
        self._gone = False
        self.transport.registerProducer(self, True)
        if len(self.factory.members) >= self.factory.limits.max_members:
            self.close("the chat is full")
            return
        self.factory.members.add(self)
        self.notify("your nickname?")

    def connectionLost(self, reason: Any = None) -> None:
        self._gone = True
        self.line = None
        self._input.clear()
        if self._handling is not None:
            self._handling.cancel()
        self._depart()
        self._nickname.release()
        self.factory.forget(self)

    @property
    def closing(self) -> bool:
        """Whether the connection closes or has ended."""
        return self._gone or bool(self.transport.disconnecting)

    # --- input ---

    def dataReceived(self, data: bytes) -> None:
        if self.closing:
            return
        self._input += data
        if self.line is None:
            self._find_line()
        self._go_on()

    def _find_line(self) -> None:
        """Move the next complete line of the input to `line`. Close if the line is too long or not UTF-8."""
        limit = self.factory.limits.max_line
        end = self._input.find(b"\n", self._searched)
        if (len(self._input) if end < 0 else end) > limit:
            self.close(f"the line is too long; the maximum is {counted(limit, 'byte')}")
            return
        if end < 0:
            self._searched = len(self._input)
            return
        line = bytes(memoryview(self._input)[:end]).removesuffix(b"\r")
        del self._input[: end + 1]
        self._searched, self._size = 0, end
        try:
            text = line.decode()
        except UnicodeDecodeError:
            self.close("the line is not UTF-8")
            return
        # Terminals of other members could interpret control characters.
        if not text.isprintable():
            text = "".join(char for char in text if char.isprintable())
        self.line = text.strip()

    def _go_on(self) -> None:
        """Queue the next line, if any, and pause or resume reading."""
        if self.closing:
            return
        waits = self.line is not None or self._lost
        if waits and self.waits_in is None and self._handling is None and not self._full:
            self.factory.turns.queue(self, self._place())
        reading = not self._full and (self.line is None or len(self._input) < INPUT_LIMIT)
        if reading != self._reading:
            self._reading = reading
            if reading:
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()

    def _place(self) -> Place:
        """Return the room whose log must have space for the next line; the lobby if it needs no space."""
        lobby = self.factory.lobby
        if not self.nick or self.line is None:
            return lobby
        word, _, rest = self.line.partition(" ")
        if word == "/join":
            return self.factory.rooms.get(self.factory.room_names.normalise(rest.strip()), lobby)
        # /leave never waits: it adds at most one line for each member to the log.
        return lobby if self.room is None or (word.startswith("/") and word != "/nick") else self.room

    # --- turns ---

    def take_turn(self) -> int:
        """Handle the next line, or continue with the current one. Return its cost, in lines."""
        self.work = 1
        if self._answered is not None:
            answered, self._answered = self._answered, None
            answered.callback(None)
        # The line of a member that does not read waits until it has read.
        elif not self.closing and not self._full:
            if self._lost:
                self._lost = False
                self._run(self._hold_nickname("your nickname is not confirmed"))
            elif self.line is not None:
                line, self.line = self.line, None
                self.work += self._size // 256
                self._run(self._handle(line))
        return self.work

    def _run(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine. The lines wait until it ends."""
        handling: Deferred[Any] = Deferred.fromCoroutine(coroutine)
        if not handling.called:
            self._handling = handling
        handling.addBoth(self._handled)

    def _handled(self, result: object) -> Failure | None:
        self._handling = None
        if isinstance(result, Failure):
            if self._gone and result.check(CancelledError):
                return None
            self.transport.abortConnection()
            return result  # Twisted logs it
        if not self.closing:
            if self.line is None:
                self._find_line()
            self._go_on()
        return None

    def _ask(self, answer: Deferred[_T]) -> Deferred[_T]:
        """Wait for the hub; return the Deferred. If it has not fired yet, it fires in a turn of the factory.

        So many answers that arrive at once cause no long turn. Fails with HubUnavailable after ANSWER_SECONDS.
        """
        if not answer.called:
            answer.addTimeout(ANSWER_SECONDS, self.factory.turns.clock, _no_answer)
            answer.addBoth(self._wait_for_turn)
        return answer

    def _wait_for_turn(self, answer: Any) -> Any:
        if self._gone:
            return answer
        self._answered = Deferred()
        self._answered.addCallback(lambda _: answer)
        self.factory.turns.queue(self, self.factory.lobby)
        return self._answered

    # --- commands ---

    async def _handle(self, text: str) -> None:
        if not self.nick:
            await self._rename(text)
        elif text.startswith("/"):
            word, _, rest = text[1:].partition(" ")
            await self._command(word, rest.strip())
        elif self.room is None:
            self.notify("you are in no room: /join ROOM")
        elif text and await self._hold_nickname(_NOT_SENT) and await self._speak(f"{self.nick}: {text}"):
            self.factory.messages += 1

    async def _command(self, word: str, rest: str) -> None:
        match word:
            case "join":
                await self._join(rest)
            case "leave" if self.room is not None:
                await self._leave()
            case "who" if self.room is not None:
                await self._list(self.room.topic, "the room is empty")
            case "leave" | "who":
                self.notify("you are in no room")
            case "nick":
                await self._rename(rest)
            case "rooms":
                await self._list(DIRECTORY, "there is no room yet")
            case "quit":
                await self._lines_returned()
                self.close("goodbye")
            case _:
                await self._reply(_HELP)

    async def _speak(self, line: str) -> bool:
        """Say a line to all members of the room, including this one: it confirms that the line was accepted.

        Return whether it was published; if not, send a notice.
        """
        assert self.room is not None
        try:
            await self._ask(self.room.say(line))
        except (HubUnavailable, HubFull) as error:
            await self._reply(f"{_reason(error)}: {_NOT_SENT}")
            return False
        return True

    async def _reply(self, text: str) -> None:
        """Send a line to this member only, after the lines that it has said."""
        await self._lines_returned()
        self.notify(text)

    async def _lines_returned(self) -> None:
        """Wait until the lines that this process has published are received, or are late."""
        if self.room is not None:
            with suppress(HubUnavailable):
                await self._ask(self.room.returned())

    async def _list(self, topic: str, nothing: str) -> None:
        try:
            listed: Members = await self._ask(self.factory.hub.members(topic))
        except HubUnavailable as error:
            await self._reply(f"{_reason(error)}: try again later")
            return
        names = sorted({name.decode() for name in listed.members})  # a room is listed by each of its processes
        self.work += len(listed.members) // 16
        more = listed.total - len(listed.members)
        await self._reply(" ".join(names) + (f" and {more} more" if more else "") or nothing)

    # --- the nickname ---

    async def _rename(self, wanted: str) -> None:
        self.work += 4
        names = self.factory.nicks
        nick, problem = self._new_name(wanted, names, self.nick)
        if not problem:
            try:
                if not await self._claim(nick):
                    problem = f"{nick} is taken, or looks like a name that is taken"
            except HubUnavailable as error:
                problem = f"{_reason(error)}: your nickname was not set; try again later"
        if problem:
            await self._reply(problem)
            return
        before, self.nick = self.nick, nick
        names.discard(before)
        names.add(nick)
        if self.room is not None:
            presence = NamePresence(self.factory.hub, self.room.topic, nick)
            if self._presence is not None:
                self._presence.leave()
            self._presence = presence
            await self._speak(f"* {before} is now {nick}")
        elif before:
            self.notify(f"you are {nick} now")
        else:
            self.notify(f"hello {nick}; {_HELP}")

    def _new_name(self, wanted: str, names: TakenNames, instead_of: str = "") -> tuple[str, str]:
        """Return the name in its normal form, and the error text, or "" if it is valid and free in this process."""
        name = names.normalise(wanted)
        if not name:
            limit = self.factory.limits.max_name
            return "", f"a name consists of up to {limit} letters of one script, digits and . _ -"
        taken = name if name == instead_of else names.like(name, instead_of)
        if taken:
            return "", f"{name} is taken" if taken == name else f"{name} looks like {taken}, which is taken"
        return name, ""

    async def _claim(self, nick: str) -> bool:
        return await self._nickname.claim(nick, self._ask, self._nickname_lost)

    def _nickname_lost(self) -> None:
        self._lost = True
        self._go_on()

    async def _hold_nickname(self, otherwise: str) -> bool:
        """Claim the nickname again if it was lost. Return whether the member holds it; if not, send a notice.

        It is lost if the hub has no connection to its engine for too long. Until the member has it again or chooses
        another one, the member stays in its room, and its lines are not sent.
        """
        if self._nickname.held:
            return True
        try:
            if await self._claim(self.nick):
                return True
            problem = f"another member has the nickname {self.nick} now: choose another one with /nick NAME"
        except HubUnavailable as error:
            problem = f"{_reason(error)}: {otherwise}"
        await self._reply(problem)
        return False

    # --- rooms ---

    async def _join(self, wanted: str) -> None:
        self.work += 4
        if not await self._hold_nickname("you have not joined the room"):
            return
        room = await self._find_room(wanted)
        if isinstance(room, str):
            await self._reply(room)
            return
        room.joining += 1
        try:
            await self._ask(room.opened())
            await self._leave()
            await self._enter(room)
        except (HubUnavailable, HubFull) as error:
            await self._reply(f"{_reason(error)}: you have not joined {room.name}; try again later")
        finally:
            room.joining -= 1
            self.factory.close_unused(room)

    async def _find_room(self, wanted: str) -> Room | str:
        """Return a room of this process, or the reason why it cannot be joined.

        Similar names of rooms are found in the directory of all processes. The check is incomplete if there are more
        than 1,000 rooms, or if two processes create rooms with similar names simultaneously.
        """
        room = self._room_here(wanted)
        if room is not None:
            return room
        name = self.factory.room_names.normalise(wanted)
        try:
            listed: Members = await self._ask(self.factory.hub.members(DIRECTORY))
        except HubUnavailable as error:
            return f"{_reason(error)}: you have not joined {name}; try again later"
        self.work += len(listed.members) // 16
        if name.encode() not in listed.members:
            keys = frozenset(similarity_keys(name))
            for member in listed.members:
                other = member.decode()
                if not keys.isdisjoint(similarity_keys(other)):
                    return f"{name} looks like {other}, which is taken"
        return self._room_here(wanted) or self.factory.add_room(name)

    def _room_here(self, wanted: str) -> Room | str | None:
        """Return a room with members in this process, or the reason why it cannot be joined or created."""
        rooms = self.factory.rooms
        room = rooms.get(self.factory.room_names.normalise(wanted))
        if room is not None:
            return f"you are in {room.name} already" if room is self.room else room
        _, problem = self._new_name(wanted, self.factory.room_names)
        if not problem and len(rooms) >= self.factory.limits.max_rooms:
            problem = f"there {'is' if len(rooms) == 1 else 'are'} {counted(len(rooms), 'room')} already"
        return problem or None

    async def _enter(self, room: Room) -> None:
        """Enter a room whose subscription is active. The first line of it that the member gets is that it has joined.

        Raises HubUnavailable or HubFull if the line cannot be published; then the member is in no room.
        """
        self.room = room
        self._presence = NamePresence(self.factory.hub, room.topic, self.nick)
        try:
            await self._ask(self._presence.shown)
            said = room.say(f"* {self.nick} has joined {room.name}")
            room.enter(self)
            self._announced = True
            await self._ask(said)
        except (HubUnavailable, HubFull):
            self._announced = False
            self._depart()
            raise
        await self._lines_returned()
        if self not in room.members:
            # The line is late. The member must not wait without an answer.
            room.add(self)
            self.notify(f"you have joined {room.name}; lines may be missing")

    async def _leave(self) -> None:
        room = self.room
        if room is None:
            return
        if self._presence is not None:
            self._presence.leave()
        self._announced = False
        try:
            await self._ask(room.say(f"* {self.nick} has left {room.name}"))
            await self._ask(room.returned())
        except (HubUnavailable, HubFull):
            self.notify(f"you have left {room.name}")
        self._depart()

    def _depart(self) -> None:
        """Leave the room, if any, without waiting for the hub."""
        room, self.room = self.room, None
        presence, self._presence = self._presence, None
        if presence is not None:
            presence.leave()
        if room is None:
            return
        if self._announced:
            self._announced = False
            room.say(f"* {self.nick} has left {room.name}").addErrback(
                lambda failure: failure.trap(HubUnavailable, HubFull) and None
            )
        room.remove(self)
        self.factory.close_unused(room)

    # --- output ---

    @property
    def watched(self) -> bool:
        """Whether lines of the room must be sent with `deliver`."""
        return self._may_exceed or self._full or self.closing

    def deliver(self, piece: bytes) -> bool:
        """Send lines of the room. Return False after aborting a connection with more than `max_unsent` bytes unsent."""
        if self.closing:
            return True
        # Twisted's transports have no attribute `unsent`, but pause the producer above their buffer size.
        unsent = max(getattr(self.transport, "unsent", 0), self._overflow)
        if unsent + len(piece) > self.factory.limits.max_unsent:
            self.factory.too_slow += 1
            self.transport.abortConnection()
            return False
        self._send(piece)
        return True

    def notify(self, text: str) -> None:
        """Send a line to this member only, after all lines of its room so far."""
        if self.room is not None:
            self.room.catch_up(self)
        if not self.closing:
            self._send(f"* {text}\r\n".encode())

    def _send(self, data: bytes) -> None:
        if self._full:
            self._overflow += len(data)
        self.transport.write(data)

    def _watch(self) -> None:
        """Let the room send lines with `deliver`."""
        if self.room is not None:
            self.room.watch(self)

    def pauseProducing(self) -> None:
        """Delay the member's lines, since it does not read the answers. Called by the transport."""
        self._full = True
        self._watch()
        self._go_on()

    def resumeProducing(self) -> None:
        """Continue with the member's lines: all output is sent. Called by the transport."""
        self._full = False
        self._overflow = 0
        self._go_on()

    def stopProducing(self) -> None:
        """Send no more lines. Called by the transport when it closes."""
        self._watch()

    # --- the end ---

    def close(self, reason: str) -> None:
        """Send the reason, and close once it is sent."""
        self.notify(reason)
        self._watch()
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def drain(self) -> None:
        self.factory.turns.schedule_close(self)
