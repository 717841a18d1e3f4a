"""Decode and check what a worker sends: bytes in, typed and bounded messages out, or a ProtocolViolation.

A worker runs hosted code, and may be compromised by its clients. The supervisor holds every socket and serves
`/healthz`. So the cost of each message is bounded, and nothing is evaluated: log records are formatted text, counters
have known names, numbers have ranges, and each answer belongs to a question. The first message that breaks a rule is a
violation. After it the channel is not read any more.

This file has both sides of log records. The worker calls `finished_record` and `encode_records`, which keep the bounds
that the decoder checks.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from twisted.logger import LogEvent, LogLevel
from twisted.python.reflect import safe_str

from rtservice.escaping import escaped
from rtservice.pool.control import (
    LONGEST_FROM_WORKER,
    LineFraming,
    ProtocolViolation,
    decode_value,
    encode,
    shown,
    split_word,
)
from rtservice.pool.worker_counters import CounterDecoder
from rtservice.process.counters import PHASES, CounterKey

# Characters of a log record's text, traceback and namespace.
LONGEST_TEXT, LONGEST_TRACEBACK, LONGEST_NAMESPACE = 16 * 1024, 48 * 1024, 200

# Limits of the fields of a log record: their number, the length of a name and of a string, the depth and the number of
# nested values in all fields together.
MOST_FIELDS, LONGEST_NAME, LONGEST_VALUE, DEEPEST, MOST_VALUES = 64, 64, 4096, 5, 500

# The last second of the year 9999, the latest time that datetime supports.
LATEST = 253402300799

# Integers below this are accepted by every reader of a JSON log, and int() of their text is cheap.
_LARGEST = 2**63

# Names of fields that have a meaning in twisted.python.log: legacy observers would use `format` as a format string. The
# supervisor sets `slot`. Names that begin with `log_` are reserved for Twisted.
LEGACY_NAMES = frozenset(("time", "message", "system", "isError", "format", "failure", "why", "printed", "logLevel"))
RESERVED = LEGACY_NAMES | {"slot"}

# Limits: counters in a heartbeat; records, and lines of the access log, in a message; characters of such a line.
MOST_COUNTERS, MOST_RECORDS, MOST_LINES, LONGEST_LINE = 200, 100, 100, 4096

LONGEST_PROBLEM = 4096

# Characters of the problem with another worker, and the maximum number of such reports.
LONGEST_PEER_PROBLEM, _MOST_PEERS = 200, 100

# Names of fields that are cached as valid.
_MOST_KNOWN = 1000

# Characters of a peer's name in a row, and the number of values there.
_PEER, _ROW = 64, 7

_NUMBERS = frozenset((int, float))
_CONTAINERS = (list, tuple, dict, set, frozenset)

_LEVELS = {level.name: level for level in LogLevel.iterconstants()}
_LEVEL_NAMES = {id(level): name for name, level in _LEVELS.items()}


# --- messages ---
#
# `cost` is what a message costs the supervisor, in units of about 30 µs.


@dataclass(frozen=True, slots=True)
class Ready:
    """Every listener of the worker accepts."""

    cost: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker asks to be replaced."""

    cost: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot start."""

    problem: str

    cost: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Beat:
    """The worker's heartbeat, with the counters that have changed."""

    counters: dict[CounterKey, float]

    @property
    def cost(self) -> int:
        return 1 + len(self.counters) // 20


@dataclass(frozen=True, slots=True)
class Rows:
    """The answer to question `number`: open connections, as `Registry.rows` returns them."""

    number: int
    rows: list[list[Any]]

    @property
    def cost(self) -> int:
        return 1 + len(self.rows) // 10


class Record(NamedTuple):
    """A log record. `text` and `traceback` are escaped; `fields` are plain values."""

    level: Any
    namespace: str
    time: float
    text: str
    traceback: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Records:
    """Log records, in the order in which they were logged."""

    records: list[Record]
    cost: int


@dataclass(frozen=True, slots=True)
class Access:
    """Lines for the access log."""

    lines: list[str]

    @property
    def cost(self) -> int:
        return 1 + len(self.lines) // 20


@dataclass(frozen=True, slots=True)
class JoinMesh:
    """The worker asks for links to the other workers."""

    cost: ClassVar[int] = 20


@dataclass(frozen=True, slots=True)
class PeerProblem:
    """Another worker, of this incarnation, does not read its link or violates the protocol of links."""

    incarnation: int
    problem: str

    cost: ClassVar[int] = 1


Message = Ready | Leave | Failed | Beat | Rows | Records | Access | JoinMesh | PeerProblem


# --- the decoder ---


