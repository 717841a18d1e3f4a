"""Chat rooms: an example of a protocol whose connections know each other, with a bound on everything.

How the work is divided, so that no member can stall the others:

- An event of a connection only stores what was received. Lines are handled, and sent to the members of a room, in
  *turns*: calls that the factory schedules for the next iteration of the reactor while there is work. The work of one
  turn is bounded by LINES_PER_TURN and DELIVERIES_PER_TURN, and rooms take it in rotation.
- What is said in a room goes to the end of its log. A *round* sends the begin of the log, one piece of at most CHUNK
  bytes, to all members, in as many turns as that takes. So lines have the same order for all members of a room, and
  many short lines cost each member one write.
- A room whose log is full takes no line until a round has made room. Meanwhile the lines of its members wait, one of
  each member in rotation, and who has more input waiting than INPUT_LIMIT is not read from.
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
from rtservice.protocols.names import Names

# Bounds on one turn. A line counts for one, and for one more for every 256 bytes; commands that cost more add that to
# `Member.work`. Each takes 5 to 15 µs, so a turn takes 1 to 3 ms.
LINES_PER_TURN = 128

# A write to one member counts for one, and for one more for every 4 KiB. Each takes 10 to 20 µs with the system call.
DELIVERIES_PER_TURN = 192

# Deliveries to one room until it is the turn of the next one.
DELIVERIES_PER_ROOM = 32

# What a delivery counts that cuts the member off, and how many members are closed in one turn of a graceful shutdown:
# closing a connection takes 50 to 100 µs.
CUT_OFF_COST = 8
GOODBYES_PER_TURN = 32

# Bytes sent to each member in a round. A smaller `max_unsent` makes it a quarter of that.
CHUNK = 16 * 1024

# A member is not read from while it has a line waiting and more than this many bytes behind it.
INPUT_LIMIT = 16 * 1024

# Names in the answer to /who or /rooms.
NAMES_LISTED = 1000

_HELP = "/join ROOM, /leave, /rooms, /who, /nick NAME, /quit; anything else is said in your room"


class Room:
    """Members, what was said and not sent to all of them yet, and whose lines wait.

    The lobby is one too: members wait there for their turn when the next line says nothing in a room.
    """

    def __init__(self, name: str, chunk: int) -> None:
        self.name = name
        self._chunk = chunk
        self.members: dict[Member, None] = {}
        self.speakers: OrderedDict[Member, None] = (
            OrderedDict()
        )  # whose next line is to be handled as soon as the room is not full
        self.listening = False  # in the factory's rotation of rooms with speakers
        self.sending = False  # in the factory's rotation of rooms with a round
        self.rest: Any = None  # the delayed call that begins the next round
        self.next_round = 0.0  # when it would begin if there were no bursts
        self._log = bytearray()
        self._start = 0  # the position of its first byte among all that was ever said
        self._piece = b""  # the begin of the log, which this round sends
        self._round: deque[Member] = deque()  # members that it has not been sent to

    @property
    def full(self) -> bool:
        """Whether members have to wait until they can say something."""
        return len(self._log) - len(self._piece) >= self._chunk

    @property
    def silent(self) -> bool:
        """Whether everything that was said is sent."""
        return not self._log

    def add(self, member: Member) -> None:
        """Let a member hear what is said from now on."""
        self.members[member] = None
        member.room = self
        member.heard = self._start + len(self._log)

    def remove(self, member: Member) -> None:
        """Remove a member; what was said before is sent to it."""
        if not member.closing:
            self.catch_up(member)
        del self.members[member]
        member.room = None
        if not self.members:
            self._log.clear()
            self._round.clear()
            self._piece = b""

    def say(self, text: str) -> None:
        """Add a line to what is sent to all members."""
        self._log += text.encode() + b"\r\n"

    def catch_up(self, member: Member) -> None:
        """Send a member all that was said, before something that is for this member alone."""
        said = bytes(memoryview(self._log)[max(0, member.heard - self._start) :])
        member.heard = self._start + len(self._log)
        member.work += len(said) // 4096
        if said:
            member.hear(said)

    def send(self, work: int) -> int:
        """Go on with the round, or begin one. Return the work done, which may be a little more than `work`."""
        if not self._piece and self._log:
            # Whole lines, and at least one.
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
            piece = self._piece[member.heard - self._start :]  # the same object for all that miss nothing of it
            member.heard = end
            done += cost if member.hear(piece) else CUT_OFF_COST
        return done

    def end_round(self) -> int:
        """End the round if the piece is sent to all members; return how many bytes of the log are done with."""
        if self._round:
            return 0
        size = len(self._piece)
        self._start += size
        del self._log[:size]
        self._piece = b""
        return size


@implementer(IDrainable, IPushProducer)
class Member(Protocol):
    """One client: first it gives its nickname, then it joins a room and talks."""

    factory: ChatFactory
    transport: Any  # Twisted's interfaces split in five what every stream transport has

    def connectionMade(self) -> None:
        self.nick = ""
        self.room: Room | None = None
        self.heard = 0  # how much of what was ever said in its room is sent to it
        self.line: str | None = None  # the next one to be handled
        self.waits_in: Room | None = None  # where it is among the speakers
        self.work = 0  # how many lines the one that is handled counts for
        self.parting = False  # the service is about to end
        self._input = bytearray()  # what follows that line
        self._searched = 0  # how much of it has no line feed
        self._size = 0  # of the next line, as it was received
        self._reading = True
        self._full = False  # the transport wants no more for now
        self._overflow = 0  # bytes that it got nevertheless
        self._gone = False
        self.transport.registerProducer(self, True)
        if len(self.factory.members) >= self.factory.max_members:
            self.close("the chat is full")
            return
        self.factory.members.add(self)
        self.tell("your nickname?")

    def connectionLost(self, reason: Any = None) -> None:
        self._gone = True
        self.line = None
        self._input.clear()
        self._leave()
        self.factory.forget(self)

    @property
    def closing(self) -> bool:
        """Whether nothing is sent to it and nothing heard from it any more."""
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
        """Make the next line of the input `line`, if it is complete; close if it breaks the rules."""
        end = self._input.find(b"\n", self._searched)
        if (len(self._input) if end < 0 else end) > self.factory.max_line:
            self.close(f"a line may have {counted(self.factory.max_line, 'byte')}")
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
            self.close("only UTF-8 is spoken here")
            return
        # Terminals of other members must show the text, and not obey it.
        if not text.isprintable():
            text = "".join(char for char in text if char.isprintable())
        self.line = text.strip()

    def _go_on(self) -> None:
        """Queue the next line if there is one, and read if there is room for more."""
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
        """The room that has to have space for what the next line says; the lobby if it needs no space."""
        lobby = self.factory.lobby
        if not self.nick or self.line is None:
            return lobby
        word, _, rest = self.line.partition(" ")
        if word == "/join":
            return self.factory.rooms.get(self.factory.room_names.normalise(rest.strip()), lobby)
        # Leaving is always possible: a room has space for as many such lines as it has members.
        return lobby if self.room is None or (word.startswith("/") and word != "/nick") else self.room

    def speak(self) -> int:
        """Handle the next line, in a turn of the factory; return how many lines it counts for."""
        self.work = 1
        # One that does not read keeps its line until it has read.
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
            self.tell("you are in no room: /join ROOM")
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
                self.tell(_HELP)

    def _list(self, names: list[str], total: int, nothing: str) -> None:
        self.work += len(names) // 16
        more = f" and {total - len(names)} more" if total > len(names) else ""
        self.tell(" ".join(sorted(names)) + more or nothing)

    # --- names and rooms ---

    def _rename(self, wanted: str) -> None:
        self.work += 4
        names = self.factory.nicks
        nick, problem = self._new_name(wanted, names, self.nick)
        if problem:
            self.tell(problem)
            return
        before, self.nick = self.nick, nick
        names.discard(before)
        names.add(nick)
        if self.room is not None:
            self._say(self.room, f"* {before} is now {nick}")
        elif not before:
            self.tell(f"hello {nick}; {_HELP}")

    def _join(self, wanted: str) -> None:
        self.work += 4
        rooms, names = self.factory.rooms, self.factory.room_names
        room = rooms.get(names.normalise(wanted))
        if room is None:
            name, problem = self._new_name(wanted, names)
            if not problem and len(rooms) >= self.factory.max_rooms:
                problem = f"there {'is' if len(rooms) == 1 else 'are'} {counted(len(rooms), 'room')} already"
            if problem:
                self.tell(problem)
                return
            room = self.factory.add_room(name)
        elif room is self.room:
            self.tell(f"you are in {room.name} already")
            return
        self._leave()
        room.add(self)
        self._say(room, f"* {self.nick} has joined {room.name}")

    def _new_name(self, wanted: str, names: Names, instead_of: str = "") -> tuple[str, str]:
        """Return the name in the form in which it is shown, and what is wrong with it, if something is."""
        name = names.normalise(wanted)
        if not name:
            return "", f"a name has up to {self.factory.max_name} letters of one script, digits and . _ -"
        taken = name if name == instead_of else names.like(name, instead_of)
        if taken:
            return "", f"{name} is taken" if taken == name else f"{name} looks like {taken}, which is taken"
        return name, ""

    def _leave(self) -> None:
        room = self.room
        if room is not None:
            if not self.parting:
                self._say(room, f"* {self.nick} has left {room.name}")
            room.remove(self)
            if not room.members:
                self.factory.remove_room(room)

    # --- output ---

    def _say(self, room: Room, text: str) -> None:
        """Send a line to everybody in the room, also to this member: so it knows that the line has arrived."""
        room.say(text)
        self.factory.said(room)

    def hear(self, piece: bytes) -> bool:
        """Send what was said in the room. A member that is too far behind is cut off, which returns False."""
        if self.closing:
            return True
        # A transport of Twisted's own does not say how much is unsent, but says when that is more than its buffer size.
        if max(getattr(self.transport, "unsent", 0), self._overflow) + len(piece) > self.factory.max_unsent:
            self.factory.too_slow += 1
            self.transport.abortConnection()
            return False
        self._send(piece)
        return True

    def tell(self, text: str) -> None:
        """Send a line to this member alone, after all that was said in its room."""
        if self.room is not None:
            self.room.catch_up(self)
        if not self.closing:
            self._send(f"* {text}\r\n".encode())

    def _send(self, data: bytes) -> None:
        if self._full:
            self._overflow += len(data)
        self.transport.write(data)

    def pauseProducing(self) -> None:
        """The member does not read: its lines wait, since their answers would. Called by the transport."""
        self._full = True
        self._go_on()

    def resumeProducing(self) -> None:
        """Everything is sent. Called by the transport."""
        self._full = False
        self._overflow = 0
        self._go_on()

    def stopProducing(self) -> None:
        """The connection has ended, which connectionLost tells. Called by the transport."""

    # --- the end ---

    def close(self, why: str) -> None:
        """Say why, and close when that is sent."""
        self.tell(why)
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def drain(self) -> None:
        self.parting = True
        self.factory.part(self)


@implementer(IOneProcess, IMetrics)
class ChatFactory(Factory[Member]):
    """Rooms in which people talk, line by line, under nicknames.

    Everything has a bound: lines of `max_line` bytes, `max_members` in all, `max_rooms` rooms, names of `max_name`
    characters, `max_rate` bytes per second said in one room. What is said faster waits. A member with more than
    `max_unsent` bytes unsent is cut off: one that reads as fast as `max_rate` never is.

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
                raise ValueError(f"{name.replace('_', '-')} is {value}, and has to be 1 or more")
        self.max_line = max_line
        self.max_members = max_members
        self.max_rooms = max_rooms
        self.max_name = max_name
        self.max_unsent = max_unsent
        self.max_rate = max_rate
        self.chunk = min(CHUNK, max(1, max_unsent // 4))
        self.members: set[Member] = set()
        self.nicks = Names(max_name)
        self.rooms: dict[str, Room] = {}
        self.room_names = Names(max_name)
        self.lobby = Room("", self.chunk)
        self.messages = self.too_slow = 0
        self.clock: Any = None  # an IReactorTime, from startFactory on
        self._listening: deque[Room] = deque()  # rooms with speakers that are not full
        self._sending: deque[Room] = deque()  # rooms with something to send
        self._parting: deque[Member] = deque()  # members to be closed, since the service is about to end
        self._turn: Any = None  # the delayed call that is the next turn

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
        """Make a room of this name, which has to be free."""
        self.room_names.add(name)
        room = self.rooms[name] = Room(name, self.chunk)
        return room

    def remove_room(self, room: Room) -> None:
        """Forget a room that the last member has left."""
        del self.rooms[room.name]
        self.room_names.discard(room.name)
        self._stop_rest(room)
        self._listen(room)  # who waited to join it makes a new one

    def forget(self, member: Member) -> None:
        """A member has gone."""
        self.members.discard(member)
        self.nicks.discard(member.nick)
        if member.waits_in is not None:
            del member.waits_in.speakers[member]
            member.waits_in = None

    # --- turns ---

    def queue(self, member: Member) -> None:
        """Have the next line of a member handled when it is its turn."""
        member.waits_in = room = member.place()
        room.speakers[member] = None
        self._listen(room)

    def said(self, room: Room) -> None:
        """Something was said in a room: have it sent."""
        if room.sending or room.rest is not None or room.silent:
            return
        # Bursts of one piece are free.
        wait = room.next_round - self.chunk / self.max_rate - self.clock.seconds()
        if wait > 0:
            room.rest = self.clock.callLater(wait, self._rested, room)
        else:
            room.sending = True
            self._sending.append(room)
            self._schedule()

    def part(self, member: Member) -> None:
        """Close a member, since the service is about to end."""
        self._parting.append(member)
        self._schedule()

    def _listen(self, room: Room) -> None:
        if room.speakers and not room.listening and not room.full:
            room.listening = True
            self._listening.append(room)
            self._schedule()

    def _rested(self, room: Room) -> None:
        room.rest = None
        self.said(room)

    def _stop_rest(self, room: Room) -> None:
        if room.rest is not None:
            room.rest.cancel()
            room.rest = None

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self.clock.callLater(0, self._take_turn)

    def _take_turn(self) -> None:
        self._turn = None
        for _ in range(min(GOODBYES_PER_TURN, len(self._parting))):
            member = self._parting.popleft()
            if not member.closing:
                member.close("this chat is about to end; come again")
        self._hear_lines()
        self._send_rounds()
        if self._listening or self._sending or self._parting:
            self._schedule()

    def _hear_lines(self) -> None:
        """Handle lines: one of each room in rotation, and in each room one of each member."""
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
        """Send what was said: some deliveries of each room in rotation."""
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
            self.said(room)

    def metrics(self) -> dict[str, int | float]:
        return {
            "members": len(self.members),
            "rooms": len(self.rooms),
            "messages_total": self.messages,
            "too_slow_total": self.too_slow,
        }
