"""Chat rooms: an example of a protocol whose connections exchange data, with bounds on all resources.

Work is divided so that no member can delay the others:

- An event of a connection only stores the input. Lines are handled, and sent to the members of a room, in *turns*:
  calls that the factory schedules for the next iteration of the reactor while there is work. LINES_PER_TURN and
  DELIVERIES_PER_TURN bound the work of one turn, and the rooms are served in rotation.
- A line is appended to the log of its room. A *round* sends the beginning of the log, at most CHUNK bytes, to all
  members, in as many turns as necessary. So all members of a room get lines in the same order, and many short lines
  cost one write for each member.
- A room with a full log accepts no line until a round has made space. Meanwhile the lines of its members wait, one of
  each member in rotation, and reading from a member pauses while more than INPUT_LIMIT bytes of its input wait.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.counted import counted
from rtservice.interfaces import IDrainable, IMetrics, IOneProcess
from rtservice.protocols.names import TakenNames

# Bounds on one turn. A line counts as one, and one more for every 256 bytes; commands that cost more add to
# `Member.work`. Each takes 5 to 15 µs, so a turn takes 1 to 3 ms.
LINES_PER_TURN = 128

# A write to one member counts as one, and one more for every 4 KiB. Each takes 10 to 20 µs with the system call.
DELIVERIES_PER_TURN = 192

# Deliveries to one room before the next room is served.
DELIVERIES_PER_ROOM = 32

# Cost of a delivery that aborts a member's connection, and members closed in one turn of a graceful shutdown: closing a
# connection takes 50 to 100 µs.
ABORT_COST = 8
CLOSES_PER_TURN = 32

# Bytes sent to each member in a round; at most a quarter of `max_unsent`.
CHUNK = 16 * 1024

# Reading from a member pauses while a line and more than this many bytes after it wait.
INPUT_LIMIT = 16 * 1024

# Names in the answer to /who or /rooms.
NAMES_LISTED = 1000

_HELP = "/join ROOM, /leave, /rooms, /who, /nick NAME, /quit; other lines are sent to your room"


class Room:
    """A room: its members, the lines that are not sent to all of them yet, and the members whose lines wait.

    The lobby is a Room too: a member whose next line adds nothing to the log of a room waits there for its turn.
    """

    def __init__(self, name: str, chunk: int) -> None:
        self.name = name
        self._chunk = chunk
        self.members: dict[Member, None] = {}
        self.speakers: OrderedDict[Member, None] = (
            OrderedDict()
        )  # members with a waiting line, which is handled while the room is not full
        self.listening = False  # in the factory's rotation of rooms with speakers
        self.sending = False  # in the factory's rotation of rooms with a round
        self.rest: Any = None  # the delayed call that begins the next round
        self.next_round = 0.0  # time of the next round at the maximum rate, without bursts
        self._log = bytearray()
        self._start = 0  # position of the log's first byte since the room was created
        self._piece = b""  # the beginning of the log, which this round sends
        self._round: deque[Member] = deque()  # members to which it is not sent yet

    @property
    def full(self) -> bool:
        """Whether the lines of members must wait."""
        return len(self._log) - len(self._piece) >= self._chunk

    @property
    def silent(self) -> bool:
        """Whether the log is empty: all lines are sent."""
        return not self._log

    def add(self, member: Member) -> None:
        """Add a member. It gets all lines from now on."""
        self.members[member] = None
        member.room = self
        member.heard = self._start + len(self._log)

    def remove(self, member: Member) -> None:
        """Remove a member, and send it the lines so far."""
        if not member.closing:
            self.catch_up(member)
        del self.members[member]
        member.room = None
        if not self.members:
            self._log.clear()
            self._round.clear()
            self._piece = b""

    def say(self, text: str) -> None:
        """Append a line to the log."""
        self._log += text.encode() + b"\r\n"

    def catch_up(self, member: Member) -> None:
        """Send a member all lines so far, before a line that only this member gets."""
        missed = bytes(memoryview(self._log)[max(0, member.heard - self._start) :])
        member.heard = self._start + len(self._log)
        member.work += len(missed) // 4096
        if missed:
            member.deliver(missed)

    def send(self, work: int) -> int:
        """Continue the round, or begin one. Return the deliveries counted, which may slightly exceed `work`."""
        if not self._piece and self._log:
            # Complete lines, and at least one.
            end = self._log.rfind(b"\n", 0, self._chunk) + 1 or self._log.find(b"\n") + 1
            self._piece = bytes(memoryview(self._log)[:end])
            self._round = deque(self.members)
        done = 0
        end, cost = self._start + len(self._piece), 1 + len(self._piece) // 4096
        while self._round and done < work:
            member = self._round.popleft()
            if member.room is not self or member.heard >= end:  # it left, joined later, or caught up
                done += 1
                continue
            piece = self._piece[member.heard - self._start :]  # the whole piece is the same object for all members
            member.heard = end
            done += cost if member.deliver(piece) else ABORT_COST
        return done

    def end_round(self) -> int:
        """End the round if the piece is sent to all members. Return the number of bytes removed from the log."""
        if self._round:
            return 0
        size = len(self._piece)
        self._start += size
        del self._log[:size]
        self._piece = b""
        return size


@implementer(IDrainable, IPushProducer)
class Member(Protocol):
    """One client: sends its nickname first, then joins a room and sends lines."""

    factory: ChatFactory
    transport: Any  # Twisted divides the methods of a stream transport among five interfaces

    def connectionMade(self) -> None:
        self.nick = ""
        self.room: Room | None = None
        self.heard = 0  # position in its room up to which lines are sent to it
        self.line: str | None = None  # the next line to handle
        self.waits_in: Room | None = None  # the room whose `speakers` contain it
        self.work = 0  # cost of the current line, in lines
        self.draining = False  # the graceful shutdown has begun
        self._input = bytearray()  # input after `line`
        self._searched = 0  # bytes of it that contain no line feed
        self._size = 0  # bytes of the next line as received
        self._reading = True
        self._full = False  # the transport has paused this producer
        self._overflow = 0  # bytes written while paused
        self._gone = False
        self.transport.registerProducer(self, True)
        if len(self.factory.members) >= self.factory.max_members:
            self.close("the chat is full")
            return
        self.factory.members.add(self)
        self.notify("your nickname?")

    def connectionLost(self, reason: Any = None) -> None:
        self._gone = True
        self.line = None
        self._input.clear()
        self._leave()
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
        end = self._input.find(b"\n", self._searched)
        if (len(self._input) if end < 0 else end) > self.factory.max_line:
            self.close(f"the line is too long; the maximum is {counted(self.factory.max_line, 'byte')}")
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
        if self.line is not None and self.waits_in is None and not self._full:
            self.factory.queue(self)
        reading = not self._full and (self.line is None or len(self._input) < INPUT_LIMIT)
        if reading != self._reading:
            self._reading = reading
            if reading:
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()

    def place(self) -> Room:
        """Return the room whose log must have space for the next line; the lobby if it needs no space."""
        lobby = self.factory.lobby
        if not self.nick or self.line is None:
            return lobby
        word, _, rest = self.line.partition(" ")
        if word == "/join":
            return self.factory.rooms.get(self.factory.room_names.normalise(rest.strip()), lobby)
        # /leave never waits: it adds at most one line for each member to the log.
        return lobby if self.room is None or (word.startswith("/") and word != "/nick") else self.room

    def speak(self) -> int:
        """Handle the next line, in a turn of the factory. Return its cost, in lines."""
        self.work = 1
        # The line of a member that does not read waits until it has read.
        if not self.closing and not self._full and self.line is not None:
            line, self.line = self.line, None
            self.work += self._size // 256
            self._handle(line)
            if not self.closing:
                self._find_line()
                self._go_on()
        return self.work

    def _handle(self, text: str) -> None:
        if not self.nick:
            self._rename(text)
        elif text.startswith("/"):
            word, _, rest = text[1:].partition(" ")
            self._command(word, rest.strip())
        elif self.room is None:
            self.notify("you are in no room: /join ROOM")
        elif text:
            self.factory.messages += 1
            self._say(self.room, f"{self.nick}: {text}")

    def _command(self, word: str, rest: str) -> None:
        match word:
            case "join":
                self._join(rest)
            case "leave":
                self._leave()
            case "nick":
                self._rename(rest)
            case "rooms":
                rooms = self.factory.rooms
                self._list(list(islice(rooms, NAMES_LISTED)), len(rooms), "there is no room yet")
            case "who":
                members = self.room.members if self.room else {}
                names = [member.nick for member in islice(members, NAMES_LISTED)]
                self._list(names, len(members), "you are in no room")
            case "quit":
                self.close("goodbye")
            case _:
                self.notify(_HELP)

    def _list(self, names: list[str], total: int, nothing: str) -> None:
        self.work += len(names) // 16
        more = f" and {total - len(names)} more" if total > len(names) else ""
        self.notify(" ".join(sorted(names)) + more or nothing)

    # --- names and rooms ---

    def _rename(self, wanted: str) -> None:
        self.work += 4
        names = self.factory.nicks
        nick, problem = self._new_name(wanted, names, self.nick)
        if problem:
            self.notify(problem)
            return
        before, self.nick = self.nick, nick
        names.discard(before)
        names.add(nick)
        if self.room is not None:
            self._say(self.room, f"* {before} is now {nick}")
        elif not before:
            self.notify(f"hello {nick}; {_HELP}")

    def _join(self, wanted: str) -> None:
        self.work += 4
        rooms, names = self.factory.rooms, self.factory.room_names
        room = rooms.get(names.normalise(wanted))
        if room is None:
            name, problem = self._new_name(wanted, names)
            if not problem and len(rooms) >= self.factory.max_rooms:
                problem = f"there {'is' if len(rooms) == 1 else 'are'} {counted(len(rooms), 'room')} already"
            if problem:
                self.notify(problem)
                return
            room = self.factory.add_room(name)
        elif room is self.room:
            self.notify(f"you are in {room.name} already")
            return
        self._leave()
        room.add(self)
        self._say(room, f"* {self.nick} has joined {room.name}")

    def _new_name(self, wanted: str, names: TakenNames, instead_of: str = "") -> tuple[str, str]:
        """Return the name in its normal form, and the error text, or "" if it is valid and free."""
        name = names.normalise(wanted)
        if not name:
            return "", f"a name consists of up to {self.factory.max_name} letters of one script, digits and . _ -"
        taken = name if name == instead_of else names.like(name, instead_of)
        if taken:
            return "", f"{name} is taken" if taken == name else f"{name} looks like {taken}, which is taken"
        return name, ""

    def _leave(self) -> None:
        room = self.room
        if room is not None:
            if not self.draining:
                self._say(room, f"* {self.nick} has left {room.name}")
            room.remove(self)
            if not room.members:
                self.factory.remove_room(room)

    # --- output ---

    def _say(self, room: Room, text: str) -> None:
        """Send a line to all members of the room, including this one: it confirms that the line was accepted."""
        room.say(text)
        self.factory.schedule_round(room)

    def deliver(self, piece: bytes) -> bool:
        """Send lines of the room. Return False after aborting a connection with more than `max_unsent` bytes unsent."""
        if self.closing:
            return True
        # Twisted's transports have no attribute `unsent`, but pause the producer above their buffer size.
        if max(getattr(self.transport, "unsent", 0), self._overflow) + len(piece) > self.factory.max_unsent:
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

    def pauseProducing(self) -> None:
        """Delay the member's lines, since it does not read the answers. Called by the transport."""
        self._full = True
        self._go_on()

    def resumeProducing(self) -> None:
        """Continue with the member's lines: all output is sent. Called by the transport."""
        self._full = False
        self._overflow = 0
        self._go_on()

    def stopProducing(self) -> None:
        """Do nothing: connectionLost handles the end. Called by the transport."""

    # --- the end ---

    def close(self, reason: str) -> None:
        """Send the reason, and close once it is sent."""
        self.notify(reason)
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def drain(self) -> None:
        self.draining = True
        self.factory.schedule_close(self)