class WorkerMessages:
    """Decodes the messages of one worker, of slot `slot`.

    `listeners` are the names of the listeners. `access` is whether there is an access log.
    """

    def __init__(self, *, slot: int, listeners: Collection[str], access: bool) -> None:
        self._framing = LineFraming(max(LONGEST_FROM_WORKER.values()))
        self._listeners = frozenset(listeners)
        self._counters = CounterDecoder(self._listeners)
        self._access = access
        self._line_end = f" worker={slot}\n"
        self._started = ""  # `ready` or `failed`, once received
        self._field_names: set[str] = set()  # valid ones, as a cache
        self._asked: dict[int, int] = {}  # the maximum number of rows in the answer, by the number of the question
        self._joined = False  # `mesh` was received
        self._peers = 0  # reports about other workers
        self._decoders: dict[str, Callable[[Any], Message]] = {
            "ready": self._ready,
            "leave": self._leave,
            "failed": self._failed,
            "beat": self._beat,
            "rows": self._rows,
            "records": self._records,
            "access": self._access_lines,
            "mesh": self._mesh,
            "peer": self._peer,
        }

    def ask(self, number: int, count: int) -> None:
        """Expect one answer to question `number`, of at most `count` rows."""
        self._asked[number] = count

    @property
    def asked(self) -> Collection[int]:
        """The numbers of the questions without an answer, the oldest first."""
        return self._asked.keys()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._framing.feed(data)

    def next(self) -> Message | None:
        """Return the next complete message, or None. Raises ProtocolViolation, and nothing else."""
        line = self._framing.next()
        if line is None:
            return None
        word, text = split_word(line)
        decoder = self._decoders.get(word)
        if decoder is None:
            raise ProtocolViolation(f"an unknown message {shown(word)}")
        if len(line) > LONGEST_FROM_WORKER[word]:
            raise ProtocolViolation(f"a message {word!r} of more than {LONGEST_FROM_WORKER[word]} bytes")
        if word == "rows" and not self._asked:  # checked before the value is decoded
            raise ProtocolViolation("an answer without a question")
        return decoder(decode_value(word, text))

    # --- start and end of a worker ---

    def _ready(self, value: Any) -> Ready:
        self._start("ready", value is None)
        return Ready()

    def _failed(self, value: Any) -> Failed:
        self._start("failed", _is_text(value, LONGEST_PROBLEM))
        return Failed(escaped(value, keep="\n\t"))

    def _start(self, word: str, valid: bool) -> None:
        if self._started:
            raise ProtocolViolation(f"{word!r} after {self._started!r}")
        if not valid:
            raise ProtocolViolation(f"a message {word!r} with an invalid value")
        self._started = word

    def _leave(self, value: Any) -> Leave:
        if value is not None:
            raise ProtocolViolation("a message 'leave' with an invalid value")
        return Leave()

    # --- links to other workers ---

    def _mesh(self, value: Any) -> JoinMesh:
        if value is not None:
            raise ProtocolViolation("a message 'mesh' with an invalid value")
        if self._joined:
            raise ProtocolViolation("a second message 'mesh'")
        self._joined = True
        return JoinMesh()

    def _peer(self, value: Any) -> PeerProblem:
        if type(value) is not dict or value.keys() != {"incarnation", "problem"}:
            raise ProtocolViolation("a message 'peer' that is not an object of incarnation and problem")
        incarnation, problem = value["incarnation"], value["problem"]
        if not _is_count(incarnation) or not _is_text(problem, LONGEST_PEER_PROBLEM):
            raise ProtocolViolation("a message 'peer' with an invalid value")
        self._peers += 1
        if not self._joined or self._peers > _MOST_PEERS:
            raise ProtocolViolation("an unexpected message 'peer'")
        return PeerProblem(incarnation, escaped(problem))

    # --- counters and connections ---

    def _beat(self, value: Any) -> Beat:
        if type(value) is not dict or len(value) > MOST_COUNTERS:
            raise ProtocolViolation(f"a heartbeat that is not an object of at most {MOST_COUNTERS} counters")
        try:
            return Beat(self._counters.decode(value))
        except ValueError as problem:
            raise ProtocolViolation(f"a heartbeat with {problem}") from None

    def _rows(self, value: Any) -> Rows:
        if type(value) is not dict or value.keys() != {"id", "rows"}:
            raise ProtocolViolation("an answer that is not an object of id and rows")
        number, rows = value["id"], value["rows"]
        if type(number) is not int or number not in self._asked:
            raise ProtocolViolation("an answer without a question")
        count = self._asked.pop(number)
        if type(rows) is not list or len(rows) > count or not all(map(self._is_row, rows)):
            raise ProtocolViolation(f"an answer that is not an array of rows, {count} at most")
        return Rows(number, rows)

    def _is_row(self, row: Any) -> bool:
        if type(row) is not list or len(row) != _ROW:
            return False
        peer, listener, phase, age, idle, bytes_in, bytes_out = row
        return (
            _is_text(peer, _PEER)
            and peer.isprintable()
            and _is_text(listener)
            and listener in self._listeners
            and _is_text(phase)
            and phase in PHASES
            and _is_number(age)
            and (idle is None or _is_number(idle))
            and _is_count(bytes_in)
            and _is_count(bytes_out)
        )

    # --- logs ---

    def _records(self, value: Any) -> Records:
        if type(value) is not list or len(value) > MOST_RECORDS:
            raise ProtocolViolation(f"log records that are not an array of at most {MOST_RECORDS}")
        cost = 1
        records = []
        for item in value:
            record, record_cost = self._record(item)
            records.append(record)
            cost += record_cost
        return Records(records, cost)

    def _record(self, value: Any) -> tuple[Record, int]:
        """Return a record and its cost. Raises ProtocolViolation."""
        if type(value) is not list or len(value) != 6:
            raise ProtocolViolation("a log record that is not an array of six")
        name, namespace, when, text, traceback, fields = value
        level = _LEVELS.get(name) if type(name) is str else None
        if level is None:
            raise ProtocolViolation(f"a log record of an unknown level {shown(name)}")
        if type(namespace) is not str or len(namespace) > LONGEST_NAMESPACE:
            raise ProtocolViolation("a log record with an invalid namespace")
        if type(when) not in _NUMBERS or not 0 <= when <= LATEST:
            raise ProtocolViolation("a log record with an invalid time")
        if type(text) is not str or type(traceback) is not str:
            raise ProtocolViolation("a log record whose text is not a string")
        if len(text) > LONGEST_TEXT or len(traceback) > LONGEST_TRACEBACK:
            raise ProtocolViolation("a log record whose text is too long")
        self._check_fields(fields)
        size = len(text) + len(traceback)
        cost = 1 + size // 1024
        if traceback or not text.isprintable():
            text, traceback = escaped(text, keep="\n\t"), escaped(traceback, keep="\n\t")
            cost += (len(text) + len(traceback) - size) // 64
            cost += (text.count("\n") + traceback.count("\n")) // 32  # each is one more line of a text log
        return Record(level, escaped(namespace), when, text, traceback, fields), cost

    def _check_fields(self, fields: Any) -> None:
        """Raise ProtocolViolation unless the fields are a bounded number of plain values under allowed names."""
        if type(fields) is not dict or len(fields) > MOST_FIELDS:
            raise ProtocolViolation(f"a log record whose fields are not an object of at most {MOST_FIELDS}")
        left = MOST_VALUES
        known = self._field_names
        for name, value in fields.items():
            if name not in known:
                if not _is_field_name(name) or name in RESERVED:
                    raise ProtocolViolation(f"a log record with a field {shown(name)}")
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                known.add(name)
            if type(value) is str:  # most are
                if len(value) > LONGEST_VALUE or not _is_unicode(value):
                    raise ProtocolViolation(f"a log record whose field {shown(name)} is too long, or not valid text")
            else:
                left = _count_values(value, left, DEEPEST)
                if left < 0:
                    raise ProtocolViolation(f"a log record whose field {shown(name)} is too large, or not plain data")

    def _access_lines(self, value: Any) -> Access:
        if not self._access:
            raise ProtocolViolation("lines for an access log that does not exist")
        if type(value) is not list or len(value) > MOST_LINES:
            raise ProtocolViolation(f"lines for the access log that are not an array of at most {MOST_LINES}")
        for line in value:
            # A line ends with the number of its worker, so that no worker can write lines of another one.
            if not (
                _is_text(line, LONGEST_LINE)
                and line.startswith("start=")
                and line.endswith(self._line_end)
                and line[:-1].isprintable()
            ):
                raise ProtocolViolation("an invalid line for the access log")
        return Access(value)