@implementer(IOneProcess, IMetrics)
class ChatFactory(Factory[Member]):
    """Chat rooms: members send lines of text under nicknames.

    Bounds, each 1 or more: `max_line` bytes of a line, `max_members` in total, `max_rooms`, `max_name` characters of a
    name, `max_rate` bytes per second in one room, above which lines wait. The connection of a member with more than
    `max_unsent` bytes unsent is aborted; this never happens to a client that reads at `max_rate`.

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
        max_rate: int = 128 * 1024,
    ) -> None:
        for name, value in list(locals().items()):
            if name.startswith("max_") and value < 1:
                raise ValueError(f"{name.replace('_', '-')} is {value}; it must be 1 or more")
        self.max_line = max_line
        self.max_members = max_members
        self.max_rooms = max_rooms
        self.max_name = max_name
        self.max_unsent = max_unsent
        self.max_rate = max_rate
        self.chunk = min(CHUNK, max(1, max_unsent // 4))
        self.members: set[Member] = set()
        self.nicks = TakenNames(max_name)
        self.rooms: dict[str, Room] = {}
        self.room_names = TakenNames(max_name)
        self.lobby = Room("", self.chunk)
        self.messages = self.too_slow = 0
        self.clock: Any = None  # an IReactorTime, set by startFactory
        self._listening: deque[Room] = deque()  # rooms with speakers that are not full
        self._sending: deque[Room] = deque()  # rooms with lines to send
        self._draining: deque[Member] = deque()  # members to close in the graceful shutdown
        self._turn: Any = None  # the delayed call of the next turn

    def startFactory(self) -> None:
        from twisted.internet import reactor

        self.clock = self.clock or reactor

    def stopFactory(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        for room in self.rooms.values():
            self._stop_rest(room)

    # --- members and rooms ---

    def add_room(self, name: str) -> Room:
        """Create a room with this name, which must be free."""
        self.room_names.add(name)
        room = self.rooms[name] = Room(name, self.chunk)
        return room

    def remove_room(self, room: Room) -> None:
        """Remove an empty room."""
        del self.rooms[room.name]
        self.room_names.discard(room.name)
        self._stop_rest(room)
        self._listen(room)  # a member that waited to join it creates a new room

    def forget(self, member: Member) -> None:
        """Remove a member whose connection has ended."""
        self.members.discard(member)
        self.nicks.discard(member.nick)
        if member.waits_in is not None:
            del member.waits_in.speakers[member]
            member.waits_in = None

    # --- turns ---

    def queue(self, member: Member) -> None:
        """Schedule the next line of a member."""
        member.waits_in = room = member.place()
        room.speakers[member] = None
        self._listen(room)

    def schedule_round(self, room: Room) -> None:
        """Schedule a round for the lines of a room."""
        if room.sending or room.rest is not None or room.silent:
            return
        # A burst of one piece is not delayed.
        wait = room.next_round - self.chunk / self.max_rate - self.clock.seconds()
        if wait > 0:
            room.rest = self.clock.callLater(wait, self._rested, room)
        else:
            room.sending = True
            self._sending.append(room)
            self._schedule()

    def schedule_close(self, member: Member) -> None:
        """Schedule the close of a member in the graceful shutdown."""
        self._draining.append(member)
        self._schedule()

    def _listen(self, room: Room) -> None:
        if room.speakers and not room.listening and not room.full:
            room.listening = True
            self._listening.append(room)
            self._schedule()

    def _rested(self, room: Room) -> None:
        room.rest = None
        self.schedule_round(room)

    def _stop_rest(self, room: Room) -> None:
        if room.rest is not None:
            room.rest.cancel()
            room.rest = None

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self.clock.callLater(0, self._take_turn)

    def _take_turn(self) -> None:
        self._turn = None
        for _ in range(min(CLOSES_PER_TURN, len(self._draining))):
            member = self._draining.popleft()
            if not member.closing:
                member.close("the chat shuts down")
        self._hear_lines()
        self._send_rounds()
        if self._listening or self._sending or self._draining:
            self._schedule()

    def _hear_lines(self) -> None:
        """Handle lines: one of each room in rotation, and within a room one of each member."""
        left = LINES_PER_TURN
        while left > 0 and self._listening:
            room = self._listening.popleft()
            room.listening = False
            if room.speakers and not room.full:
                member, _ = room.speakers.popitem(last=False)
                member.waits_in = None
                left -= member.speak()
                self._listen(room)

    def _send_rounds(self) -> None:
        """Send lines: up to DELIVERIES_PER_ROOM deliveries of each room in rotation."""
        left = DELIVERIES_PER_TURN
        while left > 0 and self._sending:
            room = self._sending.popleft()
            left -= room.send(min(left, DELIVERIES_PER_ROOM))
            sent = room.end_round()
            if not sent and not room.silent:
                self._sending.append(room)
                continue
            room.sending = False
            room.next_round = max(room.next_round, self.clock.seconds()) + sent / self.max_rate
            self._listen(room)
            self.schedule_round(room)

    def metrics(self) -> dict[str, int | float]:
        return {
            "members": len(self.members),
            "rooms": len(self.rooms),
            "messages_total": self.messages,
            "too_slow_total": self.too_slow,
        }