def _is_text(value: Any, longest: int = LONGEST_VALUE) -> bool:
    return type(value) is str and len(value) <= longest


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and -_LARGEST < value < _LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _count_values(value: Any, left: int, depth: int) -> int:
    """Return `left` minus the number of values in this value, or a negative number if it is not allowed."""
    left -= 1
    kind = type(value)
    if value is None or kind is bool:
        return left
    if kind is str:
        return left if len(value) <= LONGEST_VALUE and _is_unicode(value) else -1
    if kind in _NUMBERS:
        return left if -_LARGEST < value < _LARGEST else -1
    if kind is dict:
        if not all(_is_field_name(name) for name in islice(value, max(left, 0))):
            return -1
        value = value.values()
    if not depth:
        return -1
    for inner in value:
        left = _count_values(inner, left, depth - 1)
        if left < 0:
            break
    return left


def _is_field_name(name: str) -> bool:
    return 0 < len(name) <= LONGEST_NAME and name[:4] != "log_" and name.isprintable()


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded in UTF-8. A lone surrogate cannot, and an observer would raise."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- the worker's side ---


def shortened(text: str, longest: int) -> str:
    """Return a text, without its middle if it is too long: the end of a traceback is its most useful part."""
    if len(text) <= longest:
        return text
    half = (longest - 60) // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


_encode_json = json.JSONEncoder(allow_nan=False).encode


def finished_record(event: LogEvent, text: str, traceback: str = "") -> list[Any]:
    """Return an event, with its formatted text, as a record to be sent. The decoder accepts it for any event."""
    name = _LEVEL_NAMES.get(id(event.get("log_level")), "info")
    namespace = event.get("log_namespace", "-")
    if type(namespace) is not str or len(namespace) > LONGEST_NAMESPACE:
        namespace = _described(namespace)[:LONGEST_NAMESPACE]
    when = event.get("log_time")
    if type(when) is not float or not 0 <= when <= LATEST:
        when = time.time()
    if len(text) > LONGEST_TEXT:
        text = shortened(text, LONGEST_TEXT)
    if len(traceback) > LONGEST_TRACEBACK:
        traceback = shortened(traceback, LONGEST_TRACEBACK)
    try:
        fields = _fields(event)
    except Exception:  # of hosted code that converts a value to text
        fields = {}
    return [name, namespace, when, text, traceback, fields]


def encode_records(records: list[list[Any]]) -> bytes:
    """Return the messages of at most MOST_RECORDS finished records."""
    message = b"records %b\n" % _encode_json(records).encode()
    if len(message) <= LONGEST_FROM_WORKER["records"]:
        return message
    if len(records) > 1:
        half = len(records) // 2
        return encode_records(records[:half]) + encode_records(records[half:])
    # Each character may be 12 bytes of JSON.
    [[name, namespace, when, text, traceback, _]] = records
    return encode("records", [[name, namespace, when, shortened(text, 4000), shortened(traceback, 4000), {}]])


# The name under which a field is sent, by the name of the field; empty if it is not sent.
_names: dict[Any, str] = {}


def _sent_name(name: Any) -> str:
    sent = ""
    if type(name) is str and name != "slot" and _is_field_name(name):
        sent = f"{name}_" if name in LEGACY_NAMES else name
    if len(_names) >= _MOST_KNOWN:
        _names.clear()
    _names[name] = sent
    return sent


def _fields(event: LogEvent) -> dict[str, Any]:
    """Return the fields of an event, without Twisted's, as plain values or as text. Fields over the limits are cut."""
    template = event.get("log_format")
    whole = template[1:-1] if type(template) is str and template[:1] == "{" else None  # the field that is the text
    legacy = "isError" in event and "system" in event
    found: dict[str, Any] = {}
    left = _Left(MOST_VALUES)
    for name, value in event.items():
        sent = _names.get(name)
        if sent is None:
            sent = _sent_name(name)
        if not sent or name == whole or (legacy and name in LEGACY_NAMES):
            continue
        kind = type(value)
        if kind is str and len(value) <= LONGEST_VALUE and value.isascii():
            found[sent] = value
        elif (kind is int or kind is float) and -_LARGEST < value < _LARGEST:  # most are, or text
            found[sent] = value
            left.values -= 1
        else:
            before = left.values
            try:
                found[sent] = _plain(value, DEEPEST, left)
            except _TooManyError:
                left.values = before - 1
                found[sent] = _described(value)
        if len(found) >= MOST_FIELDS or left.values <= 1:
            break
    return found


class _Left:
    """The number of values that a record may still have."""

    __slots__ = ("values",)

    def __init__(self, values: int) -> None:
        self.values = values


class _TooManyError(Exception):
    """A value contains too many nested values."""


def _text(value: str) -> str:
    return shortened(value, LONGEST_VALUE).encode("utf-8", "backslashreplace").decode()[:LONGEST_VALUE]


def _plain(value: Any, depth: int, left: _Left) -> Any:
    """Return a value as JSON logs show it: see `observe.logs`. Raises _TooManyError."""
    left.values -= 1
    if left.values < 1:
        raise _TooManyError
    kind = type(value)
    if value is None or kind is bool:
        return value
    if (kind is int or kind is float) and -_LARGEST < value < _LARGEST:  # NaN is not
        return value
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, bytes):
        return _text(value[:LONGEST_VALUE].decode("utf-8", "backslashreplace"))
    if depth and kind in (list, tuple):
        return [_plain(inner, depth - 1, left) for inner in value]
    if depth and kind is dict and all(type(name) is str and _is_field_name(name) for name in value):
        return {name: _plain(inner, depth - 1, left) for name, inner in value.items()}
    return _described(value)


def _described(value: Any) -> str:
    # The text of a container may be much longer than its contents, such as the same list many times.
    return _text(reprlib.repr(value) if isinstance(value, _CONTAINERS) else safe_str(value))
